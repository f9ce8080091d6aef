"""Blobs between real libp2p nodes on loopback, and what is left behind when a process is killed."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.errors import ManyhandsError, TransferError, UnavailableError
from protocol.exchange.fetch import Wanted, fetch_blob, fetch_blobs
from protocol.exchange.peer import MAX_ADDRESSES, PeerNode, PeerSource, dialable
from protocol.exchange.source import WRONG_CONTENT, Patience, Source
from protocol.exchange.store import BlobStore
from protocol.exchange.throttle import Throttle
from protocol.identity import Identity
from tests.nodes import TINY_BPS, StartPeer, WatchedSource, daemon_of, open_peers, peer_process

# hivemind uses importlib.resources.path, which is deprecated from 3.11 to 3.12
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning:hivemind.p2p.p2p_daemon")

DATA = b"".join(index.to_bytes(4, "big") for index in range(750_000))
STRANGER = Identity.generate().peer_id


@pytest.fixture
async def start_peer(tmp_path: Path) -> AsyncIterator[StartPeer]:
    async with open_peers(tmp_path) as start:
        yield start


class NoSink:
    """Takes nothing."""

    offset, end = 0, 5

    async def write(self, chunk: bytes | memoryview) -> None:
        raise AssertionError


def has_ended(process: psutil.Process) -> bool:
    """Within a few seconds. A zombie has ended too: in a container nobody may be there to reap it."""
    try:
        process.wait(timeout=3)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("data", [b"x", DATA], ids=["1 B", "3 MB"])
async def test_blob_passes_from_node_to_node_when_asked_for(start_peer: StartPeer, data: bytes) -> None:
    first, second, third = await start_peer("first"), await start_peer("second"), await start_peer("third")
    blob_hash = first.store.put(data)
    await fetch_blob(second.store, blob_hash, len(data), [second.source(first)])
    await fetch_blob(third.store, blob_hash, len(data), [third.source(second)])
    assert third.store.read(blob_hash) == data
    assert (first.node.bytes_sent, second.node.bytes_received) == (len(data), len(data))
    assert (second.node.bytes_sent, third.node.bytes_received) == (len(data), len(data))


async def test_peer_id_is_the_identitys_when_the_node_starts(start_peer: StartPeer, tmp_path: Path) -> None:
    expected = Identity.load_or_create(tmp_path / "one.key").peer_id
    peer = await start_peer("one")
    assert peer.node.peer_id == expected
    assert all(address.endswith(f"/p2p/{expected}") for address in peer.node.addresses)


async def test_peer_behind_no_address_is_served_from_when_it_is_connected(start_peer: StartPeer) -> None:
    hidden, public = await start_peer("hidden"), await start_peer("public")
    theirs, ours = public.store.put(b"theirs"), hidden.store.put(b"ours")
    await fetch_blob(hidden.store, theirs, 6, [hidden.source(public)])  # the hidden peer dials out …
    await fetch_blob(public.store, ours, 4, [PeerSource(public.node, hidden.node.peer_id, ())])
    assert public.store.has(ours)


async def test_fetch_resumes_when_half_is_there(start_peer: StartPeer) -> None:
    first, second = await start_peer("first"), await start_peer("second")
    blob_hash = first.store.put(DATA)
    with second.store.receive(blob_hash, len(DATA)) as writer:
        writer.write(DATA[:1_500_000])
    await fetch_blob(second.store, blob_hash, len(DATA), [second.source(first)])
    assert second.store.read(blob_hash) == DATA
    assert second.node.bytes_received == 1_500_000


async def test_eight_blobs_come_at_once_when_fetched_concurrently(start_peer: StartPeer) -> None:
    first, second = await start_peer("first"), await start_peer("second")
    blobs = [DATA[index * 300_000 :][:300_000] for index in range(8)]
    hashes = [first.store.put(blob) for blob in blobs]
    wanted = [Wanted(blob_hash=h, size_bytes=300_000, sources=[second.source(first)]) for h in hashes]
    await fetch_blobs(second.store, wanted, concurrency=8)
    assert [second.store.read(h) for h in hashes] == blobs


async def test_last_bytes_arrive_when_the_fetching_peer_is_slow(start_peer: StartPeer) -> None:
    """The sender is done long before: if it closed the stream first, the daemon could drop what is under way."""
    first, second = await start_peer("first"), await start_peer("second")
    blob_hash = first.store.put(DATA[:600_000])
    slow = Throttle(8 * 600_000)
    await fetch_blob(second.store, blob_hash, 600_000, [second.source(first)], throttle=slow)
    assert second.store.has(blob_hash)


async def test_other_peer_is_asked_when_content_is_wrong(start_peer: StartPeer) -> None:
    liar, honest, third = await start_peer("liar"), await start_peer("honest"), await start_peer("third")
    blob_hash = honest.store.put(DATA)
    liar.store.put(DATA)
    liar.store.path(blob_hash).write_bytes(DATA[:-1] + b"!")
    told: list[tuple[str, str]] = []
    sources = [third.source(liar), third.source(honest)]
    await fetch_blob(third.store, blob_hash, len(DATA), sources, on_failure=lambda s, r: told.append((s.name, r)))
    assert third.store.read(blob_hash) == DATA
    assert told == [(liar.node.peer_id, WRONG_CONTENT)]


async def test_other_peer_goes_on_when_one_stalls(start_peer: StartPeer) -> None:
    stalling = await start_peer("stalling", max_upload_bps=TINY_BPS)
    fast, third = await start_peer("fast"), await start_peer("third")
    blob_hash = stalling.store.put(DATA)
    fast.store.put(DATA)
    sources = [third.source(stalling), third.source(fast)]
    async with asyncio.timeout(15):  # neither 100 s nor the 20 s of Patience()
        await fetch_blob(third.store, blob_hash, len(DATA), sources, patience=Patience(stall_timeout_s=2.0))
    assert third.store.read(blob_hash) == DATA
    assert fast.node.bytes_sent == len(DATA) - 4096


async def test_partial_file_is_kept_when_a_fetch_is_cancelled(start_peer: StartPeer) -> None:
    first, second = await start_peer("first", max_upload_bps=TINY_BPS), await start_peer("second")
    blob_hash = first.store.put(DATA)
    source = WatchedSource(second.source(first))
    fetching = asyncio.create_task(fetch_blob(second.store, blob_hash, len(DATA), [source]))
    await source.began.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert second.store.path(blob_hash).with_name(blob_hash + ".part").stat().st_size == 4096


async def test_reason_is_clear_when_the_blob_is_unknown(start_peer: StartPeer) -> None:
    first, second = await start_peer("first"), await start_peer("second")
    with pytest.raises(UnavailableError, match=f"{first.node.peer_id}: does not have the blob"):
        await fetch_blob(second.store, "0" * 64, 5, [second.source(first)])


async def test_reason_is_clear_and_no_socket_is_left_when_a_peer_cannot_be_reached(start_peer: StartPeer) -> None:
    node = (await start_peer("only")).node
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: nobody else takes the port, and it refuses
        address = f"/ip4/127.0.0.1/tcp/{unused.getsockname()[1]}"
        before = psutil.Process().num_fds()
        for addresses in ([address], ["no address"], [], [address] * 100):
            with pytest.raises(TransferError, match=f"{STRANGER}: could not be reached"):
                await node.fetch("0" * 64, 5, STRANGER, addresses, NoSink())
        with pytest.raises(TransferError, match="could not be reached"):
            await node.fetch("0" * 64, 5, "0OIl" * 1000, [address], NoSink())
        await asyncio.sleep(0)
        assert psutil.Process().num_fds() == before


async def test_impostor_is_not_served_from_when_it_has_another_key(start_peer: StartPeer) -> None:
    first, second = await start_peer("first"), await start_peer("second")
    blob_hash = first.store.put(DATA)
    addresses = [address.partition("/p2p/")[0] for address in first.node.addresses]
    with pytest.raises(UnavailableError, match="could not be reached"):
        await fetch_blob(second.store, blob_hash, len(DATA), [PeerSource(second.node, STRANGER, addresses)])
    assert first.node.bytes_sent == 0


async def test_death_is_noticed_when_the_daemon_is_killed(start_peer: StartPeer) -> None:
    first, second = await start_peer("first"), await start_peer("second")
    assert second.node.alive
    daemon_of(second.node).kill()
    async with asyncio.timeout(30):
        await second.node.died.wait()
    assert not second.node.alive
    with pytest.raises(UnavailableError, match="this machine's libp2p daemon is gone"):
        await fetch_blob(second.store, first.store.put(DATA), len(DATA), [second.source(first)])


async def test_nothing_is_left_when_a_node_stops(start_peer: StartPeer) -> None:
    node = (await start_peer("one")).node
    helpers = psutil.Process().children()
    assert len(helpers) == 2  # daemon and watchdog
    await node.stop()
    assert not any(helper.is_running() for helper in helpers)
    assert not node._folder.exists()
    assert not node.alive
    assert not node.died.is_set()


@pytest.mark.parametrize("after_s", [0.001, 0.02, 0.06])
async def test_nothing_is_left_when_a_start_is_cancelled(tmp_path: Path, after_s: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(after_s):
            await PeerNode.start(BlobStore(tmp_path), tmp_path / "key", public=False)
    assert psutil.Process().children() == []


async def test_error_is_clear_when_the_daemon_cannot_listen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(ManyhandsError, match="the libp2p daemon did not start"):
            await PeerNode.start(BlobStore(tmp_path), tmp_path / "key", host_maddrs=[address])
    assert psutil.Process().children() == []


async def test_daemon_and_folder_go_when_the_process_is_killed(start_peer: StartPeer, tmp_path: Path) -> None:
    with peer_process(tmp_path, max_upload_bps=TINY_BPS) as peer:
        daemons = [psutil.Process(pid) for pid in peer.helpers]
        assert all(os.getsid(pid) != os.getsid(peer.process.pid) for pid in peer.helpers)  # Ctrl-C does not reach them
        blob_hash = peer.store.put(DATA)
        second, third = await start_peer("second"), await start_peer("third")
        third.store.put(DATA)
        doomed = WatchedSource(second.source(peer))
        sources: list[Source] = [doomed, second.source(third)]
        fetching = asyncio.create_task(fetch_blob(second.store, blob_hash, len(DATA), sources))
        await doomed.began.wait()
        peer.process.kill()
        async with asyncio.timeout(5):  # long before the stall timeout of 20 s: the break is seen
            await fetching
        assert second.store.read(blob_hash) == DATA
        assert all(has_ended(daemon) for daemon in daemons)
        assert not peer.sockets.exists()


@given(st.lists(st.one_of(st.text(max_size=40), st.from_regex(r"/ip[46]/[0-9a-f.:]+/tcp/[0-9]{1,6}")), max_size=20))
@example(["/dns4/" + "a." * 120 + "/tcp/1"])
@example(["/dns4/" + "x" * 90 + "/tcp/99999"])
@example(["/dns4/.xn--/tcp/1"])
def test_addresses_are_at_most_passed_over_when_hostile(addresses: list[str]) -> None:
    assert len(dialable(addresses, STRANGER, loopback=True)) <= min(len(addresses), MAX_ADDRESSES)


def test_only_plain_addresses_are_dialed_when_a_peer_claims_many_kinds() -> None:
    good = ["/ip4/203.0.113.7/tcp/4001", "/ip6/2001:db8::1/udp/4001/quic-v1", "/dns4/example.org/tcp/443"]
    bad = [
        "/unix/tmp/socket",
        "/ip4/127.0.0.1/tcp/22",
        "/ip6/::1/tcp/22",
        "/ip4/169.254.169.254/tcp/80",
        "/ip4/0.0.0.0/tcp/1",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{STRANGER}/p2p-circuit/p2p/{STRANGER}",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{Identity.generate().peer_id}",
    ]
    found = dialable([*bad, f"{good[0]}/p2p/{STRANGER}", *good[1:]], STRANGER, loopback=False)
    assert [str(maddr) for maddr in found] == good
