"""A rate limit that many transfers share."""

import asyncio

from protocol.exchange.piece_index import PIECE_BYTES


class Throttle:
    """Spaces out chunks so that together they stay under `max_bps` bits a second; None: no limit.

    First come, first served. Whoever stops waiting gives its turn back.
    """

    def __init__(self, max_bps: float | None) -> None:
        self._free_at_s = 0.0
        self.limit(max_bps)

    def limit(self, max_bps: float | None) -> None:
        """Another rate, for those who begin to wait from now on."""
        if max_bps is not None and max_bps <= 0:
            raise ValueError("a rate limit is above 0 bit/s")
        self._max_bps = max_bps
        quarter_second_bytes = PIECE_BYTES if max_bps is None else int(max_bps / 32)
        self.chunk_bytes = min(PIECE_BYTES, max(4096, quarter_second_bytes))  # what to ask for at a time

    async def wait(self, num_bytes: int) -> None:
        """Return when `num_bytes` may pass."""
        if self._max_bps is None:
            return
        now_s = asyncio.get_running_loop().time()
        start_s = max(now_s, self._free_at_s)
        taken_s = 8 * num_bytes / self._max_bps
        self._free_at_s = start_s + taken_s
        try:
            await asyncio.sleep(start_s - now_s)
        except asyncio.CancelledError:
            self._free_at_s -= taken_s
            raise
