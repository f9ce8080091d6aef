"""All peers fetch everybody's payload at the same time: who sends how much, on real nodes."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from protocol.exchange.fetch import Wanted, fetch_blob, fetch_blobs
from protocol.exchange.order import order_sources
from protocol.exchange.source import Patience, Source
from tests.nodes import Payload, Peer, StartPeer, WatchedSource, contribute, open_peers

# hivemind uses importlib.resources.path, which is deprecated from 3.11 to 3.12
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning:hivemind.p2p.p2p_daemon")


@pytest.fixture
async def start_peer(tmp_path: Path) -> AsyncIterator[StartPeer]:
    async with open_peers(tmp_path) as start:
        yield start


@dataclass
class Gathering:
    """Peers that fetch each other's payloads at the same time, and who sent how many copies of which."""

    peers: list[Peer]
    seeds: list[Peer] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)  # by sender and payload, in bytes until the end

    async def run(self, payloads: list[Payload]) -> None:
        await asyncio.gather(*(self._gather(peer, payloads) for peer in self.peers))
        sizes = {payload.blob_hash: payload.size_bytes for payload in payloads}
        self.copies = Counter({key: count / sizes[key[1]] for key, count in self.copies.items() if key[1] in sizes})

    async def _gather(self, me: Peer, payloads: list[Payload]) -> None:
        watched = {peer.node.peer_id: WatchedSource(me.source(peer)) for peer in self.peers}
        wanted = []
        for payload in sorted(payloads, key=lambda payload: payload.blob_hash):
            order = order_sources(
                payload.blob_hash,
                me=me.node.peer_id,
                contributor=payload.contributor.node.peer_id,
                seeds=[peer.node.peer_id for peer in self.seeds],
                others=[peer.node.peer_id for peer in self.peers if peer not in self.seeds],
            )
            wanted.append(
                Wanted(
                    blob_hash=payload.blob_hash,
                    size_bytes=payload.size_bytes,
                    sources=[watched[peer_id] for peer_id in order.peers],
                    pieces_hash=payload.pieces_hash,
                    parallel=order.parallel,
                )
            )
        await fetch_blobs(
            me.store,
            wanted,
            patience=Patience(absent_s=5.0),
            on_failure=lambda source, reason: self.failures.append((source.name, reason)),
        )
        for source in watched.values():
            for blob_hash, count in source.delivered.items():
                self.copies[source.name, blob_hash] += count


async def test_no_uplink_carries_a_payload_often_when_seven_peers_gather(start_peer: StartPeer) -> None:
    peers = [await start_peer(f"peer {number}") for number in range(7)]
    payloads = [contribute(peer, 1_500_000) for peer in peers]
    gathering = Gathering(peers)
    await gathering.run(payloads)
    assert all(peer.store.has(payload.blob_hash) for peer in peers for payload in payloads)
    assert gathering.failures == []
    assert max(gathering.copies.values()) < 2.1
    total_bytes = sum(peer.node.bytes_sent for peer in peers)
    assert 42 * 1_500_000 < total_bytes < 42 * 1_550_000  # each payload to six peers, and its index
    assert max(peer.node.bytes_sent for peer in peers) < 6 * 1_550_000


async def test_seeds_do_the_sending_when_there_are_some(start_peer: StartPeer) -> None:
    peers = [await start_peer(f"peer {number}") for number in range(6)]
    contributor, seeds = peers[0], peers[1:3]
    payload = contribute(contributor, 3_000_000)
    gathering = Gathering(peers, seeds)
    await gathering.run([payload])
    assert all(peer.store.has(payload.blob_hash) for peer in peers)
    assert gathering.failures == []
    sent = {peer.node.peer_id: gathering.copies[peer.node.peer_id, payload.blob_hash] for peer in peers}
    assert sent[contributor.node.peer_id] == 2  # to each seed
    assert sum(sent[seed.node.peer_id] for seed in seeds) >= 3  # some of the last pieces twice
    assert all(sent[peer.node.peer_id] == 0 for peer in peers[3:])


async def test_blob_flows_through_a_peer_while_it_is_fetching_it(start_peer: StartPeer) -> None:
    first, middle, last = await start_peer("first", max_upload_bps=16e6), await start_peer("b"), await start_peer("c")
    payload = contribute(first, 3_000_000)  # 1.5 s

    def fetch(me: Peer, source: Source) -> Coroutine[Any, Any, None]:
        return fetch_blob(
            me.store,
            payload.blob_hash,
            payload.size_bytes,
            [source],
            pieces_hash=payload.pieces_hash,
            patience=Patience(absent_s=5.0),
        )

    source = WatchedSource(last.source(middle))
    fetching = asyncio.create_task(fetch(last, source))
    await fetch(middle, middle.source(first))
    assert source.delivered[payload.blob_hash] > payload.size_bytes // 2
    await fetching
    assert last.store.has(payload.blob_hash)
    assert first.node.bytes_sent < 3_100_000
