"""Get a blob from whoever has it, whatever the transport.

With a piece index the blob comes in pieces from several sources at once (protocol.exchange.swarm); without one, from
one source after the other, each going on where the last one broke off.

Invariants: only bytes with the right hash enter the store; what came is kept when a fetch breaks off, and the next one
goes on from there; a source is called a liar only when the wrong bytes are its own; no source can hold a fetch up by
silence or by a trickle. Cancelling leaves a partial file that can be resumed, and no task.

It does not rank sources (the caller orders them), remember failures beyond one call, or limit what is worth fetching.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from protocol.errors import ManyhandsError, NotYetError, TransferError, UnavailableError, VerificationError
from protocol.exchange.piece_index import PieceIndex, has_index, index_bytes
from protocol.exchange.piece_writer import PieceWriter
from protocol.exchange.source import PATIENCE, UNLIMITED, WRONG_CONTENT, OnFailure, Patience, Repeats, Source, pull
from protocol.exchange.store import BlobStore, BlobWriter
from protocol.exchange.swarm import Swarm
from protocol.exchange.throttle import Throttle

PARALLEL = 3  # sources of one blob
CONCURRENCY = 4  # blobs
W = TypeVar("W", BlobWriter, PieceWriter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A blob to fetch. `sources` in the order of preference; `pieces_hash` names its piece index, if it has one."""

    blob_hash: str
    size_bytes: int
    sources: Sequence[Source]
    pieces_hash: str | None = None
    parallel: int = PARALLEL


async def fetch_blob(
    store: BlobStore,
    blob_hash: str,
    size_bytes: int,
    sources: Sequence[Source],
    *,
    pieces_hash: str | None = None,
    parallel: int = PARALLEL,
    patience: Patience = PATIENCE,
    throttle: Throttle = UNLIMITED,
    on_failure: OnFailure | None = None,
) -> None:
    """Put the blob into `store`; does nothing when it is there.

    `pieces_hash`: its piece index, which is fetched too; then up to `parallel` sources are drawn from at a time, else
    one. `throttle` limits the rate of all downloads that share it. `on_failure` is told of each source that failed and
    why (WRONG_CONTENT for a liar).

    Raises UnavailableError with all reasons when no source delivers, DiskFullError, VerificationError for a bad hash
    or an index that is another blob's.
    """
    wanted = Wanted(
        blob_hash=blob_hash, size_bytes=size_bytes, sources=sources, pieces_hash=pieces_hash, parallel=parallel
    )
    await _Fetch(store, patience, throttle, on_failure).run(wanted)


async def fetch_blobs(
    store: BlobStore,
    wanted: Sequence[Wanted],
    *,
    concurrency: int = CONCURRENCY,
    patience: Patience = PATIENCE,
    throttle: Throttle = UNLIMITED,
    on_failure: OnFailure | None = None,
) -> None:
    """Put all of `wanted` into `store`, `concurrency` at a time, in their order, which all peers should share.

    A source that failed for one blob is tried last for those that start later. A blob that is not to be had does not
    stop the others: UnavailableError, raised at the end, names all of them. Otherwise as `fetch_blob`.
    """
    if concurrency < 1:
        raise ValueError("concurrency is at least 1")
    times_failed: Counter[str] = Counter()
    failures: dict[str, tuple[tuple[str, str], ...]] = {}
    pending = iter({blob.blob_hash: blob for blob in wanted}.values())

    def note_failure(source: Source, reason: str) -> None:
        times_failed[source.name] += 1
        if on_failure is not None:
            on_failure(source, reason)

    async def fetch_pending() -> None:
        for blob in pending:
            try:
                sources = sorted(blob.sources, key=lambda source: times_failed[source.name])  # stable
                await _Fetch(store, patience, throttle, note_failure).run(replace(blob, sources=sources))
            except UnavailableError as error:
                failures.update(error.failures)

    with _announcing(wanted, store):
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(wanted))):
                    group.create_task(fetch_pending())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
    if failures:
        raise UnavailableError(failures)


