"""`/loss`: train and held-out loss against tokens or time, what happened on the way, and an earlier run beside it."""

from collections.abc import Sequence
from typing import Any

from nicegui import ui

from coordinator.dashboard.board import Board
from coordinator.dashboard.charts import LossChart, Points
from coordinator.dashboard.data_table import Column, DataTable, Row, linked, row
from coordinator.dashboard.elements import Facts, box, number, peer_path, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.snapshot import Snapshot, describe_age
from coordinator.records.reader import read_markers
from coordinator.records.runs import read_earlier_run, read_earlier_runs
from coordinator.records.views import Curves, Marker

MAX_MARKS = 40
MAX_LISTED = 30
NO_RUN = "no other run"
COLUMNS = (Column("When"), Column("Round", "number"), Column("What"), Column("Words", "wide"))


class Legend:
    """The curves' names with their last values."""

    def __init__(self) -> None:
        with box("p", "legend"):
            self._values = {}
            for words, name in (("Train ", "train_loss"), ("Held-out ", "held_out_loss")):
                with box("span", name):
                    text("span", words)
                    self._values[name] = text("strong", "")

    def show(self, snapshot: Snapshot) -> None:
        for name, label in self._values.items():
            label.text = getattr(snapshot, name)


class LossPage:
    """The chart, its switches, and what its marks mean."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._earlier: Curves | None = None
        with section("loss", "Train and held-out"):
            self._legend = Legend()
            self._build_switches()
            with box("div", "tall"):
                self._chart = LossChart()
        with section("summary", "In numbers"):
            self._facts = Facts(
                {"first": "First held-out", "last": "Last held-out", "lowest": "Lowest train", "points": "Evaluations"}
            )
        with section("marks", "What happened"):
            self._table = DataTable(
                COLUMNS, labelledby="marks", empty="Nothing yet: joins, losses, bans and codec changes are marked here."
            )

    def _build_switches(self) -> None:
        with box("p", "buttons form"):
            against = ui.toggle({False: "Against tokens", True: "Against time"}, value=False)
            against.props("no-caps unelevated dense aria-label=Axis")
            against.on_value_change(lambda event: self._set_axis(bool(event.value)))
            self._marks = ui.checkbox("Marks", value=True).props("dense")
            self._marks.on_value_change(lambda _: self._viewer.refresh())
            self._select = ui.select([NO_RUN], value=NO_RUN, label="Compare with")
            self._select.props("outlined dense options-dense").classes("compare")
            self._select.on_value_change(lambda event: self._compare(str(event.value)))

    async def find_earlier_runs(self) -> None:
        """Offer the runs that lie beside this one."""
        board = self._viewer.board
        runs = await board.share(read_earlier_runs, board.server.folder.path, every_s=60.0)
        self._select.set_options([NO_RUN, *(run.folder for run in runs)])
        self._select.set_visibility(bool(runs))

    async def _set_axis(self, by_time: bool) -> None:
        self._chart.by_time = by_time
        await self._viewer.refresh()

    async def _compare(self, folder: str) -> None:
        board = self._viewer.board
        known = [run.folder for run in await board.share(read_earlier_runs, board.server.folder.path, every_s=60.0)]
        self._earlier = None
        if folder in known:  # a browser may send anything
            place = board.server.folder.path.resolve().parent / folder
            self._earlier = await board.share(read_earlier_run, place, every_s=60.0)
        await self._viewer.refresh()

    async def show(self, snapshot: Snapshot) -> None:
        board, by_time = self._viewer.board, self._chart.by_time
        history = board.history
        markers = await board.share(read_markers, board.server.database.readers)
        train, held_out = (
            (history.train_by_time, history.held_out_by_time) if by_time else (history.train, history.held_out)
        )
        marks = mark(markers, board, by_time=by_time) if self._marks.value else []
        self._legend.show(snapshot)
        self._chart.show(train.points, held_out.points, marks, earlier_points(self._earlier, by_time=by_time))
        lowest = min((y for _, y in history.train.points), default=None)
        first = snapshot.status["first_held_out_loss"]
        self._facts.show(
            first=number(first, ".3f"),
            last=snapshot.held_out_loss,
            lowest=number(lowest, ".3f"),
            points=f"{history.evaluations:,}",
        )
        self._table.show([describe_marker(one, snapshot.now_unix_s) for one in markers[: -MAX_LISTED - 1 : -1]])


def mark(markers: Sequence[Marker], board: Board, *, by_time: bool) -> list[tuple[float, str]]:
    """The newest marks, where they stand on the axis."""
    newest = markers[-MAX_MARKS:]
    if not by_time:
        return [(marker.tokens, marker.words) for marker in newest]
    first = board.history.first_unix_s
    if first is None:
        return []
    return [((marker.unix_s - first) / 3600, marker.words) for marker in newest if marker.unix_s >= first]


def earlier_points(curves: Curves | None, *, by_time: bool) -> list[Points]:
    """Another run's curves on the same axis."""
    if curves is None:
        return []
    return [
        [(one.elapsed_s / 3600 if by_time else one.tokens, one.loss) for one in curve]
        for curve in (curves.train, curves.held_out)
    ]


def describe_marker(marker: Marker, now_unix_s: float) -> Row:
    words: Any = linked(marker.words, peer_path(marker.peer)) if marker.peer else marker.words
    key = f"{marker.unix_s}{marker.kind}{marker.peer}"
    return row(key, describe_age(now_unix_s - marker.unix_s), f"{marker.round:,}", marker.kind, words)


async def build(_: Frame, viewer: Viewer) -> None:
    page = LossPage(viewer)
    await page.find_earlier_runs()
    viewer.updaters.append(page.show)
