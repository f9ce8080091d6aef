"""`/communication`: bytes for what was learnt, how the workers' time was spent, and which codec was chosen, and why."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from coordinator.dashboard.charts import BLUE, GREEN, GREY, ORANGE, Chart, axis, line, options
from coordinator.dashboard.data_table import Column, DataTable, row
from coordinator.dashboard.elements import Facts, box, describe_bytes, number, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.snapshot import Snapshot, describe_age
from coordinator.records.reader import read_communication
from coordinator.records.views import Communication, Split

MAX_PLANS = 30
COLUMNS = (Column("From round", "number"), Column("When"), Column("Chosen, and why", "wide"))
PARTS = (("compute", "compute", BLUE), ("exchange", "exchange", ORANGE), ("idle", "idle", GREY))
FACTS = {
    "sent": "Sent in all",
    "per_token": "Bytes a token",
    "compute": "Computing",
    "exchange": "Exchanging",
    "idle": "Idle",
    "error": "Compression error",
}


class CommunicationPage:
    """Totals, two charts by round, and the plan's changes."""

    def __init__(self) -> None:
        with section("totals", "In all"):
            self._facts = Facts(FACTS)
            self._plan = text("p", "", "muted")
        with section("bytes", "Bytes for each verified token"):
            self._no_bytes = text("p", "No round is merged yet.", "empty")
            with box("div") as self._bytes_box:
                x, y = axis("round", min="dataMin", max="dataMax"), axis("", min=0)
                series = [line("bytes a token", GREEN)]
                self._bytes = Chart("bytes-per-token", "Bytes for each verified token, by round", options(x, y, series))
        with section("split", "How the workers' time was spent"):
            self._no_split = text("p", "No round is merged yet.", "empty")
            with box("div") as self._split_box:
                with box("p", "legend"):
                    for words, name, _ in PARTS:
                        text("span", words, {"exchange": "send", "idle": "grey"}.get(name, name))
                stacked = {"stack": "time", "areaStyle": {"opacity": 0.5}, "lineStyle": {"width": 1}}
                parts = [line(words, color, **stacked) for words, _, color in PARTS]
                x, y = axis("round", min="dataMin", max="dataMax"), axis("", min=0, max=100)
                label = "Share of the workers' time that they computed, exchanged and waited, in per cent by round"
                self._split = Chart("time-split", label, options(x, y, parts))
        with section("plans", "Codec and inner steps"):
            self._plans = DataTable(COLUMNS, labelledby="plans", empty="No round was opened yet.")

    def show(self, communication: Communication, snapshot: Snapshot) -> None:
        splits = communication.splits
        spent = communication.compute_s + communication.exchange_s + communication.idle_s
        self._facts.show(
            sent=describe_bytes(communication.payload_bytes),
            per_token=number(communication.bytes_per_token, ".3g"),
            compute=share(communication.compute_s, spent),
            exchange=share(communication.exchange_s, spent),
            idle=share(communication.idle_s, spent),
            error=describe_error(snapshot.status["peers"]),
        )
        self._plan.text = f"Now: {snapshot.status['plan']}" if snapshot.status["plan"] else ""
        for empty, full in ((self._no_bytes, self._bytes_box), (self._no_split, self._split_box)):
            empty.set_visibility(not splits)
            full.set_visibility(bool(splits))
        self._bytes.show([(one.round, round(one.bytes_per_token, 4)) for one in splits], news=splits)
        self._split.show(*shares(splits), news=splits)
        now = snapshot.now_unix_s
        self._plans.show(
            [
                row(f"{plan.round}.{plan.unix_s}", f"{plan.round:,}", describe_age(now - plan.unix_s), plan.words)
                for plan in communication.plans[: -MAX_PLANS - 1 : -1]
            ]
        )


def describe_error(peers: Sequence[Mapping[str, Any]]) -> str:
    """The median of the workers' last payloads: the share of an update's norm that waits for a later one."""
    errors = [peer["compression_error"] for peer in peers if peer["compression_error"] is not None]
    return number(100 * median(errors) if errors else None, ".0f", " %")


def share(seconds: float, of_s: float) -> str:
    return number(100 * seconds / of_s if of_s > 0.0 else None, ".0f", " %")


def shares(splits: Sequence[Split]) -> list[list[tuple[int, float]]]:
    """Per cent of computing, exchanging and waiting, by round."""
    curves: list[list[tuple[int, float]]] = [[], [], []]
    for one in splits:
        spent = one.compute_s + one.exchange_s + one.idle_s
        if spent > 0.0:
            for curve, seconds in zip(curves, (one.compute_s, one.exchange_s, one.idle_s), strict=True):
                curve.append((one.round, round(100 * seconds / spent, 1)))
    return curves


async def build(_: Frame, viewer: Viewer) -> None:
    page = CommunicationPage()
    board = viewer.board

    async def show(snapshot: Snapshot) -> None:
        page.show(await board.share(read_communication, board.server.database.readers, every_s=3.0), snapshot)

    viewer.updaters.append(show)