@contextmanager
def _announcing(wanted: Sequence[Wanted], store: BlobStore) -> Iterator[None]:
    """Let those who ask us for one of these blobs know that it is coming."""
    expected = {blob.blob_hash for blob in wanted} | {blob.pieces_hash for blob in wanted if blob.pieces_hash}
    store.expected |= expected
    try:
        yield
    finally:
        store.expected -= expected


class _Fetch:
    """One blob being fetched, and who failed to deliver it."""

    def __init__(self, store: BlobStore, patience: Patience, throttle: Throttle, on_failure: OnFailure | None) -> None:
        self._failures: list[tuple[str, str]] = []
        self._store = store
        self._patience = patience
        self._throttle = throttle
        self._on_failure = on_failure

    async def run(self, wanted: Wanted) -> None:
        """Return when the blob is in the store."""
        if wanted.pieces_hash is not None and has_index(wanted.size_bytes) and not self._store.has(wanted.blob_hash):
            done = await self._fetch_pieces(wanted, wanted.pieces_hash)
        else:
            done = await self._fetch_whole(wanted.blob_hash, wanted.size_bytes, wanted.sources)
        if not done:
            raise UnavailableError({wanted.blob_hash: tuple(self._failures)})

    async def _fetch_pieces(self, wanted: Wanted, pieces_hash: str) -> bool:
        """False when no source is left. The index first, then the pieces."""
        if not await self._fetch_whole(pieces_hash, index_bytes(wanted.size_bytes), wanted.sources):
            return False
        failed = {name for name, _ in self._failures}
        try:
            index = PieceIndex.parse(await asyncio.to_thread(self._store.read, pieces_hash), wanted.size_bytes)
        except VerificationError:
            self._store.remove(pieces_hash)  # a power cut may have cut it short: the next try fetches it anew
            raise
        with await _open(partial(PieceWriter, self._store, wanted.blob_hash, index)) as writer:
            swarm = Swarm(
                writer,
                wanted.blob_hash,
                [source for source in wanted.sources if source.name not in failed],
                parallel=wanted.parallel,
                patience=self._patience,
                throttle=self._throttle,
                on_failure=self._note_failure,
            )
            if not await swarm.run():
                return False
            await _in_thread(writer.commit)
            return True

    async def _fetch_whole(self, blob_hash: str, size_bytes: int, sources: Sequence[Source]) -> bool:
        """False when no source delivered. One source after the other."""
        if self._store.has(blob_hash):
            return True
        repeats = Repeats(self._patience)
        for source in sources:
            try:
                await self._fetch_from(source, blob_hash, size_bytes, repeats)
            except TransferError as error:
                self._note_failure(source, error.reason)
            else:
                return True
        return False

    async def _fetch_from(self, source: Source, blob_hash: str, size_bytes: int, repeats: Repeats) -> None:
        """Return when the blob is in the store. Raises TransferError when this source did not deliver it."""
        while True:
            with await _open(partial(self._store.receive, blob_hash, size_bytes)) as writer:
                alone = writer.offset == 0
                try:
                    await pull(source, blob_hash, size_bytes, writer, self._patience, self._throttle)
                    writer.commit()
                    return
                except NotYetError as error:
                    again = error
                except VerificationError as error:
                    if alone:
                        raise TransferError(source.name, WRONG_CONTENT) from error
                    # Bytes of several sources: who lied cannot be told. They are gone now; all anew from this one.
                    continue
            if not await repeats.pause(again):
                raise again

    def _note_failure(self, source: Source, reason: str) -> None:
        self._failures.append((source.name, reason))
        if self._on_failure is not None:
            self._on_failure(source, reason)


async def _open(make: Callable[[], W]) -> W:
    """In a thread: a large partial blob takes seconds to hash again."""
    opening = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        with suppress(ManyhandsError, OSError), await opening:  # a thread cannot be stopped: wait, close what it opened
            pass
        raise


async def _in_thread(call: Callable[[], None]) -> None:
    """What must not be closed under a thread's hands: a cancelled caller waits until it is done."""
    working = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        with suppress(ManyhandsError, OSError):
            await working
        raise
