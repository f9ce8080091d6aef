"""What peers do wrong in mid-transfer, on real nodes: each fetch ends in time, and the right peer is named."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from protocol.errors import UnavailableError
from protocol.exchange.fetch import fetch_blob
from protocol.exchange.order import order_sources
from protocol.exchange.piece_index import PIECE_BYTES, make_piece_index
from protocol.exchange.source import WRONG_CONTENT, Patience, Source
from protocol.exchange.store import BlobStore
from protocol.signing import sha256_hex
from tests.nodes import (
    TINY_BPS,
    Peer,
    StartPeer,
    WatchedSource,
    daemon_of,
    open_peers,
    peer_process,
)

# hivemind uses importlib.resources.path, which is deprecated from 3.11 to 3.12
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning:hivemind.p2p.p2p_daemon")

DATA = b"".join(index.to_bytes(4, "big") for index in range(750_000))  # 3 MB: twelve pieces
HASH = sha256_hex(DATA)
INDEX_HASH = sha256_hex(make_piece_index(DATA))
SLOW_BPS = 8e6  # 3 s for all of it
QUICK = Patience(stall_timeout_s=2.0)


@pytest.fixture
async def start_peer(tmp_path: Path) -> AsyncIterator[StartPeer]:
    async with open_peers(tmp_path) as start:
        yield start


def give(*stores: BlobStore) -> None:
    for store in stores:
        store.put(DATA)
        store.put(make_piece_index(DATA))


async def fetch(
    me: Peer, sources: Sequence[Source], *, parallel: int = 3, patience: Patience = QUICK, timeout_s: float = 19.0
) -> list[tuple[str, str]]:
    """Fetch DATA, sooner than Patience() gives anybody up; who failed and why."""
    told: list[tuple[str, str]] = []
    async with asyncio.timeout(timeout_s):
        await fetch_blob(
            me.store,
            HASH,
            len(DATA),
            sources,
            pieces_hash=INDEX_HASH,
            parallel=parallel,
            patience=patience,
            on_failure=lambda source, reason: told.append((source.name, reason)),
        )
    assert me.store.read(HASH) == DATA
    return told


async def test_rest_comes_from_another_when_a_peer_is_killed_in_mid_transfer(
    start_peer: StartPeer, tmp_path: Path
) -> None:
    with peer_process(tmp_path / "doomed", max_upload_bps=SLOW_BPS) as peer:
        me, other = await start_peer("me"), await start_peer("other")
        give(peer.store, other.store)
        doomed = WatchedSource(me.source(peer))
        fetching = asyncio.create_task(fetch(me, [doomed, me.source(other)], parallel=1))
        await doomed.wait_until_delivered(HASH, 3 * PIECE_BYTES)
        peer.process.kill()
        told = await fetching
        assert [name for name, _ in told] == [peer.peer_id]
        assert other.node.bytes_sent < len(DATA) - 2 * PIECE_BYTES  # what came before is kept


async def test_rest_comes_from_another_when_a_peer_freezes(start_peer: StartPeer, tmp_path: Path) -> None:
    """Its process is stopped, its libp2p daemon is not: the stream stays open, and nothing comes."""
    with peer_process(tmp_path / "frozen", max_upload_bps=SLOW_BPS) as peer:
        me, other, third = await start_peer("me"), await start_peer("other"), await start_peer("third")
        give(peer.store, other.store)
        frozen = WatchedSource(me.source(peer))
        fetching = asyncio.create_task(fetch(me, [frozen, me.source(other)], parallel=1))
        await frozen.wait_until_delivered(HASH, 2 * PIECE_BYTES)
        peer.process.send_signal(signal.SIGSTOP)
        told = await fetching
        assert [name for name, _ in told] == [peer.peer_id]
        assert "stalled at byte" in told[0][1]
        with pytest.raises(UnavailableError, match=f"{peer.peer_id}: stalled at byte 0"):
            await fetch(third, [third.source(peer)], timeout_s=5.0)


async def test_liar_is_named_when_it_sends_a_corrupt_piece_among_right_ones(start_peer: StartPeer) -> None:
    me, liar, first, second = [await start_peer(name) for name in ("me", "liar", "first", "second")]
    give(liar.store, first.store, second.store)
    altered = bytearray(DATA)
    for number in range(0, len(DATA), PIECE_BYTES):
        altered[number + 1000] ^= 1
    liar.store.path(HASH).write_bytes(altered)
    told = await fetch(me, [me.source(peer) for peer in (first, liar, second)])
    assert told == [(liar.node.peer_id, WRONG_CONTENT)]
    assert liar.node.bytes_sent < 2 * 2 * PIECE_BYTES  # one run at most, of which the first piece is wrong


Lie = Callable[[BlobStore], object]
LIES: list[tuple[Lie, str]] = [
    (lambda store: store.path(HASH).write_bytes(DATA + b"more"), "has the blob with 3000004 bytes"),
    (lambda store: store.path(HASH).write_bytes(b""), "has the blob with 0 bytes"),
    (lambda store: store.path(HASH).write_bytes(bytes(len(DATA))), WRONG_CONTENT),
    (lambda store: store.path(INDEX_HASH).write_bytes(bytes(32 * 12)), WRONG_CONTENT),
    (lambda store: store.path(INDEX_HASH).write_bytes(bytes(32)), "has the blob with 32 bytes"),
    (lambda store: store.remove(HASH), "does not have the blob"),
]


async def test_other_peer_delivers_when_one_lies_about_what_it_has(start_peer: StartPeer) -> None:
    me, liar, honest = await start_peer("me"), await start_peer("liar"), await start_peer("honest")
    for lie, reason in LIES:
        for store in (liar.store, honest.store):
            store.remove(HASH)
            store.remove(INDEX_HASH)
        me.store.remove(HASH)
        me.store.remove(INDEX_HASH)
        give(liar.store, honest.store)
        lie(liar.store)
        told = await fetch(me, [me.source(liar), me.source(honest)], parallel=1)
        assert [name for name, _ in told] == [liar.node.peer_id]
        assert told[0][1].startswith(reason)


async def test_everybody_still_has_the_payload_when_a_seed_disappears(start_peer: StartPeer) -> None:
    contributor, seed = await start_peer("contributor"), await start_peer("seed")
    lost = await start_peer("lost", max_upload_bps=SLOW_BPS)
    workers = [await start_peer("one"), await start_peer("two")]
    give(contributor.store, lost.store)
    peers = {peer.node.peer_id: peer for peer in (contributor, lost, seed, *workers)}
    watched: list[WatchedSource] = []

    def fetch_in_order(me: Peer) -> Awaitable[list[tuple[str, str]]]:
        order = order_sources(
            HASH,
            me=me.node.peer_id,
            contributor=contributor.node.peer_id,
            seeds=[lost.node.peer_id, seed.node.peer_id],
            others=[peer.node.peer_id for peer in (contributor, *workers)],
        )
        sources = [WatchedSource(me.source(peers[peer_id])) for peer_id in order.peers]
        watched.extend(sources)
        return fetch(me, sources, parallel=order.parallel, patience=Patience(stall_timeout_s=2.0, absent_s=4.0))

    fetching = [asyncio.ensure_future(fetch_in_order(me)) for me in (seed, *workers)]
    begun = [asyncio.create_task(source.began.wait()) for source in watched if source.name == lost.node.peer_id]
    await asyncio.wait(begun, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    daemon_of(lost.node).kill()
    for task in begun:
        task.cancel()
    told = await asyncio.gather(*fetching)
    assert {name for failures in told for name, _ in failures} == {lost.node.peer_id}


async def test_fetch_goes_on_when_the_only_source_comes_back(start_peer: StartPeer) -> None:
    me, only = await start_peer("me"), await start_peer("only", max_upload_bps=SLOW_BPS)
    give(only.store)
    source = WatchedSource(me.source(only))
    fetching = asyncio.create_task(fetch(me, [source]))
    await source.wait_until_delivered(HASH, 3 * PIECE_BYTES)
    daemon_of(only.node).kill()
    with pytest.raises(UnavailableError, match=only.node.peer_id):
        await fetching
    again = await start_peer("only")  # under its identity, at another port: the old one is not dialled again for 5 s
    assert await fetch(me, [me.source(again)]) == []
    assert again.node.bytes_sent <= len(DATA) - 3 * PIECE_BYTES


async def test_upload_is_free_again_when_a_peer_goes_while_it_is_throttled(start_peer: StartPeer) -> None:
    first, me = await start_peer("first", max_upload_bps=TINY_BPS), await start_peer("me")
    give(first.store)
    source = WatchedSource(me.source(first))
    fetching = asyncio.create_task(fetch_blob(me.store, HASH, len(DATA), [source]))
    await source.began.wait()
    fetching.cancel()
    serving = [task for task in first.node._exchange._tasks if task is not None]
    _, pending = await asyncio.wait(serving, timeout=20)  # not the 100 s until the next chunk may be sent
    assert not pending
