"""`/rounds`: a round as a waterfall; the newest, or any that is on record."""

from nicegui import ui

from coordinator.dashboard.board import Board
from coordinator.dashboard.charts import BLUE, GREY, Chart, axis, line, options
from coordinator.dashboard.controls import tell
from coordinator.dashboard.elements import box, button, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.snapshot import Snapshot
from coordinator.dashboard.waterfall import WaterfallView
from coordinator.records.reader import read_waterfall
from coordinator.records.views import Waterfall

RECENT = 200


async def read_current(board: Board) -> Waterfall | None:
    """The open round, or between two rounds the newest that was settled."""
    return board.server.engine.recorder.open_round() or await board.share(
        read_waterfall, board.server.database.readers, every_s=1.0
    )


class RoundsPage:
    """`round_`: the round that is looked at; None: whichever is the newest."""

    def __init__(self, viewer: Viewer, round_: int | None) -> None:
        self._viewer = viewer
        self._round = round_
        self._waterfall: Waterfall | None = None
        with section("round", "Round") as self._heading:
            with box("p", "buttons form"):
                self._earlier = button("Earlier").on("click", lambda: self._step(-1))
                self._later = button("Later").on("click", lambda: self._step(1))
                button("Newest").on("click", lambda: self._look_at(None))
                self._number = ui.number("Round", min=0, step=1).props("outlined dense").classes("short")
                button("Show").on("click", self._show_number)
                self._mode = text("span", "", "muted").props("role=status")
            self._view = WaterfallView("round")
        with section("durations", "How long rounds took"):
            text("p", f"Seconds from a round's opening to its merge, the last {RECENT} rounds.", "muted")
            series = [line("seconds", BLUE, step="end"), line("contributions", GREY, step="end", yAxisIndex=1)]
            y = axis("", min=0)
            chart_options = options(axis("round", min="dataMin", max="dataMax"), y, series)
            chart_options["yAxis"] = [y, axis("", min=0, position="right", splitLine={"show": False}, minInterval=1)]
            with box("p", "legend"):
                text("span", "seconds (left)", "compute")
                text("span", "contributions (right)", "grey")
            self._durations = Chart("round-durations", "Duration and contributions by round", chart_options)

    async def show(self, snapshot: Snapshot) -> None:
        board = self._viewer.board
        engine = board.server.database.readers
        if self._round is None:
            self._waterfall = await read_current(board)
        else:
            self._waterfall = await board.share(read_waterfall, engine, self._round, every_s=5.0)
        self._heading.text = f"Round {self._waterfall.round:,}" if self._waterfall else "Round"
        self._mode.text = "The newest round, as it goes." if self._round is None else "Stays at this round."
        self._view.show(self._waterfall, snapshot.now_unix_s)
        rounds = await board.share(board.server.database.read_rounds, RECENT, every_s=2.0)
        seconds = [(row.round, round(row.seconds, 2)) for row in rounds]
        contributions = [(row.round, row.contributions) for row in rounds]
        self._durations.show(seconds, contributions, news=seconds)

    async def _step(self, by: int) -> None:
        if self._waterfall is not None:
            first, last = self._waterfall.first_round, self._waterfall.last_round
            await self._look_at(min(max(self._waterfall.round + by, first), last))

    async def _show_number(self) -> None:
        if self._number.value is None:
            tell("Give the round's number first.", failed=True)
        else:
            await self._look_at(int(self._number.value))

    async def _look_at(self, round_: int | None) -> None:
        board = self._viewer.board
        if round_ is not None and await board.share(read_waterfall, board.server.database.readers, round_) is None:
            tell(f"Round {round_:,} is not on record: it is still open, or its rows were thinned out.", failed=True)
            return
        self._round = round_
        await self._viewer.refresh()


async def build(_: Frame, viewer: Viewer, round_: int | None = None) -> None:
    viewer.updaters.append(RoundsPage(viewer, round_).show)
