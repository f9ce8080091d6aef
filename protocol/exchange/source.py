"""What a source of blobs is, and how bytes are taken from one: under watch, so that none can hold a fetch up.

A source is whatever can write a range of a blob into a sink: a peer, the coordinator, a test. The sink decides where
the bytes go and when it has enough; it slows the source down when downloads are limited, and that time is not held
against the source.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protocol.errors import DiskFullError, ManyhandsError, NotYetError, TransferError
from protocol.exchange.throttle import Throttle

WRONG_CONTENT = "sent content with another hash"
UNLIMITED = Throttle(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a source is waited for.

    One that sends less in `stall_timeout_s` than `min_bytes_per_s` would make is given up. So is one that has answered
    "not yet" (NotYetError) since `absent_s`; or since `coming_s`, when it said that it is fetching the blob itself.
    """

    stall_timeout_s: float = 20.0
    min_bytes_per_s: float = 1024.0
    absent_s: float = 0.0
    coming_s: float = 30.0


PATIENCE = Patience()
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 0.4  # between two tries with a source that says "not yet"


class BlobSink(Protocol):
    """Where a source puts the bytes of a blob, in order: those from `offset` on, up to `end`."""

    @property
    def offset(self) -> int: ...

    @property
    def end(self) -> int:
        """May come down while bytes arrive, when some of them have come from elsewhere."""

    async def write(self, chunk: bytes | memoryview) -> None: ...


class Target(Protocol):
    """What is behind a sink."""

    @property
    def offset(self) -> int: ...

    @property
    def end(self) -> int: ...

    def write(self, chunk: bytes | memoryview) -> None: ...


class Source(Protocol):
    """One place that may have a blob."""

    @property
    def name(self) -> str:
        """The same for the same peer: failures are counted under it."""

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        """Write the bytes from `sink.offset` to `sink.end` of a blob of `size_bytes`.

        Raises NotYetError when it may be asked again, else TransferError; any ManyhandsError but DiskFullError counts
        as this source's failure. What the sink raises is passed on.
        """


OnFailure = Callable[[Source, str], None]


async def pull(
    source: Source, blob_hash: str, size_bytes: int, target: Target, patience: Patience, throttle: Throttle
) -> None:
    """Let the source write until the target has enough.

    Raises TransferError with the reason when the source fails, stalls or stops early; DiskFullError.
    """
    try:
        async with asyncio.timeout(patience.stall_timeout_s) as deadline:
            if target.offset < target.end or target.end == 0:  # an empty blob is asked for too
                sink = _WatchedSink(target, deadline, patience, throttle)
                await source.fetch(blob_hash, size_bytes, sink)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        if target.offset < target.end:
            reason = f"stalled at byte {target.offset} of {size_bytes} for {patience.stall_timeout_s:g} s"
            raise TransferError(source.name, reason) from error
    except (DiskFullError, TransferError):
        raise
    except ManyhandsError as error:
        raise TransferError(source.name, str(error)) from error
    if target.offset < target.end:
        raise TransferError(source.name, f"ended after {target.offset} of {size_bytes} bytes")


class Repeats:
    """Whether and when a source that says "not yet" is asked again. Made when a fetch begins."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.start()

    def start(self) -> None:
        """The source has delivered something: its time begins anew."""
        self._since_s = asyncio.get_running_loop().time()
        self._pause_s = FIRST_PAUSE_S

    async def pause(self, error: NotYetError) -> bool:
        """Wait until it is asked again; False, at once, when its time is over."""
        most_s = self._patience.coming_s if error.coming else self._patience.absent_s
        if asyncio.get_running_loop().time() - self._since_s >= most_s:
            return False
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return True


class _WatchedSink:
    """Hands chunks to the target, moves the deadline each time that enough have come, and keeps to the rate limit."""

    def __init__(self, target: Target, deadline: asyncio.Timeout, patience: Patience, throttle: Throttle) -> None:
        self._target = target
        self._deadline = deadline
        self._throttle = throttle
        self._stall_timeout_s = patience.stall_timeout_s
        self._step_bytes = max(1, int(patience.stall_timeout_s * patience.min_bytes_per_s))
        self._expected_offset = self._next_offset()

    @property
    def offset(self) -> int:
        return self._target.offset

    @property
    def end(self) -> int:
        return self._target.end

    async def write(self, chunk: bytes | memoryview) -> None:
        self._target.write(chunk)
        loop = asyncio.get_running_loop()
        rest_s = (self._deadline.when() or 0.0) - loop.time()
        if self._target.offset >= self._expected_offset:
            rest_s = self._stall_timeout_s
            self._expected_offset = self._next_offset()
        if self._deadline.expired():
            return
        self._deadline.reschedule(None)
        await self._throttle.wait(len(chunk))
        self._deadline.reschedule(loop.time() + rest_s)

    def _next_offset(self) -> int:
        return min(self._target.offset + self._step_bytes, self._target.end)
