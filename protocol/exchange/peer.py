"""Blobs peer to peer: a libp2p node that serves a BlobStore, and a Source that fetches from such a node.

hivemind.P2P runs the libp2p daemon (p2pd): identity, Noise and TLS, multiplexing. On its streams runs the piece
protocol (protocol.exchange.pieces). They are plain streams: hivemind's protobuf streams buffer whatever length the
other side announces, and its `stream_open` leaves a socket open whenever it fails.

Invariants: the remote peer id is the one that libp2p authenticated; every wait for a peer has a limit; the daemon lives
as long as this process, however that ends, and its sockets are this user's alone.

No relay, no DHT, no hole punching: a peer that cannot be reached pushes its blobs to one that can. With `butterfly`
this is the only part of `exchange` that imports hivemind, and torch with it.
"""

import asyncio
import ipaddress
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from protocol.errors import ManyhandsError, TransferError
from protocol.exchange.pieces import PieceExchange, receive_piece
from protocol.exchange.source import BlobSink
from protocol.exchange.store import BlobStore
from protocol.exchange.throttle import Throttle
from protocol.exchange.watchdog import OWN_SESSION, Watchdog
from protocol.identity import Identity

PROTOCOL_NAME = "/manyhands/pieces/1"
MAX_FETCHES_PER_PEER = 8
MAX_ADDRESSES = 16
MAX_ADDRESS_CHARS = 256
STOP_TIMEOUT_S = 5.0
_ADDRESS = re.compile(
    r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[0-9A-Za-z.:_-]{1,253})"
    r"(?P<port>/tcp/[0-9]{1,5}|/udp/[0-9]{1,5}/quic-v1)(?:/p2p/(?P<peer>[1-9A-HJ-NP-Za-km-z]{1,64}))?"
)


