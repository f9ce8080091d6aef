"""`/`: is the run healthy, does it learn, who works."""

from coordinator.dashboard.charts import LossChart
from coordinator.dashboard.controls import RunControls
from coordinator.dashboard.data_table import Column, DataTable, linked, row
from coordinator.dashboard.elements import Facts, box, count, link, peer_path, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.pages.loss import Legend
from coordinator.dashboard.pages.rounds import read_current
from coordinator.dashboard.peer_table import describe_activity, describe_state, shown_name
from coordinator.dashboard.snapshot import Snapshot
from coordinator.dashboard.waterfall import WaterfallView

MAX_PEERS = 12
COLUMNS = (Column("Name"), Column("State", "wide stacked"), Column("Tokens", "number"))


async def build(frame: Frame, viewer: Viewer) -> None:
    frame.heading.classes("visually-hidden")
    history = viewer.board.history
    with box("div", "columns"):
        with section("loss", "Loss"):
            legend = Legend()
            chart = LossChart(can_be_saved=False)
            link("More on the loss", "/loss", "more")
        with section("round", "Round"):
            waterfall = WaterfallView("round", with_numbers=False)
            link("All rounds", "/rounds", "more")
    with section("peers", "Peers"):
        facts = Facts({"connected": "Connected workers", "paused": "Paused", "lost": "Gone", "refused": "Refused work"})
        table = DataTable(
            COLUMNS, labelledby="peers", empty="Nobody is connected. The Join page has what a volunteer needs."
        )
        more = text("p", "", "muted")
        link("All peers", "/peers", "more")
    if viewer.is_operator():
        RunControls(viewer)

    async def show(snapshot: Snapshot) -> None:
        legend.show(snapshot)
        chart.show(history.train.points, history.held_out.points)
        waterfall.show(await read_current(viewer.board), snapshot.now_unix_s)
        workers = [peer for peer in snapshot.status["peers"] if peer["role"] == "worker"]
        there = [peer for peer in workers if peer["connected"]]
        facts.show(
            connected=f"{len(there):,}",
            paused=f"{sum(bool(peer['pause_reason']) for peer in there):,}",
            lost=f"{len(workers) - len(there):,}",
            refused=f"{sum(peer['refused'] for peer in workers):,}",
        )
        shown = sorted(there, key=lambda peer: -peer["credited_tokens"])[:MAX_PEERS]
        table.show(
            [
                row(
                    peer["peer"],
                    linked(shown_name(peer), peer_path(peer["peer"])),
                    {"text": describe_state(peer), "sub": describe_activity(peer)},
                    f"{peer['credited_tokens']:,}",
                )
                for peer in shown
            ]
        )
        hidden = len(there) - len(shown)
        more.text = f"and {count(hidden, 'more worker')}" if hidden else ""

    viewer.updaters.append(show)
