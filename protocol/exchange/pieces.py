"""The piece protocol: how one peer hands part of a blob to another over a stream that is already authenticated.

    -> PieceRequest, after its length in 2 bytes          big-endian throughout
    <- 1 byte Answer, 8 bytes size of the blob
    <- if the answer is PIECE, the blob from `offset` on, in chunks after their length in 4 bytes; 0 ends them

A blob that is being received in pieces is served as far as it has come, and the rest as it comes: the stream waits a
little for each next piece, and ends where it stops coming. So a payload flows through a tree of peers at once.

The asking side closes the stream. When the serving side does, libp2p's daemon may drop what is still under way.

Invariants: nothing is read or allocated by a length that the other side chose; every wait for the other side has a
limit, and ends when the other side is gone; a stream is closed on every way out. It knows asyncio's streams and nothing
of libp2p.

It does not check hashes: whoever commits the blob does.
"""

import asyncio
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import IntEnum

import structlog
from google.protobuf.message import DecodeError

from protocol.errors import ManyhandsError, MissingBlobError, NotYetError, TransferError, VerificationError
from protocol.exchange.piece_index import PIECE_BYTES
from protocol.exchange.source import BlobSink
from protocol.exchange.store import BlobStore
from protocol.exchange.throttle import Throttle
from protocol.wire.coordinator_pb2 import PieceRequest

MAX_STREAMS = 64  # served at a time
MAX_STREAMS_PER_PEER = 16  # twice what a peer opens, since it sees the end of a stream before we do
MAX_REQUEST_BYTES = 256
REQUEST_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 60.0  # for one chunk: a reader slower than 35 kbit/s is dropped
COMING_TIMEOUT_S = 5.0  # how long a stream waits for a piece that this peer is fetching itself
COMING_POLL_S = 0.05
_LENGTH = struct.Struct("!H")
_HEAD = struct.Struct("!BQ")
_CHUNK = struct.Struct("!I")
_log = structlog.get_logger(__name__)


class Answer(IntEnum):
    """First byte of a reply."""

    PIECE = 0
    UNKNOWN = 1
    BUSY = 2
    MALFORMED = 3
    COMING = 4  # it is fetching the blob itself, and has not come to this part yet


_REFUSALS = {
    Answer.UNKNOWN: "does not have the blob",
    Answer.BUSY: "is busy with other peers",
    Answer.MALFORMED: "did not understand the request",
    Answer.COMING: "is still fetching the blob itself",
}


