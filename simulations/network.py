"""Transfers that share links: a fluid model under the virtual clock.

Nodes have an uplink and a downlink. A flow's rate is its share of both, at most what one TCP stream carries; what a
flow cannot use goes to the others on its link. Rates change when a flow starts, ends or is cut, all flows at once, as
arrays. Flows that start within SETTLE_S of each other are taken together.

What a whole round fetches at once is not made of flows; see simulations.virtual.broadcast.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.virtual.clock import Clock

SETTLE_S = 0.005
DONE_BITS = 1e-3
PASSES = 3  # of handing on what a flow cannot use
Floats = NDArray[np.float64]


class Network:
    """Flows between nodes; `up_bps` and `down_bps` by node, in bits a second, `stream_bps` the limit of one stream."""

    def __init__(self, clock: Clock, up_bps: Floats, down_bps: Floats, stream_bps: Floats) -> None:
        self._clock = clock
        self._up, self._down, self._stream = up_bps.copy(), down_bps.copy(), stream_bps
        self._factor = np.ones(len(up_bps))
        self._ids: list[int] = []
        self._done: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self._src = np.zeros(0, np.int64)
        self._dst = np.zeros(0, np.int64)
        self._left = np.zeros(0)
        self._most = np.zeros(0)
        self._rate = np.zeros(0)
        self._since_s = 0.0
        self._next_id = 0
        self._wake_s = float("inf")  # the one entry on the clock that counts
        self._new: list[tuple[int, int, int, float, float]] = []  # (id, src, dst, bits, limit) since the last settling
        self._cancelled: set[int] = set()

    def start(
        self, src: int, dst: int, size_bytes: float, call: Callable[..., object], *args: Any, streams: int = 1
    ) -> int:
        """Send so many bytes; `call(*args)` when the last one is there. Returns the flow's id."""
        self._next_id += 1
        self._done[self._next_id] = (call, args)
        most = streams * min(float(self._stream[src]), float(self._stream[dst]))
        self._new.append((self._next_id, src, dst, 8.0 * size_bytes, most))
        self._wake(self._clock.now_s + SETTLE_S)
        return self._next_id

    def cancel(self, flow: int) -> None:
        """Stop a flow, if it is under way; nobody is called."""
        if self._done.pop(flow, None) is not None:
            self._cancelled.add(flow)
            self._wake(self._clock.now_s + SETTLE_S)

    def scale(self, node: int, factor: float) -> None:
        """Multiply a node's bandwidths from now on."""
        self._factor[node] *= factor
        self._wake(self._clock.now_s + SETTLE_S)

    def bandwidth(self, nodes: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Up and down of these nodes, in bits a second."""
        return self._up[nodes] * self._factor[nodes], self._down[nodes] * self._factor[nodes]

    def _wake(self, when_s: float) -> None:
        if when_s < self._wake_s:
            self._wake_s = when_s
            self._clock.at(when_s, self._settle, when_s)

    def _settle(self, when_s: float) -> None:
        """Bring every flow up to now, call back those that are done, and give the others their rates."""
        if when_s != self._wake_s:
            return  # an earlier entry has replaced this one
        self._wake_s = float("inf")
        now_s = self._clock.now_s
        self._left -= self._rate * (now_s - self._since_s)
        self._since_s = now_s
        done = self._left <= DONE_BITS
        finished = [self._ids[index] for index in np.flatnonzero(done)]
        keep = ~done
        if self._cancelled:
            keep &= np.array([flow not in self._cancelled for flow in self._ids], bool)
        self._take_in(keep)
        self._share()
        for flow in finished:
            callback = self._done.pop(flow, None)
            if callback is not None:
                callback[0](*callback[1])

    def _take_in(self, keep: NDArray[np.bool_]) -> None:
        new = [flow for flow in self._new if flow[0] not in self._cancelled]
        if not keep.all():
            self._ids = [self._ids[index] for index in np.flatnonzero(keep)]
        self._ids += [flow[0] for flow in new]
        self._src = np.concatenate([self._src[keep], np.array([flow[1] for flow in new], np.int64)])
        self._dst = np.concatenate([self._dst[keep], np.array([flow[2] for flow in new], np.int64)])
        self._left = np.concatenate([self._left[keep], np.array([flow[3] for flow in new], np.float64)])
        self._most = np.concatenate([self._most[keep], np.array([flow[4] for flow in new], np.float64)])
        self._new, self._cancelled = [], set()

    def _share(self) -> None:
        src, dst = self._src, self._dst
        if not len(src):
            self._rate = np.zeros(0)
            return
        up, down = self._up * self._factor, self._down * self._factor
        most = self._most
        rate = np.zeros(len(src))
        for _ in range(PASSES):
            free_up = np.maximum(up - np.bincount(src, rate, len(up)), 0.0)
            free_down = np.maximum(down - np.bincount(dst, rate, len(down)), 0.0)
            grows = (rate < most) & (free_up[src] > 1.0) & (free_down[dst] > 1.0)
            num_up = np.maximum(np.bincount(src, grows, len(up)), 1.0)
            num_down = np.maximum(np.bincount(dst, grows, len(down)), 1.0)
            more = np.minimum(free_up[src] / num_up[src], free_down[dst] / num_down[dst])
            rate += np.where(grows, np.minimum(more, most - rate), 0.0)
        self._rate = np.maximum(rate, 1.0)
        self._wake(self._clock.now_s + float(np.min(self._left / self._rate)) + 1e-6)
