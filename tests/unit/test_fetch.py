"""Getting a blob from whoever has it: resuming, replacing, and who is called a liar."""

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import DiskFullError, TransferError, UnavailableError
from protocol.exchange.fetch import Wanted, fetch_blob, fetch_blobs
from protocol.exchange.source import WRONG_CONTENT, BlobSink, Patience, Source
from protocol.exchange.store import BlobStore
from protocol.signing import sha256_hex

DATA = bytes(range(256)) * 40
HASH = sha256_hex(DATA)
HURRIED = Patience(stall_timeout_s=0.5, min_bytes_per_s=1000.0)


@dataclass
class MemorySource:
    """Sends `data` up to `stop_at` in chunks, then does `then`; remembers from which offsets it was asked."""

    name: str
    data: bytes = DATA
    stop_at: int = 1 << 30
    then: Callable[[], object] = lambda: None
    chunk_bytes: int = 1000
    pause_s: float = 0.0
    asked_at: list[int] = field(default_factory=list)

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        self.asked_at.append(sink.offset)
        while chunk := self.data[sink.offset : min(self.stop_at, sink.offset + self.chunk_bytes)]:
            await sink.write(chunk)
            await asyncio.sleep(self.pause_s)
        outcome = self.then()
        if asyncio.iscoroutine(outcome):
            await outcome


def stalling(name: str, stop_at: int = 0) -> MemorySource:
    return MemorySource(name, stop_at=stop_at, then=lambda: asyncio.Event().wait())


def breaking(name: str, stop_at: int = 0, data: bytes = DATA, error: Exception | None = None) -> MemorySource:
    def fail() -> None:
        raise error or TransferError(name, "the connection broke")

    return MemorySource(name, data=data, stop_at=stop_at, then=fail)


