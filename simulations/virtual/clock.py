"""The virtual clock: what happens when. Entries at the same moment come in the order in which they were put in."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """`now_s` moves only by `pop`. Everything here can be pickled: a callback is a bound method."""

    __slots__ = ("_count", "_heap", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when_s: float, call: Callable[..., object], *args: Any) -> None:
        """Call `call(*args)` at `when_s`, or now when that is past."""
        self._count += 1
        heappush(self._heap, (max(float(when_s), self.now_s), self._count, call, args))

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        self.at(self.now_s + delay_s, call, *args)

    @property
    def next_s(self) -> float:
        """When the next entry is due; infinity when there is none."""
        return self._heap[0][0] if self._heap else float("inf")

    def pop(self) -> None:
        """Move to the next entry and carry it out."""
        self.now_s, _, call, args = heappop(self._heap)
        call(*args)
