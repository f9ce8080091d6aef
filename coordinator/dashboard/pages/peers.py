"""`/peers`: everybody who takes part, found and sorted; the operator bans and approves here."""

from nicegui import ui

from coordinator.dashboard.controls import act_on_peer
from coordinator.dashboard.data_table import DataTable
from coordinator.dashboard.elements import box, button, count, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.peer_table import COLUMNS, OPERATORS_COLUMN, PAGE_ROWS, describe_row, select
from coordinator.dashboard.snapshot import Snapshot


class PeersPage:
    """A slice of the peers, as this viewer sorts and filters them."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._for_operator = viewer.is_operator()
        self._step_tokens = viewer.board.server.run.spec.step_tokens
        self._sorted_by, self._descending = "tokens", True
        self._first = 0
        with box("div") as self._waiting_box, section("waiting", "Waiting for the operator"):
            self._waiting = self._make_table("waiting", "Nobody waits.")
        with section("peers", "Peers") as self._heading:
            with box("p", "buttons form"):
                self._words = ui.input("Name, device or id").props("outlined dense clearable debounce=300")
                self._words.on_value_change(lambda _: self._turn_to(0))
                self._everybody = ui.checkbox("Also who has left").props("dense")
                self._everybody.on_value_change(lambda _: self._turn_to(0))
            self._table = self._make_table(
                "peers", "Nobody fits. Without a filter and with who has left there may be more."
            )
            self._table.mark_sorting(self._sorted_by, descending=self._descending)
            with box("p", "buttons") as self._pager:
                button("Before").on("click", lambda: self._turn_to(self._first - PAGE_ROWS))
                button("Next").on("click", lambda: self._turn_to(self._first + PAGE_ROWS))
                self._place = text("span", "", "muted").props("role=status")

    def _make_table(self, name: str, empty: str) -> DataTable:
        columns = (*COLUMNS, OPERATORS_COLUMN) if self._for_operator else COLUMNS
        return DataTable(columns, labelledby=name, empty=empty, on_act=self._act, on_sort=self._sort)

    async def show(self, snapshot: Snapshot) -> None:
        peers = snapshot.status["peers"]
        chosen, waiting = select(
            peers,
            words=self._words.value or "",
            everybody=bool(self._everybody.value),
            sorted_by=self._sorted_by,
            descending=self._descending,
        )
        self._first = max(0, min(self._first, (len(chosen) - 1) // PAGE_ROWS * PAGE_ROWS))
        shown = chosen[self._first : self._first + PAGE_ROWS]
        self._table.show([describe_row(peer, self._step_tokens, for_operator=self._for_operator) for peer in shown])
        self._waiting.show(
            [describe_row(peer, self._step_tokens, for_operator=self._for_operator) for peer in waiting[:PAGE_ROWS]]
        )
        self._waiting_box.set_visibility(bool(waiting))
        self._heading.text = f"{count(sum(peer['connected'] for peer in peers), 'peer')} of {len(peers):,} connected"
        self._pager.set_visibility(len(chosen) > PAGE_ROWS)
        self._place.text = f"{self._first + 1:,} to {self._first + len(shown):,} of {len(chosen):,}"

    async def _turn_to(self, first: int) -> None:
        self._first = max(0, first)
        await self._viewer.refresh()

    async def _sort(self, key: str) -> None:
        self._descending = not self._descending if key == self._sorted_by else key not in ("name", "state", "device")
        self._sorted_by = key if any(column.key == key and column.sortable for column in COLUMNS) else "tokens"
        self._table.mark_sorting(self._sorted_by, descending=self._descending)
        await self._turn_to(0)

    async def _act(self, verb: str, peer: str) -> None:
        await act_on_peer(self._viewer, verb, peer)


async def build(_: Frame, viewer: Viewer) -> None:
    viewer.updaters.append(PeersPage(viewer).show)
