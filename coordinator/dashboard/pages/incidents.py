"""`/incidents`: what went wrong, found by the coordinator itself, with its evidence and what was done."""

from coordinator.dashboard.data_table import Column, DataTable, Row, linked, row
from coordinator.dashboard.elements import UNKNOWN, peer_path, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.snapshot import Snapshot, describe_age
from coordinator.records.reader import read_incidents
from coordinator.records.views import Incident
from coordinator.verdict import describe_span

MAX_LISTED = 100
KINDS = {
    "lost_peer": "Worker lost",
    "validator_lost": "Validator gone",
    "refused": "Contribution refused",
    "digest_mismatch": "State differs",
    "void_round": "Round void",
    "restart": "Coordinator restarted",
    "ban": "Peer banned",
}
COLUMNS = (
    Column("What"),
    Column("Who"),
    Column("Since"),
    Column("Lasted"),
    Column("Rounds"),
    Column("Times", "number"),
    Column("Evidence", "wide"),
    Column("Action", "wide"),
)


async def build(_: Frame, viewer: Viewer) -> None:
    board = viewer.board
    with section("lasting", "Now") as now:
        lasting = DataTable(COLUMNS, labelledby="lasting", empty="Nothing is wrong at this moment.")
    with section("past", "Before"):
        text("p", f"The newest {MAX_LISTED}. The same thing again within ten minutes is one line.", "muted")
        past = DataTable(COLUMNS, labelledby="past", empty="No incident is on record.")

    async def show(snapshot: Snapshot) -> None:
        incidents = await board.share(read_incidents, board.server.database.readers, MAX_LISTED)
        open_ones = [one for one in incidents if one.until_unix_s is None]
        now.text = f"Now ({len(open_ones):,})" if open_ones else "Now"
        lasting.show([describe_incident(one, snapshot.now_unix_s) for one in open_ones])
        past.show([describe_incident(one, snapshot.now_unix_s) for one in incidents if one.until_unix_s is not None])

    viewer.updaters.append(show)


def describe_incident(incident: Incident, now_unix_s: float) -> Row:
    first, last = incident.first_round, incident.last_round
    until = incident.until_unix_s
    who = linked(incident.name or incident.peer[-8:], peer_path(incident.peer)) if incident.peer else UNKNOWN
    return row(
        str(incident.id),
        KINDS.get(incident.kind, incident.kind.replace("_", " ").capitalize()),
        who,
        describe_age(now_unix_s - incident.since_unix_s),
        "still lasts" if until is None else describe_span(until - incident.since_unix_s),
        f"{first:,}" if first == last else f"{first:,} to {last:,}",
        f"{incident.count:,}",
        describe_evidence(incident) or UNKNOWN,
        incident.action or UNKNOWN,
        css="alarm" if until is None else "",
    )


def describe_evidence(incident: Incident) -> str:
    """What was seen, in words; hashes cut short."""
    parts = []
    for key, value in incident.evidence.items():
        words = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        is_hash = len(words) == 64 and " " not in words
        parts.append(words if key == "reason" else f"{key.replace('_', ' ')} {words[:12] + '…' if is_hash else words}")
    return "; ".join(parts)