class PieceExchange:
    """The serving side. `may_serve(hash)`: which blobs others may have; all when None."""

    def __init__(self, store: BlobStore, may_serve: Callable[[str], bool] | None, throttle: Throttle) -> None:
        self.bytes_sent = 0
        self._store = store
        self._may_serve = may_serve
        self.throttle = throttle
        self._streams: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None] | None] = set()

    async def handle(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one stream that `peer_id` opened, and close it. Raises nothing that the peer could provoke."""
        task = asyncio.current_task()
        self._tasks.add(task)
        self._streams[peer_id] += 1
        flush_timeout_s = 0.0
        try:
            if self._streams.total() <= 2 * MAX_STREAMS:  # beyond, file descriptors are too few to be polite
                await self._answer(peer_id, reader, writer)
                flush_timeout_s = DRAIN_TIMEOUT_S
        except (OSError, EOFError, ManyhandsError) as error:
            _log.debug("piece_stream_broke", peer=peer_id, reason=str(error) or type(error).__name__)
        finally:
            try:
                await _close(writer, flush_timeout_s)
            finally:
                self._tasks.discard(task)
                self._streams -= Counter((peer_id,))  # drops the key at 0

    async def stop(self) -> None:
        """Break off what is being served."""
        tasks = [task for task in self._tasks if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _answer(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            request = await _read_request(reader)
        sending = asyncio.ensure_future(self._send(peer_id, request, writer))
        gone = asyncio.ensure_future(reader.read(1))  # a peer says nothing more: whatever comes is its end
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
                await asyncio.wait({gone}, timeout=DRAIN_TIMEOUT_S)
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, peer_id: str, request: PieceRequest | None, writer: asyncio.StreamWriter) -> None:
        answer, size_bytes = self._judge(peer_id, request)
        if request is None or answer is not Answer.PIECE:
            writer.write(_HEAD.pack(answer, size_bytes))
            return
        offset = request.offset
        end = min(size_bytes, offset + request.length) if request.length else size_bytes
        chunk = await self._read(request.hash, offset, end)
        if not chunk and offset < end:
            answer = Answer.COMING
        writer.write(_HEAD.pack(answer, size_bytes))
        while chunk:
            await self.throttle.wait(len(chunk))
            writer.write(_CHUNK.pack(len(chunk)) + chunk)
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await writer.drain()
            offset += len(chunk)
            self.bytes_sent += len(chunk)
            chunk = await self._read(request.hash, offset, end)
        if answer is Answer.PIECE:
            writer.write(_CHUNK.pack(0))

    async def _read(self, blob_hash: str, offset: int, end: int) -> bytes:
        """The next bytes to send; empty at the end, and when they do not come in time. Raises MissingBlobError."""
        num_bytes = min(self.throttle.chunk_bytes, end - offset)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + COMING_TIMEOUT_S
        while num_bytes:
            arriving = self._store.arriving.get(blob_hash)
            if arriving is None:
                return self._store.read_piece(blob_hash, offset, num_bytes)
            chunk = arriving.read_piece(offset, num_bytes)
            if chunk or loop.time() >= until_s:
                return chunk
            await asyncio.sleep(COMING_POLL_S)
        return b""

    def _judge(self, peer_id: str, request: PieceRequest | None) -> tuple[Answer, int]:
        """What to answer, and the size of the blob in bytes."""
        if self._streams.total() > MAX_STREAMS or self._streams[peer_id] > MAX_STREAMS_PER_PEER:
            return Answer.BUSY, 0
        if request is None:
            return Answer.MALFORMED, 0
        try:
            arriving = self._store.arriving.get(request.hash)
            size_bytes = arriving.size_bytes if arriving is not None else self._store.size(request.hash)
            answer = Answer.PIECE if request.offset <= size_bytes else Answer.MALFORMED
        except VerificationError:
            return Answer.MALFORMED, 0
        except MissingBlobError:
            answer, size_bytes = (Answer.COMING if request.hash in self._store.expected else Answer.UNKNOWN), 0
        if self._may_serve is not None and not self._may_serve(request.hash):
            return Answer.UNKNOWN, 0  # whether it is here is nobody's business
        return answer, size_bytes


async def receive_piece(
    blob_hash: str,
    size_bytes: int,
    sink: BlobSink,
    peer_id: str,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    chunk_timeout_s: float,
) -> None:
    """The fetching side: write the blob's bytes from `sink.offset` to `sink.end`, never more, into `sink`.

    Raises NotYetError when the peer may be asked again, else TransferError: it refuses, names another size, is silent
    for `chunk_timeout_s`, or ends early. What the sink raises is passed on.
    """
    start, end = sink.offset, sink.end
    request = PieceRequest(hash=blob_hash, offset=start, length=end - start).SerializeToString()
    writer.write(_LENGTH.pack(len(request)) + request)
    code, its_size_bytes = _HEAD.unpack(await _read(reader.readexactly(_HEAD.size), peer_id, chunk_timeout_s))
    if code in (Answer.UNKNOWN, Answer.BUSY, Answer.COMING):
        raise NotYetError(peer_id, _REFUSALS[Answer(code)], coming=code == Answer.COMING)
    if code != Answer.PIECE:
        raise TransferError(peer_id, _REFUSALS.get(code, "gave an unknown answer"))
    if its_size_bytes != size_bytes:
        raise TransferError(peer_id, f"has the blob with {its_size_bytes} bytes; {size_bytes} were announced")
    while sink.offset < sink.end:
        (num_bytes,) = _CHUNK.unpack(await _read(reader.readexactly(_CHUNK.size), peer_id, chunk_timeout_s))
        if num_bytes > end - sink.offset:
            raise TransferError(peer_id, "sent more than was asked for")
        if not num_bytes:
            reason = f"ended after {sink.offset} of {size_bytes} bytes"
            if sink.offset > start:  # it is fetching the blob itself
                raise NotYetError(peer_id, reason, coming=True)
            raise TransferError(peer_id, reason)
        await _receive_chunk(num_bytes, sink, peer_id, reader, chunk_timeout_s)


async def _receive_chunk(
    num_bytes: int, sink: BlobSink, peer_id: str, reader: asyncio.StreamReader, chunk_timeout_s: float
) -> None:
    while num_bytes and sink.offset < sink.end:
        part = await _read(reader.read(min(num_bytes, PIECE_BYTES)), peer_id, chunk_timeout_s)
        if not part:
            raise TransferError(peer_id, f"the connection broke after {sink.offset} bytes")
        num_bytes -= len(part)
        await sink.write(part)


async def _read(reading: Awaitable[bytes], peer_id: str, timeout_s: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            return await reading
    except TimeoutError as error:
        raise TransferError(peer_id, f"sent nothing for {timeout_s:g} s") from error
    except (OSError, EOFError) as error:
        raise TransferError(peer_id, "the connection broke") from error


async def _close(writer: asyncio.StreamWriter, flush_timeout_s: float) -> None:
    """Close once what was written is flushed, or when the time is up."""
    writer.close()
    try:
        async with asyncio.timeout(flush_timeout_s):
            await writer.wait_closed()
    except TimeoutError:
        writer.transport.abort()
    except OSError:
        pass  # it broke; closed is closed


async def _read_request(reader: asyncio.StreamReader) -> PieceRequest | None:
    """None when it is not one."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_REQUEST_BYTES:
        return None
    try:
        return PieceRequest.FromString(await reader.readexactly(length))
    except DecodeError:
        return None
