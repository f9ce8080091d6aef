"""The piece protocol over a socket pair: what a hostile peer may send, and how long it is waited for."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.errors import NotYetError, TransferError
from protocol.exchange import pieces
from protocol.exchange.piece_index import PIECE_BYTES, PieceIndex, make_piece_index
from protocol.exchange.piece_writer import PieceWriter
from protocol.exchange.pieces import MAX_STREAMS_PER_PEER, Answer, PieceExchange, receive_piece
from protocol.exchange.store import BlobStore
from protocol.exchange.throttle import Throttle
from protocol.signing import sha256_hex
from protocol.wire.coordinator_pb2 import PieceRequest

DATA = bytes(range(256)) * 4096  # 1 MiB: more than the socket's buffers hold
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def open_pair() -> tuple[Streams, Streams]:
    ours, theirs = socket.socketpair()
    return await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def make_exchange(store: BlobStore, may_serve: Callable[[str], bool] | None = None) -> PieceExchange:
    return PieceExchange(store, may_serve, Throttle(None))


def framed(body: bytes) -> bytes:
    return struct.pack("!H", len(body)) + body


def request(blob_hash: str, offset: int = 0, length: int = 0) -> bytes:
    return framed(PieceRequest(hash=blob_hash, offset=offset, length=length).SerializeToString())


async def ask(exchange: PieceExchange, data: bytes) -> tuple[Answer, int, bytes]:
    """Send raw bytes to a serving peer; its answer, the size it names, and what follows."""
    (reader, writer), theirs = await open_pair()
    serving = asyncio.create_task(exchange.handle("asker", *theirs))
    writer.write(data)
    code, size_bytes = struct.unpack("!BQ", await reader.readexactly(9))
    parts = []
    while code == Answer.PIECE and (num_bytes := int.from_bytes(await reader.readexactly(4))):
        parts.append(await reader.readexactly(num_bytes))
    writer.close()
    await serving
    return Answer(code), size_bytes, b"".join(parts)


async def test_rest_of_blob_is_sent_when_asked_from_an_offset(store: BlobStore) -> None:
    exchange, blob_hash = make_exchange(store), store.put(DATA)
    assert await ask(exchange, request(blob_hash, 1000)) == (Answer.PIECE, len(DATA), DATA[1000:])
    assert await ask(exchange, request(blob_hash, len(DATA))) == (Answer.PIECE, len(DATA), b"")
    assert exchange.bytes_sent == len(DATA) - 1000


async def test_no_more_is_sent_when_a_length_is_asked_for(store: BlobStore) -> None:
    exchange, blob_hash = make_exchange(store), store.put(DATA)
    assert await ask(exchange, request(blob_hash, 1000, 500)) == (Answer.PIECE, len(DATA), DATA[1000:1500])
    assert await ask(exchange, request(blob_hash, 1000, 1 << 63)) == (Answer.PIECE, len(DATA), DATA[1000:])


@pytest.fixture
def arriving(store: BlobStore) -> Iterator[PieceWriter]:
    """DATA, of which the second of four pieces is here."""
    with PieceWriter(store, sha256_hex(DATA), PieceIndex.parse(make_piece_index(DATA), len(DATA))) as writer:
        assert writer.write(1, DATA[PIECE_BYTES : 2 * PIECE_BYTES])
        yield writer


async def test_piece_is_passed_on_when_the_rest_of_the_blob_is_still_arriving(
    store: BlobStore, arriving: PieceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "COMING_TIMEOUT_S", 0.05)
    exchange, blob_hash = make_exchange(store), sha256_hex(DATA)
    here = DATA[PIECE_BYTES : 2 * PIECE_BYTES]
    assert await ask(exchange, request(blob_hash, PIECE_BYTES)) == (Answer.PIECE, len(DATA), here)
    assert await ask(exchange, request(blob_hash, PIECE_BYTES + 10, 90)) == (Answer.PIECE, len(DATA), here[10:100])
    assert await ask(exchange, request(blob_hash)) == (Answer.COMING, len(DATA), b"")
    assert await ask(exchange, request(blob_hash, len(DATA) + 1)) == (Answer.MALFORMED, len(DATA), b"")


async def test_rest_follows_when_it_arrives_while_a_peer_waits(store: BlobStore, arriving: PieceWriter) -> None:
    asking = asyncio.create_task(ask(make_exchange(store), request(sha256_hex(DATA))))
    for number in (2, 0, 3):
        await asyncio.sleep(0.02)
        arriving.write(number, DATA[number * PIECE_BYTES : (number + 1) * PIECE_BYTES])
    arriving.commit()
    arriving.close()
    assert await asking == (Answer.PIECE, len(DATA), DATA)


async def test_stream_stays_open_when_all_is_sent_until_the_asking_side_closes_it(store: BlobStore) -> None:
    (reader, writer), theirs = await open_pair()
    serving = asyncio.create_task(make_exchange(store).handle("asker", *theirs))
    writer.write(request(store.put(b"x")))
    assert (await reader.readexactly(9 + 4 + 1 + 4)).endswith(b"x" + bytes(4))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await reader.read(1)
    writer.close()
    await serving


async def test_serving_ends_when_the_peer_goes_while_its_upload_waits(store: BlobStore) -> None:
    exchange = PieceExchange(store, None, Throttle(8 * 4096 / 100))  # a chunk of 4 KiB at once, the next after 100 s
    (reader, writer), theirs = await open_pair()
    serving = asyncio.create_task(exchange.handle("asker", *theirs))
    writer.write(request(store.put(DATA)))
    await reader.readexactly(9 + 4 + 4096)
    writer.close()
    async with asyncio.timeout(15):
        await serving


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!H", 65535) + b"x",
        framed(b"\xff\xff\xff"),
        framed(b""),
        request("../../../etc/passwd"),
        request("A" * 64),
    ],
    ids=["too long", "not protobuf", "empty", "path", "upper case"],
)
async def test_answer_is_malformed_when_the_request_is(store: BlobStore, data: bytes) -> None:
    assert await ask(make_exchange(store), data) == (Answer.MALFORMED, 0, b"")


async def test_answer_is_malformed_when_the_offset_is_past_the_end(store: BlobStore) -> None:
    answer, _, rest = await ask(make_exchange(store), request(store.put(DATA), 1 << 63))
    assert (answer, rest) == (Answer.MALFORMED, b"")


async def test_blob_looks_unknown_when_it_may_not_be_served(store: BlobStore) -> None:
    secret = store.put(DATA)
    exchange = make_exchange(store, lambda blob_hash: blob_hash != secret)
    assert await ask(exchange, request(secret)) == (Answer.UNKNOWN, 0, b"") == await ask(exchange, request("0" * 64))


async def test_blob_is_said_to_come_when_this_peer_is_about_to_fetch_it(store: BlobStore) -> None:
    wanted = "ab" * 32
    store.expected.add(wanted)
    assert await ask(make_exchange(store), request(wanted)) == (Answer.COMING, 0, b"")
    assert await ask(make_exchange(store, lambda _: False), request(wanted)) == (Answer.UNKNOWN, 0, b"")


async def test_answer_is_busy_when_a_peer_has_too_many_streams(store: BlobStore) -> None:
    exchange, blob_hash = make_exchange(store), store.put(DATA)
    idle = [await open_pair() for _ in range(MAX_STREAMS_PER_PEER)]
    serving = [asyncio.create_task(exchange.handle("asker", *theirs)) for _, theirs in idle]
    await asyncio.sleep(0)  # lets them start
    assert await ask(exchange, request(blob_hash)) == (Answer.BUSY, 0, b"")
    for (_, writer), _ in idle:
        writer.close()
    await asyncio.wait(serving)
    assert (await ask(exchange, request(blob_hash)))[0] is Answer.PIECE


async def test_peer_is_dropped_when_it_never_asks(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "REQUEST_TIMEOUT_S", 0.05)
    (reader, writer), theirs = await open_pair()
    await make_exchange(store).handle("asker", *theirs)
    assert await reader.read() == b""
    writer.close()


async def test_peer_is_dropped_when_it_does_not_read(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "DRAIN_TIMEOUT_S", 0.05)
    (_, writer), theirs = await open_pair()
    writer.write(request(store.put(DATA * 4)))
    async with asyncio.timeout(15):
        await make_exchange(store).handle("asker", *theirs)
    writer.close()


async def test_serving_ends_when_the_exchange_stops(store: BlobStore) -> None:
    exchange = make_exchange(store)
    (_, writer), theirs = await open_pair()
    serving = asyncio.create_task(exchange.handle("asker", *theirs))
    await asyncio.sleep(0)
    await exchange.stop()
    assert serving.cancelled()
    writer.close()


async def test_pieces_are_spaced_when_upload_is_limited(store: BlobStore) -> None:
    exchange = PieceExchange(store, None, Throttle(8 * 16_384 * 4))  # 4 pieces of 16 KiB a second; the first at once
    blob_hash = store.put(DATA[: 2 * 16_384])
    started_s = asyncio.get_running_loop().time()
    await ask(exchange, request(blob_hash))
    assert 0.24 < asyncio.get_running_loop().time() - started_s < 1.5


@dataclass
class Buffer:
    """A BlobSink in memory."""

    end: int
    data: bytes = b""

    @property
    def offset(self) -> int:
        return len(self.data)

    async def write(self, chunk: bytes | memoryview) -> None:
        self.data += chunk


async def receive(size_bytes: int, serve: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> bytes:
    """What is kept of a blob of `size_bytes` that a peer sends as `serve` does."""
    (reader, writer), (their_reader, their_writer) = await open_pair()

    async def answer() -> None:
        try:
            await their_reader.read(1000)
            await serve(their_writer)
        finally:
            their_writer.close()

    serving = asyncio.create_task(answer())
    try:
        sink = Buffer(size_bytes)
        await receive_piece("0" * 64, size_bytes, sink, "liar", reader, writer, chunk_timeout_s=0.2)
    finally:
        writer.close()
        serving.cancel()
        await asyncio.wait([serving])
    return sink.data


async def test_no_more_than_the_size_is_taken_when_a_peer_sends_on() -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack("!BQI", 0, 10, 4) + b"x" * 4 + struct.pack("!I", 6) + b"x" * 1000)
        await writer.drain()

    assert await receive(10, serve) == b"x" * 10


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"", "the connection broke"),
        (struct.pack("!BQ", 1, 0), "does not have the blob"),
        (struct.pack("!BQ", 2, 0), "is busy"),
        (struct.pack("!BQ", 77, 10), "gave an unknown answer"),
        (struct.pack("!BQ", 0, 1 << 60), f"has the blob with {1 << 60} bytes; 10 were announced"),
        (struct.pack("!BQI", 0, 10, 11) + b"x" * 11, "sent more than was asked for"),
        (struct.pack("!BQI", 0, 10, 1 << 31), "sent more than was asked for"),
        (struct.pack("!BQI", 0, 10, 0), "ended after 0 of 10 bytes"),
        (struct.pack("!BQI", 0, 10, 10) + b"xyz", "the connection broke after 3 bytes"),
    ],
)
async def test_error_names_peer_and_reason_when_it_does_not_deliver(reply: bytes, reason: str) -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(reply)

    with pytest.raises(TransferError, match=f"^liar: {reason}"):
        await receive(10, serve)


async def test_error_says_so_when_a_peer_falls_silent() -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack("!BQI", 0, 10, 10) + b"xyz")
        await asyncio.Event().wait()

    with pytest.raises(TransferError, match=r"^liar: sent nothing for 0.2 s"):
        await receive(10, serve)


@pytest.mark.parametrize(
    ("reply", "coming"),
    [
        (struct.pack("!BQ", Answer.UNKNOWN, 0), False),
        (struct.pack("!BQ", Answer.BUSY, 0), False),
        (struct.pack("!BQ", Answer.COMING, len(DATA)), True),
        (struct.pack("!BQI", Answer.PIECE, len(DATA), PIECE_BYTES) + DATA[:PIECE_BYTES] + bytes(4), True),
    ],
    ids=["unknown", "busy", "coming", "one piece"],
)
async def test_peer_may_be_asked_again_when_it_has_the_bytes_not_yet(reply: bytes, coming: bool) -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        await writer.drain()

    with pytest.raises(NotYetError) as caught:
        await receive(len(DATA), serve)
    assert caught.value.coming is coming
