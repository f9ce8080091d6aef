"""Get a blob from whoever has it, whatever the transport.

Invariants: only bytes with the right hash enter the store; what came is kept when a source breaks off, and the next
source goes on from there; a source is called a liar only when every byte came from it; no source can hold a fetch up by
silence or by a trickle. Cancelling leaves a partial file that can be resumed, and no task.

It does not rank sources (the caller orders them), remember failures beyond one call, or limit what is worth fetching.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from protocol.errors import DiskFullError, ManyhandsError, TransferError, UnavailableError, VerificationError
from protocol.exchange.store import BlobStore, BlobWriter

WRONG_CONTENT = "sent content with another hash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When to give a source up: `stall_timeout_s` in which it sent less than `min_bytes_per_s` would make."""

    stall_timeout_s: float = 20.0
    min_bytes_per_s: float = 1024.0


PATIENCE = Patience()


class BlobSink(Protocol):
    """Where a source puts the bytes of a blob, in order, from `offset` on."""

    @property
    def offset(self) -> int: ...

    def write(self, chunk: bytes | memoryview) -> None: ...


class Source(Protocol):
    """One place that may have a blob."""

    @property
    def name(self) -> str:
        """The same for the same peer: failures are counted under it."""

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        """Write the bytes from `sink.offset` to `size_bytes`.

        Raises TransferError; any ManyhandsError but DiskFullError counts as this source's failure.
        """


OnFailure = Callable[[Source, str], None]


async def fetch_blob(
    store: BlobStore,
    blob_hash: str,
    size_bytes: int,
    sources: Sequence[Source],
    *,
    patience: Patience = PATIENCE,
    on_failure: OnFailure | None = None,
) -> None:
    """Put the blob into `store`, trying `sources` in order; does nothing when it is there.

    `on_failure` is told of each source that failed and why (WRONG_CONTENT for a liar).

    Raises UnavailableError with all reasons when no source delivers, DiskFullError, VerificationError for a bad hash.
    """
    if store.has(blob_hash):
        return
    failures: list[tuple[str, str]] = []
    for source in sources:
        reason = await _fetch_from(source, store, blob_hash, size_bytes, patience)
        if reason is None:
            return
        failures.append((source.name, reason))
        if on_failure is not None:
            on_failure(source, reason)
    raise UnavailableError({blob_hash: tuple(failures)})


async def fetch_blobs(
    store: BlobStore,
    wanted: Sequence[tuple[str, int, Sequence[Source]]],
    *,
    concurrency: int = 4,
    patience: Patience = PATIENCE,
    on_failure: OnFailure | None = None,
) -> None:
    """Put all of `wanted`, each (hash, size in bytes, sources), into `store`, `concurrency` at a time.

    A source that failed for one blob is tried last for those that start later. A blob that is not to be had does not
    stop the others: UnavailableError, raised at the end, names all of them. Otherwise as `fetch_blob`.
    """
    if concurrency < 1:
        raise ValueError("concurrency is at least 1")
    times_failed: Counter[str] = Counter()
    failures: dict[str, tuple[tuple[str, str], ...]] = {}
    pending = iter({blob_hash: (size_bytes, sources) for blob_hash, size_bytes, sources in wanted}.items())

    def note_failure(source: Source, reason: str) -> None:
        times_failed[source.name] += 1
        if on_failure is not None:
            on_failure(source, reason)

    async def fetch_pending() -> None:
        for blob_hash, (size_bytes, sources) in pending:
            try:
                await fetch_blob(
                    store,
                    blob_hash,
                    size_bytes,
                    sorted(sources, key=lambda source: times_failed[source.name]),  # stable: else the caller's order
                    patience=patience,
                    on_failure=note_failure,
                )
            except UnavailableError as error:
                failures.update(error.failures)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(wanted))):
                group.create_task(fetch_pending())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    if failures:
        raise UnavailableError(failures)


async def _fetch_from(
    source: Source, store: BlobStore, blob_hash: str, size_bytes: int, patience: Patience
) -> str | None:
    """None when the blob is in the store, else why this source did not deliver it."""
    while True:
        writer = await _open_writer(store, blob_hash, size_bytes)
        with writer:
            alone = writer.offset == 0
            try:
                await _pull(source, writer, blob_hash, size_bytes, patience)
            except DiskFullError:
                raise
            except TransferError as error:
                return error.reason
            except ManyhandsError as error:
                return str(error)
            try:
                writer.commit()
            except VerificationError:
                if alone:
                    return WRONG_CONTENT
                # Bytes of several sources: which one lied cannot be told. They are gone now; all anew from this one.
            else:
                return None


async def _pull(source: Source, writer: BlobWriter, blob_hash: str, size_bytes: int, patience: Patience) -> None:
    """Let the source write until the blob is complete. Raises TransferError when it stalls or stops early."""
    try:
        async with asyncio.timeout(patience.stall_timeout_s) as deadline:
            sink = _WatchedSink(writer, size_bytes, deadline, patience)
            if writer.offset == 0 or writer.offset < size_bytes:
                await source.fetch(blob_hash, size_bytes, sink)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        if writer.offset != size_bytes:
            reason = f"stalled at byte {writer.offset} of {size_bytes} for {patience.stall_timeout_s:g} s"
            raise TransferError(source.name, reason) from error
    if writer.offset != size_bytes:
        raise TransferError(source.name, f"ended after {writer.offset} of {size_bytes} bytes")


class _WatchedSink:
    """Hands chunks to the writer, and moves the deadline each time that enough bytes have come."""

    def __init__(self, writer: BlobWriter, size_bytes: int, deadline: asyncio.Timeout, patience: Patience) -> None:
        self._writer = writer
        self._size_bytes = size_bytes
        self._deadline = deadline
        self._stall_timeout_s = patience.stall_timeout_s
        self._step_bytes = max(1, int(patience.stall_timeout_s * patience.min_bytes_per_s))
        self._expected_offset = self._next_offset()

    @property
    def offset(self) -> int:
        return self._writer.offset

    def write(self, chunk: bytes | memoryview) -> None:
        self._writer.write(chunk)
        if self._writer.offset >= self._expected_offset and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._stall_timeout_s)
            self._expected_offset = self._next_offset()

    def _next_offset(self) -> int:
        return min(self._writer.offset + self._step_bytes, self._size_bytes)


async def _open_writer(store: BlobStore, blob_hash: str, size_bytes: int) -> BlobWriter:
    """In a thread: a large partial blob takes seconds to hash again."""
    opening = asyncio.ensure_future(asyncio.to_thread(store.receive, blob_hash, size_bytes))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        with suppress(ManyhandsError, OSError), await opening:  # a thread cannot be stopped: wait, close what it opened
            pass
        raise