class Failures:
    """An on_failure that remembers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def __call__(self, source: Source, reason: str) -> None:
        self.told.append((source.name, reason))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.told]


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


async def test_blob_is_stored_when_the_first_source_delivers(store: BlobStore) -> None:
    failures, second = Failures(), MemorySource("second")
    await fetch_blob(store, HASH, len(DATA), [MemorySource("first"), second], on_failure=failures)
    assert store.read(HASH) == DATA
    assert (failures.told, second.asked_at) == ([], [])


async def test_nobody_is_asked_when_the_blob_is_there(store: BlobStore) -> None:
    store.put(DATA)
    source = MemorySource("only")
    await fetch_blob(store, HASH, len(DATA), [source])
    assert source.asked_at == []


async def test_next_source_goes_on_when_one_breaks_off(store: BlobStore) -> None:
    failures, second = Failures(), MemorySource("second")
    await fetch_blob(store, HASH, len(DATA), [breaking("first", 4000), second], on_failure=failures)
    assert store.read(HASH) == DATA
    assert second.asked_at == [4000]
    assert failures.told == [("first", "the connection broke")]


async def test_next_source_goes_on_when_one_ends_early_without_an_error(store: BlobStore) -> None:
    failures, second = Failures(), MemorySource("second")
    await fetch_blob(store, HASH, len(DATA), [MemorySource("first", stop_at=3000), second], on_failure=failures)
    assert second.asked_at == [3000]
    assert failures.told == [("first", f"ended after 3000 of {len(DATA)} bytes")]


async def test_source_is_replaced_when_it_stalls(store: BlobStore) -> None:
    failures, second = Failures(), MemorySource("second")
    sources = [stalling("first", 2000), second]
    async with asyncio.timeout(15):
        await fetch_blob(store, HASH, len(DATA), sources, patience=HURRIED, on_failure=failures)
    assert second.asked_at == [2000]
    assert failures.told == [("first", f"stalled at byte 2000 of {len(DATA)} for 0.5 s")]


async def test_source_is_replaced_when_it_trickles(store: BlobStore) -> None:
    trickle = MemorySource("first", chunk_bytes=1, pause_s=0.01)
    async with asyncio.timeout(15):
        await fetch_blob(store, HASH, len(DATA), [trickle, MemorySource("second")], patience=HURRIED)
    assert store.has(HASH)


async def test_slow_source_is_kept_when_it_sends_enough(store: BlobStore) -> None:
    steady = MemorySource("only", chunk_bytes=1024, pause_s=0.1)  # 10 chunks: 1 s, twice the stall timeout
    await fetch_blob(store, HASH, len(DATA), [steady], patience=Patience(stall_timeout_s=0.5, min_bytes_per_s=1000.0))
    assert steady.asked_at == [0]


async def test_blob_is_kept_when_its_source_hangs_after_the_last_byte(store: BlobStore) -> None:
    await fetch_blob(store, HASH, len(DATA), [stalling("only", len(DATA))], patience=HURRIED)
    assert store.has(HASH)


async def test_liar_is_named_when_all_bytes_are_its_own(store: BlobStore) -> None:
    failures = Failures()
    liar = MemorySource("liar", data=DATA[:-1] + b"!")
    await fetch_blob(store, HASH, len(DATA), [liar, MemorySource("honest")], on_failure=failures)
    assert store.read(HASH) == DATA
    assert failures.told == [("liar", WRONG_CONTENT)]


async def test_honest_source_is_not_blamed_when_it_continued_a_lie(store: BlobStore) -> None:
    failures, honest = Failures(), MemorySource("honest")
    liar = breaking("liar", 5000, data=b"!" * len(DATA))
    await fetch_blob(store, HASH, len(DATA), [liar, honest], on_failure=failures)
    assert store.read(HASH) == DATA
    assert honest.asked_at == [5000, 0]
    assert failures.names == ["liar"]


async def test_source_fails_when_it_sends_more_than_announced(store: BlobStore) -> None:
    failures = Failures()
    sources = [MemorySource("generous", data=DATA + b"more"), MemorySource("honest")]
    await fetch_blob(store, HASH, len(DATA), sources, on_failure=failures)
    assert store.read(HASH) == DATA
    assert failures.names == ["generous"]


async def test_error_names_every_reason_when_nobody_delivers(store: BlobStore) -> None:
    with pytest.raises(UnavailableError) as caught:
        await fetch_blob(store, HASH, len(DATA), [breaking("one"), stalling("two")], patience=HURRIED)
    assert [name for name, _ in caught.value.failures[HASH]] == ["one", "two"]
    assert "one: the connection broke; two: stalled at byte 0" in str(caught.value)


async def test_error_says_so_when_there_is_no_source(store: BlobStore) -> None:
    with pytest.raises(UnavailableError, match="nobody is known to have it"):
        await fetch_blob(store, HASH, len(DATA), [])


async def test_source_is_not_blamed_when_the_disk_is_full(store: BlobStore) -> None:
    failures = Failures()
    full = breaking("unlucky", error=DiskFullError("full"))
    with pytest.raises(DiskFullError):
        await fetch_blob(store, HASH, len(DATA), [full, MemorySource("second")], on_failure=failures)
    assert failures.told == []


async def test_fetch_resumes_when_it_was_cancelled(store: BlobStore) -> None:
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(fetch_blob(store, HASH, len(DATA), [MemorySource("one", stop_at=6000, then=hang)]))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    second = MemorySource("second")
    await fetch_blob(store, HASH, len(DATA), [second])
    assert second.asked_at == [6000]


async def test_writer_is_closed_when_cancelled_while_it_opens(store: BlobStore) -> None:
    task = asyncio.create_task(fetch_blob(store, HASH, len(DATA), [MemorySource("one")]))
    await asyncio.sleep(0)  # now the thread opens it
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    with store.receive(HASH, len(DATA)) as writer:  # its lock is free again
        writer.write(DATA[:10])
    assert store.path(HASH).with_name(HASH + ".part").exists()


BLOBS = [bytes([index]) * 2000 for index in range(12)]


def want(blob: bytes, *sources: Source) -> Wanted:
    return Wanted(blob_hash=sha256_hex(blob), size_bytes=len(blob), sources=sources)


async def test_all_blobs_come_when_fetched_together(store: BlobStore) -> None:
    running = most = 0

    class Counting(MemorySource):
        async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            await super().fetch(blob_hash, size_bytes, sink)
            running -= 1

    wanted = [want(blob, Counting("one", data=blob, chunk_bytes=100)) for blob in BLOBS]
    await fetch_blobs(store, [*wanted, wanted[0]], concurrency=3)
    assert [store.read(sha256_hex(blob)) for blob in BLOBS] == BLOBS
    assert most == 3


async def test_others_are_told_what_comes_when_blobs_are_waiting(store: BlobStore) -> None:
    waiting: list[set[str]] = []
    first = MemorySource("one", data=BLOBS[0], then=lambda: waiting.append(set(store.expected)))
    with pytest.raises(UnavailableError):
        await fetch_blobs(store, [want(BLOBS[0], first), want(BLOBS[1], breaking("one"))], concurrency=1)
    assert waiting == [{sha256_hex(BLOBS[0]), sha256_hex(BLOBS[1])}]
    assert store.expected == set()


async def test_failing_source_comes_last_when_more_blobs_follow(store: BlobStore) -> None:
    dead = breaking("dead")
    wanted = [want(blob, dead, MemorySource("alive", data=blob)) for blob in BLOBS]
    await fetch_blobs(store, wanted, concurrency=1)
    assert dead.asked_at == [0]


async def test_other_blobs_come_when_some_are_unavailable(store: BlobStore) -> None:
    hashes = [sha256_hex(blob) for blob in BLOBS]
    wanted = [
        want(blob, MemorySource("one", data=blob) if index > 1 else breaking("one")) for index, blob in enumerate(BLOBS)
    ]
    with pytest.raises(UnavailableError, match="and 1 more") as caught:
        await fetch_blobs(store, wanted, concurrency=2)
    assert set(caught.value.failures) == set(hashes[:2])
    assert all(store.has(blob_hash) for blob_hash in hashes[2:])


async def test_all_fetches_end_when_the_disk_is_full(store: BlobStore) -> None:
    blobs = [want(blob, stalling("hanging")) for blob in BLOBS[:3]]
    full = want(DATA, breaking("unlucky", error=DiskFullError("full")))
    with pytest.raises(DiskFullError):
        await fetch_blobs(store, [*blobs, full], concurrency=4)
    assert asyncio.all_tasks() == {asyncio.current_task()}


SOURCES = st.builds(
    MemorySource,
    name=st.sampled_from(["a", "b", "c"]),
    data=st.sampled_from([DATA, DATA[:-1] + b"!", b"!" + DATA[1:], DATA + b"more", DATA[:7000]]),
    stop_at=st.sampled_from([0, 1, 4096, len(DATA), len(DATA) + 4]),
    chunk_bytes=st.sampled_from([1000, 4096, 20_000]),
)


@settings(max_examples=60, deadline=None)
@given(sources=st.lists(SOURCES, max_size=5), place=st.integers(0, 5), kept_bytes=st.sampled_from([0, 1, 9000]))
def test_blob_is_right_when_one_source_is_honest_among_any(
    sources: list[MemorySource], place: int, kept_bytes: int
) -> None:
    honest, failures = MemorySource("honest"), Failures()
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        with store.receive(HASH, len(DATA)) as writer:
            writer.write(b"?" * kept_bytes)
        everybody = [*sources[:place], honest, *sources[place:]]
        asyncio.run(fetch_blob(store, HASH, len(DATA), everybody, on_failure=failures))
        assert store.read(HASH) == DATA
    assert "honest" not in failures.names
