"""`/peers/{peer}`: one peer's state, its credit over time, what became of its leases, and its receipts."""

from collections.abc import Sequence

from coordinator.dashboard.charts import BLUE, Chart, axis, line, options
from coordinator.dashboard.controls import act_on_peer
from coordinator.dashboard.data_table import Column, DataTable, Row, linked, row, titled
from coordinator.dashboard.elements import (
    UNKNOWN,
    Facts,
    box,
    button,
    describe_bytes,
    link,
    number,
    section,
    text,
)
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.peer_table import (
    describe_links,
    describe_reach,
    describe_software,
    describe_state,
    shown_name,
)
from coordinator.dashboard.receipts import ReceiptTable
from coordinator.dashboard.snapshot import Snapshot, describe_age
from coordinator.records.reader import read_peer, read_receipts
from coordinator.records.views import Bar, PeerHistory

MAX_LEASES, MAX_RECEIPTS = 20, 10
FACTS = {
    "state": "State",
    "doing": "Doing",
    "device": "Device",
    "version": "Version",
    "joined": "Joined",
    "heard": "Last heard",
    "reached": "Others reach it",
    "links": "Links",
    "speed": "Tokens/s",
    "optimizer": "Optimizer's part of a step",
    "behind": "Rounds behind",
    "tokens": "Credited tokens",
    "results": "Accepted, late, refused",
    "compute": "Compute credited",
}
LEASES = (
    Column("Round", "number"),
    Column("Leased"),
    Column("Result", "wide"),
    Column("Steps", "number"),
    Column("Tokens", "number"),
    Column("Compute", "number"),
    Column("Payload", "number"),
    Column("Codec"),
)


class PeerPage:
    """One peer, whether it is there or not."""

    def __init__(self, frame: Frame, viewer: Viewer, peer: str) -> None:
        self._frame, self._viewer, self._peer = frame, viewer, peer
        self._verbs = {}
        link("All peers", "/peers", "back")
        with section("now", "Now"):
            self._facts = Facts(FACTS, "facts")
            text("code", peer, "peer-id")
            if viewer.is_operator():
                with box("p", "buttons"):
                    for verb, words in (("approve", "Approve"), ("ban", "Ban"), ("unban", "Unban")):
                        self._verbs[verb] = button(words, "danger" if verb == "ban" else "")
                        self._verbs[verb].on("click", lambda verb=verb: act_on_peer(viewer, verb, peer))
        with section("credit", "Credit over time"):
            self._no_credit = text("p", "Nothing was accepted from it yet.", "empty")
            with box("div") as self._credit:
                x, y = axis("hours since its first accepted work", max="dataMax"), axis("", min=0)
                series = [line("tokens", BLUE, areaStyle={"opacity": 0.12})]
                self._chart = Chart("peer-credit", "Credited tokens over time", options(x, y, series))
        with section("leases", "Its last leases"):
            self._leases = DataTable(LEASES, labelledby="leases", empty="It had no lease yet that is on record.")
        with section("receipts", "Receipts"):
            self._receipts = ReceiptTable("receipts", with_peer=False)

    async def show(self, snapshot: Snapshot) -> None:
        board = self._viewer.board
        engine = board.server.database.readers
        history = await board.share(read_peer, engine, self._peer)
        known = next((one for one in snapshot.status["peers"] if one["peer"] == self._peer), None)
        if known is not None:
            self._frame.heading.text = shown_name(known)
            step_tokens = board.server.run.spec.step_tokens
            self._facts.show(**describe_now(known, step_tokens, snapshot.now_unix_s))
            self._show_verbs(banned=known["banned"], waiting=known["waiting_for_approval"], role=known["role"])
        self._show_history(history, snapshot.now_unix_s)
        self._receipts.show(await board.share(read_receipts, engine, self._peer, MAX_RECEIPTS), {}, snapshot.now_unix_s)

    def _show_history(self, history: PeerHistory | None, now_unix_s: float) -> None:
        points = []
        if history is not None:
            self._facts.show(
                results=f"{history.accepted:,}, {history.late:,}, {history.refused:,}",
                compute=f"{history.compute_s / 3600:,.2f} h",
            )
            first = history.credited[0].unix_s if history.credited else 0.0
            points = [(round((one.unix_s - first) / 3600, 4), one.tokens) for one in history.credited]
        leases: Sequence[Bar] = history.leases[:MAX_LEASES] if history else ()
        self._leases.show([describe_lease(bar, now_unix_s) for bar in leases])
        self._credit.set_visibility(bool(points))
        self._no_credit.set_visibility(not points)
        self._chart.show(points, news=points)

    def _show_verbs(self, *, banned: bool, waiting: bool, role: str) -> None:
        for verb, element in self._verbs.items():
            fits = {"approve": waiting and not banned, "ban": not banned, "unban": banned}[verb]
            element.set_visibility(fits and role == "worker")


def describe_now(peer: dict[str, object], step_tokens: int, now_unix_s: float) -> dict[str, str]:
    """The facts that the status knows."""
    joined, heard, speed = peer["joined_unix_s"], peer["heartbeat_age_s"], peer["steps_per_s"]
    lag = peer["lag_rounds"]
    return {
        "state": describe_state(peer),
        "doing": str(peer["activity"])[:60] or UNKNOWN,
        "device": str(peer["device"]) or UNKNOWN,
        "version": describe_software(peer),
        "joined": describe_age(now_unix_s - joined) if isinstance(joined, float) else UNKNOWN,
        "heard": describe_age(heard) if isinstance(heard, float) else UNKNOWN,
        "reached": describe_reach(peer),
        "links": describe_links(peer),
        "speed": f"{speed * step_tokens:,.0f}" if isinstance(speed, float) and speed else UNKNOWN,
        "optimizer": f"{peer['optimizer_share']:.0%}" if peer["optimizer_share"] else UNKNOWN,
        "behind": UNKNOWN if lag is None else f"{lag:,}",
        "tokens": f"{peer['credited_tokens']:,}",
    }


def describe_lease(bar: Bar, now_unix_s: float) -> Row:
    return row(
        str(bar.lease_id),
        linked(f"{bar.round:,}", f"/rounds?round={bar.round}"),
        describe_age(now_unix_s - bar.leased_unix_s),
        titled(f"{bar.result}: {bar.reason}" if bar.reason else bar.result, bar.reason, f"result-{bar.result}"),
        f"{bar.inner_steps:,}" if bar.inner_steps else UNKNOWN,
        f"{bar.tokens:,}" if bar.tokens else UNKNOWN,
        number(bar.compute_s, ".1f", " s"),
        describe_bytes(bar.payload_bytes) if bar.payload_bytes else UNKNOWN,
        bar.codec or UNKNOWN,
    )


async def build(frame: Frame, viewer: Viewer, peer: str) -> None:
    board = viewer.board
    known = any(one["peer"] == peer for one in viewer.snapshot.status["peers"])
    if not known and await board.share(read_peer, board.server.database.readers, peer[:64]) is None:
        frame.heading.text = "No such peer"
        text("p", "Nobody with this id ever joined this run.", "empty")
        link("All peers", "/peers")
        return
    viewer.updaters.append(PeerPage(frame, viewer, peer).show)
