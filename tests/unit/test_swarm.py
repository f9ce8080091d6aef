"""One blob from several sources at once: how they share the work, who is blamed, and what is kept after a break."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import DiskFullError, NotYetError, TransferError, UnavailableError, VerificationError
from protocol.exchange.fetch import Wanted, fetch_blob, fetch_blobs
from protocol.exchange.piece_index import PIECE_BYTES, PieceIndex, make_piece_index
from protocol.exchange.piece_writer import PieceWriter
from protocol.exchange.source import WRONG_CONTENT, BlobSink, Patience, Source
from protocol.exchange.store import BlobStore
from protocol.exchange.throttle import Throttle
from protocol.signing import sha256_hex

NUM_PIECES = 12
DATA = b"".join(bytes([number]) * PIECE_BYTES for number in range(NUM_PIECES - 1)) + b"the rest"
HASH = sha256_hex(DATA)
INDEX = make_piece_index(DATA)
INDEX_HASH = sha256_hex(INDEX)
HURRIED = Patience(stall_timeout_s=0.3, min_bytes_per_s=1000.0, absent_s=0.3, coming_s=0.4)
BAD = DATA[: 5 * PIECE_BYTES] + b"!" + DATA[5 * PIECE_BYTES + 1 :]


@dataclass
class MemorySource:
    """Has `data`; `before(number)` is awaited before it begins to send a piece. Counts what it sent, by piece."""

    name: str
    data: bytes = DATA
    before: Callable[[int], Awaitable[object]] | None = None
    chunk_bytes: int = PIECE_BYTES
    pause_s: float = 0.0  # before each chunk
    sent: Counter[int] = field(default_factory=Counter)

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        if blob_hash == INDEX_HASH:
            await sink.write(INDEX)
            return
        while sink.offset < sink.end:
            number, within = divmod(sink.offset, PIECE_BYTES)
            if self.before is not None and not within:
                await self.before(number)
            if not within:
                self.sent[number] += 1
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            await sink.write(self.data[sink.offset : min(sink.offset + self.chunk_bytes, sink.end)])


def breaking_at(name: str, first: int, error: Exception | None = None, data: bytes = DATA) -> MemorySource:
    async def fail(number: int) -> None:
        if number >= first:
            raise error or TransferError(name, "the connection broke")

    return MemorySource(name, data, fail)


def stalling_at(name: str, first: int) -> MemorySource:
    async def stall(number: int) -> None:
        if number >= first:
            await asyncio.Event().wait()

    return MemorySource(name, before=stall)


def steady(name: str, pause_s: float = 0.001, data: bytes = DATA) -> MemorySource:
    return MemorySource(name, data, lambda _: asyncio.sleep(pause_s))


class Failures:
    """An on_failure that remembers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def __call__(self, source: Source, reason: str) -> None:
        self.told.append((source.name, reason))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


async def fetch(
    store: BlobStore, *sources: Source, parallel: int = 3, patience: Patience = HURRIED, **options: Throttle
) -> list[tuple[str, str]]:
    """Fetch DATA with its index, within seconds; who failed and why."""
    failures = Failures()
    async with asyncio.timeout(15):
        await fetch_blob(
            store,
            HASH,
            len(DATA),
            sources,
            pieces_hash=INDEX_HASH,
            parallel=parallel,
            patience=patience,
            on_failure=failures,
            **options,
        )
    assert store.read(HASH) == DATA
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return failures.told


async def test_sources_share_the_work_when_they_are_equal(store: BlobStore) -> None:
    sources = [steady(name) for name in "abcd"]
    assert await fetch(store, *sources, parallel=3) == []
    shares = [sum(source.sent.values()) for source in sources]
    assert min(shares[:3]) >= 3
    assert shares[3] == 0
    assert NUM_PIECES <= sum(shares) <= NUM_PIECES + 2  # the last ones may be asked for twice


async def test_one_source_sends_every_piece_once_when_it_is_alone(store: BlobStore) -> None:
    sources = [steady("first"), steady("second")]
    await fetch(store, *sources, parallel=1)
    assert sources[0].sent == Counter(range(NUM_PIECES))
    assert not sources[1].sent


