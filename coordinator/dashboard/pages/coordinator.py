"""`/coordinator`: the coordinator's own health, and for the operator its controls."""

from collections.abc import Mapping
from typing import Any

from coordinator.dashboard.api import CoordinatorFacts, describe_coordinator
from coordinator.dashboard.controls import RunControls
from coordinator.dashboard.data_table import Column, DataTable, Row, linked, row
from coordinator.dashboard.elements import UNKNOWN, Facts, count, describe_bytes, number, peer_path, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.invites import InviteControls
from coordinator.dashboard.snapshot import Snapshot, describe_age
from coordinator.verdict import describe_span

MAX_LEASES = 100
FACTS = {
    "commit": "Commit, p50 and p99",
    "wait": "An event waits, p99",
    "queue": "Events waiting",
    "disk": "Disk free",
    "up": "Started",
    "sessions": "Sessions",
    "validator": "Validator",
    "heartbeat": "Oldest heartbeat",
    "events": "Events journalled",
}
LEASES = (Column("Worker"), Column("Lease"), Column("Age", "number"), Column("Expires in", "number"))


async def build(_: Frame, viewer: Viewer) -> None:
    server = viewer.board.server
    with section("health", "Health"):
        facts = Facts(FACTS, "facts")
        text(
            "p",
            "Quantiles are of the last 1,000. A commit is one transaction, on the disk before anything is sent.",
            "muted",
        )
    with section("queues", "Open leases"):
        words = text("p", "", "muted")
        leases = DataTable(LEASES, labelledby="queues", empty="No lease is open: between two rounds, or nobody works.")
    if viewer.is_operator():
        RunControls(viewer)
        InviteControls(viewer)

    async def show(snapshot: Snapshot) -> None:
        coordinator = describe_coordinator(server)
        facts.show(**describe_health(coordinator, snapshot.status, snapshot.now_unix_s))
        names = {peer["peer"]: peer["name"] for peer in snapshot.status["peers"]}
        rows = describe_leases(coordinator, names)
        leases.show(rows[:MAX_LEASES])
        words.text = f"{count(len(rows), 'lease')} in this round." if rows else ""

    viewer.updaters.append(show)


def describe_health(facts: CoordinatorFacts, status: Mapping[str, Any], now_unix_s: float) -> dict[str, str]:
    peers = status["peers"]
    ages = [peer["heartbeat_age_s"] for peer in peers if peer["heartbeat_age_s"] is not None]
    is_there = any(peer["connected"] for peer in peers if peer["role"] == "validator")
    used = 1 - facts.disk_free_bytes / facts.disk_total_bytes
    return {
        "commit": f"{milliseconds(facts.commit_p50_s)}, {milliseconds(facts.commit_p99_s)}",
        "wait": milliseconds(facts.wait_p99_s),
        "queue": f"{facts.waiting:,}",
        "disk": f"{describe_bytes(facts.disk_free_bytes)} ({100 * used:.0f} % used)",
        "up": describe_age(now_unix_s - facts.started_unix_s),
        "sessions": f"{facts.sessions:,}",
        "validator": ("connected" if is_there else "gone") if status["validator_expected"] else "none wanted",
        "heartbeat": describe_age(max(ages)) if ages else UNKNOWN,
        "events": f"{facts.journal_events:,}",
    }


def describe_leases(facts: CoordinatorFacts, names: Mapping[str, str]) -> list[Row]:
    return [
        row(
            f"{lease.lease_id}",
            linked(names.get(lease.peer) or lease.peer[-8:], peer_path(lease.peer)),
            lease.status,
            f"{lease.age_s:.1f} s",
            describe_span(lease.expires_in_s) if lease.expires_in_s > 0.0 else "due",
        )
        for lease in sorted(facts.leases, key=lambda lease: lease.expires_in_s)
    ]


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1000 * seconds, ",.1f", " ms")
