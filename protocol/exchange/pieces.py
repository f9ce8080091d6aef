"""The piece protocol: how one peer hands the rest of a blob to another over a stream that is already authenticated.

    -> PieceRequest, after its length in 2 bytes          big-endian throughout
    <- 1 byte Answer, 8 bytes size of the blob, then, if the answer is PIECE, the blob from `offset` to its end

Invariants: nothing is read or allocated by a length that the other side chose; every wait for the other side has a
limit; a stream is closed on every way out. It knows asyncio's streams and nothing of libp2p.

It does not check hashes: whoever commits the blob does.
"""

import asyncio
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import IntEnum

import structlog
from google.protobuf.message import DecodeError

from protocol.errors import ManyhandsError, MissingBlobError, TransferError, VerificationError
from protocol.exchange.fetch import BlobSink
from protocol.exchange.store import BlobStore
from protocol.wire.coordinator_pb2 import PieceRequest

PIECE_BYTES = 1 << 18
MAX_STREAMS = 64  # served at a time
MAX_STREAMS_PER_PEER = 16  # twice what a peer opens, since it sees the end of a stream before we do
MAX_REQUEST_BYTES = 256
REQUEST_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 60.0  # for one piece: a reader slower than 35 kbit/s is dropped
_LENGTH = struct.Struct("!H")
_HEAD = struct.Struct("!BQ")
_log = structlog.get_logger(__name__)


class Answer(IntEnum):
    """First byte of a reply."""

    PIECE = 0
    UNKNOWN = 1
    BUSY = 2
    MALFORMED = 3


_REFUSALS = {
    Answer.UNKNOWN: "does not have the blob",
    Answer.BUSY: "is busy with other peers",
    Answer.MALFORMED: "did not understand the request",
}


class Throttle:
    """Spaces out pieces so that together they stay under `max_bps` bits a second; None: no limit."""

    def __init__(self, max_bps: float | None) -> None:
        if max_bps is not None and max_bps <= 0:
            raise ValueError("an upload limit is above 0 bit/s")
        self._max_bps = max_bps
        self._free_at_s = 0.0
        quarter_second_bytes = PIECE_BYTES if max_bps is None else int(max_bps / 32)
        self.piece_bytes = min(PIECE_BYTES, max(4096, quarter_second_bytes))

    async def wait(self, num_bytes: int) -> None:
        """Return when `num_bytes` may be sent."""
        if self._max_bps is None:
            return
        now_s = asyncio.get_running_loop().time()
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + 8 * num_bytes / self._max_bps
        await asyncio.sleep(start_s - now_s)


class PieceExchange:
    """The serving side. `may_serve(hash)`: which blobs others may have; all when None."""

    def __init__(self, store: BlobStore, may_serve: Callable[[str], bool] | None, throttle: Throttle) -> None:
        self.bytes_sent = 0
        self._store = store
        self._may_serve = may_serve
        self._throttle = throttle
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
        answer, size_bytes = self._judge(peer_id, request)
        writer.write(_HEAD.pack(answer, size_bytes))
        if request is None or answer is not Answer.PIECE:
            return
        offset = request.offset
        while piece := self._store.read_piece(request.hash, offset, self._throttle.piece_bytes):
            await self._throttle.wait(len(piece))
            writer.write(piece)
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await writer.drain()
            offset += len(piece)
            self.bytes_sent += len(piece)

    def _judge(self, peer_id: str, request: PieceRequest | None) -> tuple[Answer, int]:
        """What to answer, and the size of the blob in bytes."""
        if self._streams.total() > MAX_STREAMS or self._streams[peer_id] > MAX_STREAMS_PER_PEER:
            return Answer.BUSY, 0
        try:
            if request is None:
                return Answer.MALFORMED, 0
            size_bytes = self._store.size(request.hash)
        except VerificationError:
            return Answer.MALFORMED, 0
        except MissingBlobError:
            return Answer.UNKNOWN, 0
        if self._may_serve is not None and not self._may_serve(request.hash):
            return Answer.UNKNOWN, 0  # whether it is here is nobody's business
        return (Answer.PIECE if request.offset <= size_bytes else Answer.MALFORMED), size_bytes


async def receive_piece(
    blob_hash: str,
    size_bytes: int,
    sink: BlobSink,
    peer_id: str,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    chunk_timeout_s: float,
) -> None:
    """The fetching side: write the blob's bytes from `sink.offset` to `size_bytes`, never more, into `sink`.

    Raises TransferError when the peer refuses, names another size, is silent for `chunk_timeout_s`, or ends early.
    """
    request = PieceRequest(hash=blob_hash, offset=sink.offset).SerializeToString()
    writer.write(_LENGTH.pack(len(request)) + request)
    code, its_size_bytes = _HEAD.unpack(await _read(reader.readexactly(_HEAD.size), peer_id, chunk_timeout_s))
    if code != Answer.PIECE:
        raise TransferError(peer_id, _REFUSALS.get(code, "gave an unknown answer"))
    if its_size_bytes != size_bytes:
        raise TransferError(peer_id, f"has the blob with {its_size_bytes} bytes; {size_bytes} were announced")
    while sink.offset < size_bytes:
        wanted_bytes = min(PIECE_BYTES, size_bytes - sink.offset)
        chunk = await _read(reader.read(wanted_bytes), peer_id, chunk_timeout_s)
        if not chunk:
            raise TransferError(peer_id, f"ended after {sink.offset} of {size_bytes} bytes")
        sink.write(chunk)


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