async def test_pieces_are_right_when_chunks_have_odd_sizes(store: BlobStore) -> None:
    sources = [MemorySource(name, chunk_bytes=size) for name, size in (("a", 100_001), ("b", PIECE_BYTES * 3 // 2))]
    assert await fetch(store, *sources) == []


async def test_liar_alone_is_blamed_when_several_send_at_once(store: BlobStore) -> None:
    everything_is_wrong = steady("liar", data=bytes(1) + DATA[:-1])
    assert await fetch(store, steady("a"), everything_is_wrong, steady("c")) == [("liar", WRONG_CONTENT)]


async def test_sender_alone_is_blamed_when_a_piece_is_wrong(store: BlobStore) -> None:
    liar = steady("liar", data=BAD)
    sources = [liar, steady("b")]
    assert await fetch(store, *sources, parallel=1) == [("liar", WRONG_CONTENT)]
    assert liar.sent == Counter(range(6))  # the right pieces are kept, and it is not asked again
    assert sources[1].sent == Counter(range(5, NUM_PIECES))


async def test_rest_comes_from_others_when_a_source_breaks_off(store: BlobStore) -> None:
    sources = [breaking_at("a", 4), steady("b")]
    assert await fetch(store, *sources, parallel=1) == [("a", "the connection broke")]
    assert sources[1].sent == Counter(range(4, NUM_PIECES))


async def test_piece_is_taken_from_a_source_when_it_stalls(store: BlobStore) -> None:
    sources = [stalling_at("a", 2), steady("b", 0.03)]
    told = await fetch(store, *sources, parallel=1)
    assert [name for name, _ in told] == ["a"]
    assert "stalled at byte 524288" in told[0][1]


async def test_nobody_waits_for_a_slow_source_when_others_have_the_last_pieces(store: BlobStore) -> None:
    """The stall timeout is far away: the last pieces are asked for twice."""
    sources = [stalling_at("slow", 0), steady("a"), steady("b")]
    assert await fetch(store, *sources, patience=Patience(stall_timeout_s=60.0)) == []


async def test_source_is_spared_what_has_come_from_elsewhere_when_it_gets_there(store: BlobStore) -> None:
    others_are_here = asyncio.Event()

    async def leave_the_first(number: int) -> None:
        if number == 0:
            others_are_here.set()
            await asyncio.Event().wait()

    late = MemorySource("late", before=lambda _: others_are_here.wait())
    quick = MemorySource("quick", before=leave_the_first)
    assert await fetch(store, late, quick, parallel=2, patience=Patience(stall_timeout_s=60.0)) == []
    assert late.sent == Counter([0])  # of the two pieces that it was asked for


async def test_next_source_helps_when_the_only_one_drawn_from_is_slow(store: BlobStore) -> None:
    trickle = MemorySource("trickle", chunk_bytes=2000, pause_s=0.01)  # 1.3 s a piece
    second = steady("second")
    assert await fetch(store, trickle, second, parallel=1) == []
    assert second.sent


async def test_source_is_asked_again_when_it_has_the_pieces_not_yet(store: BlobStore) -> None:
    here = 0

    async def come_slowly(number: int) -> None:
        nonlocal here
        if number >= here:
            here += 2  # so it says "not yet" for longer than `coming_s`, but never without a new piece
            raise NotYetError("parent", "is still fetching the blob itself", coming=True)

    parent, other = MemorySource("parent", before=come_slowly), steady("other")
    assert await fetch(store, parent, other, parallel=1) == []
    assert parent.sent == Counter(range(NUM_PIECES))
    assert not other.sent


@pytest.mark.parametrize(("coming", "least_s"), [(False, HURRIED.absent_s), (True, HURRIED.coming_s)])
async def test_next_source_is_asked_when_one_says_not_yet_for_too_long(
    store: BlobStore, coming: bool, least_s: float
) -> None:
    started_s = asyncio.get_running_loop().time()
    sources = [breaking_at("late", 0, NotYetError("late", "has it not", coming=coming)), steady("second")]
    assert await fetch(store, *sources, parallel=1) == [("late", "has it not")]
    assert least_s <= asyncio.get_running_loop().time() - started_s < least_s + 5.0


async def test_error_names_everybody_when_no_source_is_left(store: BlobStore) -> None:
    sources = [breaking_at("a", 3), stalling_at("b", 1), steady("liar", data=bytes(len(DATA)))]
    with pytest.raises(UnavailableError) as caught:
        await fetch(store, *sources)
    assert {name for name, _ in caught.value.failures[HASH]} == {"a", "b", "liar"}
    assert store.arriving == {}


async def test_error_names_everybody_when_nobody_has_the_index(store: BlobStore) -> None:
    class Ignorant(MemorySource):
        async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
            raise TransferError(self.name, "does not have the blob")

    with pytest.raises(UnavailableError, match=r"a: does not have the blob; b: does not"):
        await fetch(store, Ignorant("a"), Ignorant("b"))


async def test_fetch_resumes_when_it_was_cancelled(store: BlobStore) -> None:
    reached = asyncio.Event()

    async def hang(number: int) -> None:
        if number == 7:
            reached.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(fetch(store, MemorySource("one", before=hang), patience=Patience()))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    second = steady("second")
    await fetch(store, second)
    assert second.sent == Counter(range(7, NUM_PIECES))


async def test_error_says_so_when_the_index_is_another_blobs(store: BlobStore) -> None:
    other = bytes(1) + DATA[1:]
    with pytest.raises(VerificationError, match="another blob's"):
        await fetch_blob(store, "ab" * 32, len(DATA), [steady("a")], pieces_hash=INDEX_HASH)
    index = store.put(make_piece_index(other[:-PIECE_BYTES]))
    with pytest.raises(VerificationError, match="piece index"):
        await fetch_blob(store, HASH, len(DATA), [steady("a")], pieces_hash=index)


async def test_index_is_fetched_anew_when_the_one_here_was_cut_short(store: BlobStore) -> None:
    store.path(store.put(INDEX)).write_bytes(INDEX[:32])
    with pytest.raises(VerificationError, match="altered"):
        await fetch(store, steady("a"))
    assert await fetch(store, steady("a")) == []


async def test_source_is_not_blamed_when_the_disk_is_full(store: BlobStore) -> None:
    failures = Failures()
    sources = [breaking_at("unlucky", 2, DiskFullError("full")), steady("b", 0.05)]
    with pytest.raises(DiskFullError):
        await fetch_blob(store, HASH, len(DATA), sources, pieces_hash=INDEX_HASH, on_failure=failures)
    assert failures.told == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_rate_is_kept_and_nobody_is_blamed_when_downloads_are_limited(store: BlobStore) -> None:
    with PieceWriter(store, HASH, PieceIndex.parse(INDEX, len(DATA))) as writer:
        for number in range(6):
            writer.write(number, DATA[number * PIECE_BYTES : (number + 1) * PIECE_BYTES])
    started_s = asyncio.get_running_loop().time()
    downloads = Throttle(8 * PIECE_BYTES / 0.5)  # half a second a piece, longer than the stall timeout
    assert await fetch(store, steady("a"), steady("b"), throttle=downloads) == []
    assert asyncio.get_running_loop().time() - started_s > 0.9


async def test_index_is_used_when_several_blobs_are_fetched(store: BlobStore) -> None:
    wanted = Wanted(blob_hash=HASH, size_bytes=len(DATA), sources=[steady("a"), steady("b")], pieces_hash=INDEX_HASH)
    await fetch_blobs(store, [wanted])
    assert store.read(HASH) == DATA


SOURCES = st.builds(
    lambda name, data, first, how: {
        "breaks": breaking_at(name, first, data=data),
        "stalls": stalling_at(name, first),
        "late": breaking_at(name, first, NotYetError(name, "not yet")),
    }[how],
    name=st.sampled_from(["a", "b", "c", "d"]),
    data=st.sampled_from([DATA, BAD, b"!" + DATA[1:]]),
    first=st.sampled_from([0, 1, 5, NUM_PIECES]),
    how=st.sampled_from(["breaks", "stalls", "late"]),
)


@settings(max_examples=25, deadline=None)
@given(sources=st.lists(SOURCES, max_size=3), place=st.integers(0, 3), parallel=st.integers(1, 4))
def test_blob_is_right_when_one_source_is_honest_among_any(
    sources: list[MemorySource], place: int, parallel: int
) -> None:
    quick = Patience(stall_timeout_s=0.3, min_bytes_per_s=1000.0)
    with tempfile.TemporaryDirectory() as folder:
        everybody = [*sources[:place], MemorySource("honest"), *sources[place:]]
        told = asyncio.run(fetch(BlobStore(Path(folder)), *everybody, parallel=parallel, patience=quick))
        assert "honest" not in [name for name, _ in told]
