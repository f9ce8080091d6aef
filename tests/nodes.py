"""Real libp2p nodes on loopback for tests: in this process, or each in one of its own that can be killed.

async with open_peers(tmp_path) as start:
    first, second = await start("first"), await start("second", max_upload_bps=8e6)
    await fetch_blob(second.store, blob_hash, size, [second.source(first)])
"""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from protocol.exchange.peer import PeerNode, PeerSource
from protocol.exchange.piece_index import make_piece_index
from protocol.exchange.source import BlobSink
from protocol.exchange.store import BlobStore

TINY_BPS = 8 * 4096 / 100  # a chunk of 4 KiB at once, the next after 100 s
_NODE_SCRIPT = """
import asyncio, json, sys
from pathlib import Path
import psutil
from protocol.exchange.peer import PeerNode
from protocol.exchange.store import BlobStore

async def main():
    folder = Path(sys.argv[1])
    store, options = BlobStore(folder / "blobs"), json.loads(sys.argv[2])
    node = await PeerNode.start(store, folder / "identity", public=False, **options)
    helpers = [child.pid for child in psutil.Process().children()]
    print(json.dumps([node.peer_id, node.addresses, helpers, str(node._folder)]), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A node, its store, and how to reach it from another."""

    node: PeerNode
    store: BlobStore

    def source(self, other: "Peer | PeerProcess") -> PeerSource:
        peer = other.node if isinstance(other, Peer) else other
        return PeerSource(self.node, peer.peer_id, peer.addresses)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerProcess:
    """A node in a process of its own, which serves `store`."""

    process: "subprocess.Popen[str]"
    store: BlobStore
    peer_id: str
    addresses: list[str]
    helpers: list[int]  # process ids
    sockets: Path


StartPeer = Callable[..., Awaitable[Peer]]


@asynccontextmanager
async def open_peers(folder: Path) -> AsyncIterator[StartPeer]:
    """Gives a function that starts a node by name; all are stopped at the end."""
    async with AsyncExitStack() as stack:

        async def start(name: str, **options: Any) -> Peer:
            store = BlobStore(folder / name)
            node = await PeerNode.start(store, folder / f"{name}.key", public=False, **options)
            return Peer(node=await stack.enter_async_context(node), store=store)

        yield start


@contextmanager
def peer_process(folder: Path, **options: object) -> Iterator[PeerProcess]:
    """A node in a process of its own; `options` are those of PeerNode.start. Killed at the end."""
    command = [sys.executable, "-W", "ignore", "-c", _NODE_SCRIPT, str(folder), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            peer_id, addresses, helpers, sockets = json.loads(process.stdout.readline())
            yield PeerProcess(
                process=process,
                store=BlobStore(folder / "blobs"),
                peer_id=peer_id,
                addresses=addresses,
                helpers=helpers,
                sockets=Path(sockets),
            )
        finally:
            process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """Random bytes of several pieces, their index, and who made them."""

    contributor: Peer
    size_bytes: int
    blob_hash: str
    pieces_hash: str


def contribute(peer: Peer, size_bytes: int) -> Payload:
    """Put a payload of that size into the peer's store, as a worker does."""
    data = os.urandom(size_bytes)
    return Payload(
        contributor=peer,
        size_bytes=size_bytes,
        blob_hash=peer.store.put(data),
        pieces_hash=peer.store.put(make_piece_index(data)),
    )


def daemon_of(node: PeerNode) -> psutil.Process:
    """The node's libp2p daemon: when it is killed, the node is gone for everybody else."""
    sockets = str(node._folder)
    return next(child for child in psutil.Process().children() if any(sockets in word for word in child.cmdline()))


@dataclass
class WatchedSource:
    """A source whose deliveries are counted, in bytes by blob; `began` is set with the first ones."""

    source: PeerSource
    began: asyncio.Event = field(default_factory=asyncio.Event)
    delivered: Counter[str] = field(default_factory=Counter)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.source.name

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        await self.source.fetch(blob_hash, size_bytes, _CountingSink(self, blob_hash, sink))

    async def wait_until_delivered(self, blob_hash: str, num_bytes: int) -> None:
        """Raises TimeoutError after 20 s."""
        async with asyncio.timeout(20):
            while self.delivered[blob_hash] < num_bytes:
                self._more.clear()
                await self._more.wait()


@dataclass
class _CountingSink:
    watched: WatchedSource
    blob_hash: str
    sink: BlobSink

    @property
    def offset(self) -> int:
        return self.sink.offset

    @property
    def end(self) -> int:
        return self.sink.end

    async def write(self, chunk: bytes | memoryview) -> None:
        self.watched.delivered[self.blob_hash] += len(chunk)
        await self.sink.write(chunk)
        self.watched.began.set()
        self.watched._more.set()