class PeerNode:
    """A running libp2p node. Made by `start`, ended by `stop`; also an async context manager.

    `died` is set when the daemon ends by itself; nothing is served or fetched from then on, and the owner starts a new
    node. Counters are payload bytes since the start.
    """

    def __init__(self, exchange: PieceExchange) -> None:
        self.died = asyncio.Event()
        self.peer_id = ""
        self.addresses: tuple[str, ...] = ()
        self.bytes_received = 0
        self._exchange = exchange
        self._folder = _make_socket_folder()
        self._p2p: Any = None
        self._watchdog: Watchdog | None = None
        self._watch: asyncio.Task[None] | None = None
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @classmethod
    async def start(
        cls,
        store: BlobStore,
        identity_path: Path,
        *,
        public: bool = True,
        host_maddrs: Sequence[str] | None = None,
        announce_maddrs: Sequence[str] | None = None,
        nat_port_map: bool = False,
        may_serve: Callable[[str], bool] | None = None,
        max_upload_bps: float | None = None,
        startup_timeout_s: float = 60.0,
    ) -> Self:
        """Start a node that serves `store`, under the identity at `identity_path` (made there when absent).

        `public`: listen on all IPv4 interfaces, else on loopback alone; `host_maddrs` replaces either.
        `announce_maddrs`: the addresses to be known by, where they differ. `may_serve(hash)`: which blobs others may
        have; all when None. `max_upload_bps`: bits a second, all peers together.

        Raises ManyhandsError when the daemon does not start.
        """
        peer_id = Identity.load_or_create(identity_path).peer_id  # hivemind itself would make an RSA key
        node = cls(PieceExchange(store, may_serve, Throttle(max_upload_bps)))
        try:
            await node._start_daemon(
                host_maddrs=host_maddrs or [f"/ip4/{'0.0.0.0' if public else '127.0.0.1'}/tcp/0"],  # noqa: S104
                announce_maddrs=announce_maddrs,
                identity_path=str(identity_path),
                nat_port_map=nat_port_map,
                startup_timeout=startup_timeout_s,
            )
            if node.peer_id != peer_id:
                raise ValueError(f"it took the identity {node.peer_id}, not {peer_id}")
        except (P2PDaemonError, OSError, EOFError, ValueError) as error:
            await node.stop()
            raise ManyhandsError(f"the libp2p daemon did not start: {_one_line(error)}") from error
        except BaseException:
            await node.stop()
            raise
        return node

    async def _start_daemon(self, **options: Any) -> None:
        use_hivemind_log_handler("nowhere")  # to the process's own logging, not to stderr
        await _make_p2p_class(self).create(
            auto_nat=False, check_if_identity_free=False, dht_mode="client", use_relay=False, **options
        )
        # Up to here an orphan ends by itself: p2pd waits 30 s for its first client.
        self._watchdog = Watchdog(self._p2p._child.pid, self._folder)
        self._watch = asyncio.create_task(self._watch_daemon(self._watchdog))
        self.peer_id = self._p2p.peer_id.to_base58()
        await self.refresh_addresses()
        await self._p2p.add_binary_stream_handler(PROTOCOL_NAME, self._serve)

    async def _serve(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._exchange.handle(info.peer_id.to_base58(), reader, writer)

    async def _watch_daemon(self, watchdog: Watchdog) -> None:
        await self._p2p._child.wait()  # hivemind itself does not notice
        watchdog.disarm()
        self.died.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the daemon and remove its folder. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
        if self._p2p is not None:
            await _stop_daemon(self._p2p)
        await self._exchange.stop()  # after it, so that no new stream comes in between
        if self._watchdog is not None:
            self._watchdog.disarm()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def alive(self) -> bool:
        return self._watch is not None and not self._watch.done()

    @property
    def bytes_sent(self) -> int:
        return self._exchange.bytes_sent

    @property
    def uploads(self) -> Throttle:
        """The rate of all that this node serves; what else is uploaded may share it."""
        return self._exchange.throttle

    @property
    def p2p(self) -> Any:
        """The hivemind.P2P below, for other protocols on the same identity."""
        return self._p2p

    async def refresh_addresses(self) -> tuple[str, ...]:
        """Ask the daemon for its addresses, which change with the network. They end in /p2p/ and the peer id.

        Loopback addresses are left out unless there are no others.
        """
        found = [str(maddr) for maddr in await self._p2p.get_visible_maddrs(latest=True)]
        wide = [address for address in found if not _is_loopback(address)]
        self.addresses = tuple(wide or found)[:MAX_ADDRESSES]
        return self.addresses

    async def fetch(
        self,
        blob_hash: str,
        size_bytes: int,
        peer_id: str,
        addresses: Sequence[str],
        sink: BlobSink,
        *,
        chunk_timeout_s: float = 20.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        """Write the blob's bytes from `sink.offset` to `sink.end`, as that peer sends them; the sink checks them.

        `addresses` are hints from anybody: those that cannot be used are passed over, and with none left a connection
        that is there already is used. Raises TransferError, which names the peer and what went wrong, or NotYetError.
        """
        if not self.alive:
            raise TransferError(peer_id, "cannot be reached: this machine's libp2p daemon is gone")
        slots = self._slots.setdefault(peer_id, asyncio.Semaphore(MAX_FETCHES_PER_PEER))
        async with slots:
            with _naming_failure(peer_id, connect_timeout_s):
                async with asyncio.timeout(connect_timeout_s):
                    reader, writer = await self._open_stream(peer_id, addresses, connect_timeout_s)
            start_bytes = sink.offset
            try:
                await receive_piece(blob_hash, size_bytes, sink, peer_id, reader, writer, chunk_timeout_s)
            finally:
                self.bytes_received += sink.offset - start_bytes
                writer.close()

    async def _open_stream(
        self, peer_id: str, addresses: Sequence[str], timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the peer and open a stream, over one socket to the daemon that is closed when either fails."""
        peer = _decode_peer_id(peer_id).to_bytes()
        maddrs = dialable(addresses, peer_id, loopback=all(map(_is_loopback, self.addresses)))
        timeout = max(1, round(timeout_s))
        connect = p2pd_pb2.ConnectRequest(peer=peer, addrs=[maddr.to_bytes() for maddr in maddrs], timeout=timeout)
        open_stream = p2pd_pb2.StreamOpenRequest(peer=peer, proto=[PROTOCOL_NAME], timeout=timeout)
        reader, writer = await asyncio.open_unix_connection(self._p2p.daemon_listen_maddr["unix"])
        try:
            if maddrs:
                await _command(reader, writer, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))
            request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=open_stream)
            await _command(reader, writer, request)
        except BaseException:
            writer.close()
            raise
        return reader, writer


@dataclass(frozen=True, slots=True)
class PeerSource:
    """A protocol.exchange.source.Source: one peer, reached through our node."""

    node: PeerNode
    peer_id: str
    addresses: Sequence[str]

    @property
    def name(self) -> str:
        return self.peer_id

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        """See PeerNode.fetch."""
        await self.node.fetch(blob_hash, size_bytes, self.peer_id, self.addresses, sink)


def dialable(addresses: Sequence[str], peer_id: str, *, loopback: bool) -> list[Multiaddr]:
    """Those of a peer's claimed addresses that are worth a try, without /p2p/.

    IP or DNS name with TCP or QUIC only: no relays, no Unix sockets. `loopback`: whether loopback addresses are tried;
    a node that is on a network leaves them alone, or any peer could make it knock on its own machine's ports.
    """
    maddrs = (_parse_address(address, peer_id, loopback) for address in addresses[:MAX_ADDRESSES])
    return [maddr for maddr in maddrs if maddr is not None]


def _parse_address(address: str, peer_id: str, loopback: bool) -> Multiaddr | None:
    match = _ADDRESS.fullmatch(address) if len(address) <= MAX_ADDRESS_CHARS else None
    if match is None or match["peer"] not in (None, peer_id):
        return None
    try:
        if match["kind"] in ("ip4", "ip6"):
            ip = ipaddress.ip_address(match["host"])
            if ip.is_multicast or ip.is_unspecified or ip.is_link_local or (ip.is_loopback and not loopback):
                return None
        return Multiaddr(address.removesuffix(f"/p2p/{peer_id}"))
    except ValueError:
        return None


def _is_loopback(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def _decode_peer_id(peer_id: str) -> PeerID:
    """Raises ValueError."""
    if not 1 <= len(peer_id) <= 64:  # decoding base58 takes quadratic time
        raise ValueError("not a peer id")
    return PeerID.from_base58(peer_id)


async def _command(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> None:
    """One request to the daemon. Raises P2PDaemonError when it fails."""
    await write_pbmsg(writer, request)
    response = p2pd_pb2.Response()
    await read_pbmsg_safe(reader, response)
    raise_if_failed(response)


@contextmanager
def _naming_failure(peer_id: str, timeout_s: float) -> Iterator[None]:
    """Turn whatever can go wrong in reaching a peer into a TransferError."""
    try:
        yield
    except TimeoutError as error:
        raise TransferError(peer_id, f"could not be reached within {timeout_s:g} s") from error
    except (OSError, EOFError) as error:
        raise TransferError(peer_id, "could not be reached: this machine's libp2p daemon broke off") from error
    except (P2PDaemonError, ValueError) as error:
        raise TransferError(peer_id, f"could not be reached: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The daemon's errors run over many lines and quote what peers say."""
    text = str(error).removeprefix("Connect failed. msg=")
    return "".join(char if char.isprintable() else " " for char in text[:200])


def _make_socket_folder() -> Path:
    """For the daemon's sockets: open to this user alone, and short, since a socket's path has at most 103 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="manyhands-"))
    if len(bytes(folder)) > 70:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="manyhands-", dir="/tmp"))
    return folder


def _make_p2p_class(node: PeerNode) -> Any:
    """hivemind.P2P with a folder and a session of its own, known to `node` from the first moment."""

    class NodeP2P(P2P):  # type: ignore[misc]  # hivemind ships no types
        _UNIX_SOCKET_PREFIX = f"/unix{node._folder}/"

        def __init__(self) -> None:
            super().__init__()
            self._client_listen_maddr = None  # its shutdown reads this, however early the start failed
            node._p2p = self  # so that a start that fails or is cancelled can be cleaned up

        @staticmethod
        def _make_process_args(*args: Any, **options: Any) -> list[str]:
            return [*OWN_SESSION, *P2P._make_process_args(*args, **options)]

    return NodeP2P


async def _stop_daemon(p2p: Any) -> None:
    stopping = asyncio.ensure_future(p2p.shutdown())
    _, pending = await asyncio.wait({stopping}, timeout=STOP_TIMEOUT_S)
    if pending:
        with suppress(ProcessLookupError):
            p2p._child.kill()
    await stopping
