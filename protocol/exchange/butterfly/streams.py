"""The streams of a butterfly round: frames of bounded length between peers that libp2p authenticated.

A frame is its length in 4 bytes, big-endian, and that many bytes.

Invariants: a length beyond the stream's limit is refused before anything is read; every wait for a peer has a limit;
whatever goes wrong is a ButterflyError that names the peer; no socket stays open when opening fails. hivemind's own
protobuf streams buffer whatever length the other side announces, so they are not used.
"""

import asyncio
import struct
from collections.abc import Sequence
from typing import Any

from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2

from protocol.errors import ButterflyError
from protocol.exchange.peer import PeerNode, dialable

MAX_REASON_BYTES = 200
CLOSE_TIMEOUT_S = 2.0
_LENGTH = struct.Struct("!I")


class FrameStream:
    """One stream with one peer."""

    def __init__(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_frame_bytes: int
    ) -> None:
        self.peer_id = peer_id
        self._reader = reader
        self._writer = writer
        self._max_frame_bytes = max_frame_bytes
        self._closed = False

    async def send(self, frame: bytes, timeout_s: float) -> None:
        """Raises ButterflyError when the peer does not take it in time, BrokenStreamError when the stream is gone."""
        try:
            self._writer.write(_LENGTH.pack(len(frame)))
            self._writer.write(frame)
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()
        except TimeoutError as error:
            raise ButterflyError(self.peer_id, f"took nothing for {timeout_s:g} s") from error
        except OSError as error:
            raise BrokenStreamError(self.peer_id) from error

    async def receive(self, timeout_s: float | None) -> bytes:
        """The next frame. Raises as `send`, and ButterflyError for a frame that is too long."""
        try:
            async with asyncio.timeout(timeout_s):
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > self._max_frame_bytes:
                    raise ButterflyError(self.peer_id, f"announced a message of {length} bytes")
                return await self._reader.readexactly(length)
        except TimeoutError as error:
            raise ButterflyError(self.peer_id, f"sent nothing for {timeout_s:g} s") from error
        except (OSError, EOFError) as error:
            raise BrokenStreamError(self.peer_id) from error

    async def close(self, flush_timeout_s: float = 0.0) -> None:
        """Close, after what was written is flushed or the time is up. May be called twice."""
        if self._closed:
            return  # asyncio cannot wait twice for the same end
        self._closed = True
        self._writer.close()
        try:
            async with asyncio.timeout(flush_timeout_s):
                await self._writer.wait_closed()
        except TimeoutError:
            self._writer.transport.abort()
        except OSError:
            pass  # it broke; closed is closed


class UnreachableError(ButterflyError):
    """No stream could be opened to the peer. It may be that it has not come to the round yet."""


class BrokenStreamError(ButterflyError):
    """A stream ended before it should. That alone says little: whoever ends a round closes its streams."""

    def __init__(self, peer_id: str) -> None:
        super().__init__(peer_id, "broke off")


async def open_stream(
    node: PeerNode, protocol_name: str, peer_id: str, addresses: Sequence[str], max_frame_bytes: int, timeout_s: float
) -> FrameStream:
    """Connect to the peer if need be and open a stream. Raises UnreachableError."""
    opening = _connect(node, protocol_name, peer_id, addresses, timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await opening
    except TimeoutError as error:
        raise UnreachableError(peer_id, f"could not be reached within {timeout_s:g} s") from error
    except (P2PDaemonError, OSError, EOFError, ValueError) as error:
        reason = "".join(char if char.isprintable() else " " for char in str(error)[:MAX_REASON_BYTES])
        raise UnreachableError(peer_id, f"could not be reached: {reason}") from error
    return FrameStream(peer_id, reader, writer, max_frame_bytes)


async def _connect(
    node: PeerNode, protocol_name: str, peer_id: str, addresses: Sequence[str], timeout_s: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    peer = PeerID.from_base58(peer_id).to_bytes()
    on_loopback = all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in node.addresses)
    maddrs = [maddr.to_bytes() for maddr in dialable(addresses, peer_id, loopback=on_loopback)]
    timeout = max(1, round(timeout_s))
    connect = p2pd_pb2.ConnectRequest(peer=peer, addrs=maddrs, timeout=timeout)
    stream = p2pd_pb2.StreamOpenRequest(peer=peer, proto=[protocol_name], timeout=timeout)
    requests = [p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect)] if maddrs else []
    requests.append(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=stream))
    reader, writer = await asyncio.open_unix_connection(node.p2p.daemon_listen_maddr["unix"])
    try:
        for request in requests:
            await write_pbmsg(writer, request)
            response: Any = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
    except BaseException:
        writer.close()
        raise
    return reader, writer
