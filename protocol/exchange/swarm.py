"""One blob from several sources at once, piece by piece, each piece checked as it arrives.

The first `parallel` sources of the caller's order are drawn from at a time; the others stand in for those that fail. A
source is asked for a run of pieces, and what it does not deliver is asked from another. When nothing is left to ask
for, the last pieces under way are asked for once more, so that no slow source can keep them.

Invariants: a wrong piece is blamed on its sender and on nobody else, and that source is not asked again for this blob;
a source is asked for one run at a time, of which one piece is in memory; on every way out no task is left.

It does not find sources or put them in order.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from heapq import heappop, heappush

from protocol.errors import NotYetError, TransferError
from protocol.exchange.piece_writer import PieceWriter
from protocol.exchange.source import WRONG_CONTENT, OnFailure, Patience, Repeats, Source, pull
from protocol.exchange.throttle import Throttle

MAX_RUN_PIECES = 16  # 4 MiB: the time that it takes to ask hardly counts
MAX_ASKED = 2  # sources that are asked for the same piece


class Swarm:
    """The sources of one blob at work."""

    def __init__(
        self,
        writer: PieceWriter,
        blob_hash: str,
        sources: Sequence[Source],
        *,
        parallel: int,
        patience: Patience,
        throttle: Throttle,
        on_failure: OnFailure,
    ) -> None:
        self._writer = writer
        self._blob_hash = blob_hash
        self._sources = list({source.name: source for source in sources}.values())
        self._window = max(1, min(parallel, len(self._sources)))
        self._patience = patience
        self._throttle = throttle
        self._on_failure = on_failure
        self._free = writer.missing  # a heap: pieces that nobody has been asked for
        self._num_asked: Counter[int] = Counter()  # by piece
        self._tasks: dict[str, asyncio.Task[str]] = {}  # by source
        self._runs: dict[str, _Run] = {}  # by source
        self._slow: set[str] = set()
        self._changed = asyncio.Event()  # never stays set: it wakes whoever waits at that moment

    async def run(self) -> bool:
        """True once every piece is here, False when no source is left. Raises DiskFullError."""
        try:
            while not self._writer.is_complete:
                self._engage()
                if not self._tasks:
                    return False
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._patience.stall_timeout_s / 2):
                        await self._changed.wait()
                self._dismiss()
                self._widen()
            return True
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _engage(self) -> None:
        for source in self._sources[: self._window]:
            if source.name not in self._tasks:
                task = asyncio.create_task(self._draw(source))
                task.add_done_callback(lambda _: self._notify())
                self._tasks[source.name] = task

    def _dismiss(self) -> None:
        """Drop the sources that have failed."""
        for name in [name for name, task in self._tasks.items() if task.done()]:
            reason = self._tasks.pop(name).result()
            failed = next(source for source in self._sources if source.name == name)
            self._sources = [source for source in self._sources if source.name != name]
            self._on_failure(failed, reason)

    def _widen(self) -> None:
        """A source that takes too long over one piece, though it sends, gets help from the next in order."""
        now_s = asyncio.get_running_loop().time()
        for name, run in self._runs.items():
            if name not in self._slow and now_s - run.piece_since_s > self._patience.stall_timeout_s:
                self._slow.add(name)
                self._window += 1

    def _notify(self) -> None:
        self._changed.set()
        self._changed.clear()

    async def _draw(self, source: Source) -> str:
        """Draw run after run from one source until it fails; the reason."""
        repeats = Repeats(self._patience)
        while True:
            pieces = self._claim()
            if not pieces:
                await self._changed.wait()  # until a run of another source ends
                continue
            run = self._runs[source.name] = _Run(self._writer, pieces, source.name)
            try:
                await pull(source, self._blob_hash, self._writer.size_bytes, run, self._patience, self._throttle)
            except NotYetError as error:
                self._release(source.name, pieces)
                if run.num_delivered:
                    repeats.start()
                if not await repeats.pause(error):
                    return error.reason
            except TransferError as error:
                self._release(source.name, pieces)
                return error.reason
            else:
                self._release(source.name, pieces)
                repeats.start()

    def _claim(self) -> range:
        """The next pieces to ask one source for, which follow each other; empty when there is nothing to do."""
        if not self._free:
            return self._claim_again()
        first = heappop(self._free)
        most = MAX_RUN_PIECES if self._window == 1 else max(1, len(self._free) // (2 * self._window))
        stop = first + 1
        while self._free and self._free[0] == stop and stop - first < min(most, MAX_RUN_PIECES):
            heappop(self._free)
            stop += 1
        self._num_asked.update(range(first, stop))
        return range(first, stop)

    def _claim_again(self) -> range:
        """The last piece of the run with most still to come, to be asked for a second time."""
        left = [
            [number for number in run.pieces if not self._writer.has(number) and self._num_asked[number] < MAX_ASKED]
            for run in self._runs.values()
        ]
        longest = max(left, key=len, default=[])
        if not longest:
            return range(0)
        self._num_asked[longest[-1]] += 1
        return range(longest[-1], longest[-1] + 1)

    def _release(self, name: str, pieces: range) -> None:
        """A run has ended, one way or another: what it did not bring is free again."""
        del self._runs[name]
        self._num_asked.subtract(pieces)
        for number in pieces:
            if not self._writer.has(number) and not self._num_asked[number]:
                heappush(self._free, number)
        self._notify()


class _Run:
    """What one source is asked for: a Target that checks each piece and puts it in its place.

    It ends where a piece has come from elsewhere meanwhile.
    """

    def __init__(self, writer: PieceWriter, pieces: range, source: str) -> None:
        self.pieces = pieces
        self.num_delivered = 0
        self.piece_since_s = asyncio.get_running_loop().time()
        self._writer = writer
        self._source = source
        self._number = pieces.start
        self._stop = pieces.stop
        self._piece = bytearray()

    @property
    def offset(self) -> int:
        return self._writer.index.start_of(self._number) + len(self._piece)

    @property
    def end(self) -> int:
        return self._writer.index.start_of(self._stop)

    def write(self, chunk: bytes | memoryview) -> None:
        """Raises TransferError at a wrong piece. What comes beyond the end is dropped."""
        rest = memoryview(chunk)
        while rest and self._number < self._stop:
            taken = rest[: self._writer.index.start_of(self._number + 1) - self.offset]
            self._piece += taken
            rest = rest[len(taken) :]
            if self.offset == self._writer.index.start_of(self._number + 1):
                self._finish_piece()

    def _finish_piece(self) -> None:
        if not self._writer.write(self._number, self._piece):
            raise TransferError(self._source, WRONG_CONTENT)
        self._piece.clear()
        self._number += 1
        self.num_delivered += 1
        self.piece_since_s = asyncio.get_running_loop().time()
        if self._number < self._stop and self._writer.has(self._number):
            self._stop = self._number
