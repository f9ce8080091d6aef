"""The butterfly among real libp2p nodes on loopback, and among them peers that lie, fall silent or die.

The hostile peers are the product's own round with one thing done otherwise, so that all the rest of them is right.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from hivemind.proto import averaging_pb2
from numpy.typing import NDArray

from protocol.errors import ButterflyError, ConfigError, PayloadError
from protocol.exchange.butterfly import ButterflyGroup, ButterflyTimeouts, average_butterfly, group_id_of
from protocol.exchange.butterfly.links import LINK_PROTOCOL, Tell
from protocol.exchange.butterfly.parts import PART_VALUES_MAX, get_part_codec
from protocol.exchange.butterfly.reduce import ButterflyRunner
from protocol.exchange.butterfly.round import PART_PROTOCOL, ButterflyRound
from protocol.exchange.butterfly.streams import FrameStream, open_stream
from protocol.exchange.peer import PeerNode
from protocol.exchange.store import BlobStore
from protocol.identity import Identity

pytestmark = [
    pytest.mark.chaos,  # real timeouts of seconds: on two busy cores some run out, so not in `make test`
    pytest.mark.asyncio(loop_scope="module"),
    # hivemind uses importlib.resources.path, which is deprecated from 3.11 to 3.12
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning:hivemind.p2p.p2p_daemon"),
    # it hands numpy arrays to torch, and a torch number to another
    pytest.mark.filterwarnings("ignore::UserWarning:hivemind.compression.*"),
]

Vector = NDArray[np.float32]
SIZE = 3 * PART_VALUES_MAX + 1000  # of three peers, each reduces two parts
HASTE = ButterflyTimeouts(start_s=5.0, sender_s=1.0, reducer_s=2.0, round_s=10.0)
DOOMED_SCRIPT = """
import asyncio, json, sys
from pathlib import Path
import numpy as np
from protocol.exchange.butterfly import ButterflyGroup, average_butterfly
from protocol.exchange.butterfly.reduce import ButterflyRunner
from protocol.exchange.butterfly.round import ButterflyRound
from protocol.exchange.peer import PeerNode
from protocol.exchange.store import BlobStore

class StoppingRunner(ButterflyRunner):
    async def _send_parts(self, reducer, stream):
        part = self._parts_by_peer[reducer][0]
        await stream.send(self._write_request(part, 0), 5.0)
        print("half", flush=True)
        await asyncio.Event().wait()

async def main():
    folder = Path(sys.argv[1])
    node = await PeerNode.start(BlobStore(folder / "blobs"), folder / "key", public=False)
    print(json.dumps([node.peer_id, node.addresses]), flush=True)
    group = ButterflyGroup(**json.loads(sys.stdin.readline()))
    ButterflyRound.runner_type = StoppingRunner
    await average_butterfly(node, group=group, vector=np.ones(int(sys.argv[2]), np.float32))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("butterfly")


async def start_node(folder: Path, name: str) -> PeerNode:
    return await PeerNode.start(BlobStore(folder / name), folder / f"{name}.key", public=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(folder: Path) -> AsyncIterator[list[PeerNode]]:
    """Four nodes for all tests: that a round works after so many failed ones is a test in itself."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(await start_node(folder, f"node{index}")) for index in range(4)]


rounds_played = 0


def group_of(nodes: Sequence[PeerNode], weights: Sequence[float] = (), extra: Sequence[str] = ()) -> ButterflyGroup:
    global rounds_played
    rounds_played += 1
    peers = (*(node.peer_id for node in nodes), *extra)
    return ButterflyGroup(
        group_id=group_id_of("test", rounds_played),
        peers=peers,
        weights=tuple(weights) or (1.0,) * len(peers),
        addresses={node.peer_id: node.addresses for node in nodes},
    )


def make_vectors(count: int, size: int) -> list[Vector]:
    rng = np.random.default_rng(size)
    return [rng.standard_normal(size, dtype=np.float32) for _ in range(count)]


async def play(
    nodes: Sequence[PeerNode],
    group: ButterflyGroup,
    size: int = SIZE,
    codec: str = "float16",
    hostile: type[ButterflyRound] | None = None,
    timeouts: ButterflyTimeouts = HASTE,
) -> list[Any]:
    """What the honest nodes end with, a vector or an exception; with `hostile`, the last node is not one of them."""
    vectors = make_vectors(len(nodes), size)
    num_honest = len(nodes) if hostile is None else len(nodes) - 1
    adversaries = []
    if hostile is not None:
        adversary = hostile(nodes[-1], group, vectors[-1], get_part_codec(codec), timeouts)
        adversaries.append(asyncio.ensure_future(adversary.run()))
    honest = [
        average_butterfly(node, group=group, vector=vector, codec=codec, timeouts=timeouts)
        for node, vector in zip(nodes[:num_honest], vectors, strict=False)
    ]
    try:
        async with asyncio.timeout(timeouts.round_s + 3.0):
            return await asyncio.gather(*honest, return_exceptions=True)
    finally:
        for task in adversaries:
            task.cancel()
        await asyncio.gather(*adversaries, return_exceptions=True)


def assert_all_blame(outcomes: Sequence[Any], culprit: str, reason: str) -> None:
    assert all(isinstance(outcome, ButterflyError) for outcome in outcomes), outcomes
    assert {outcome.peer for outcome in outcomes} == {culprit}, outcomes
    assert any(reason in outcome.reason for outcome in outcomes), outcomes


@pytest.mark.parametrize(("codec", "tolerance"), [("float32", 1e-6), ("float16", 3e-3), ("uniform8", 2.0)])
async def test_all_peers_hold_the_weighted_mean_when_a_round_ends(
    nodes: list[PeerNode], codec: str, tolerance: float
) -> None:
    weights = (1.0, 250.0, 33.5, 7.0)
    outcomes = await play(nodes, group_of(nodes, weights), codec=codec)
    expected = np.average(np.stack(make_vectors(4, SIZE)).astype(np.float64), axis=0, weights=weights)
    assert np.abs(outcomes[0] - expected).max() < tolerance
    assert np.abs(outcomes[0] - expected).mean() < tolerance / 10
    assert outcomes[0].dtype == np.float32
    assert len({outcome.tobytes() for outcome in outcomes}) == 1


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_mean_is_right_when_there_are_fewer_parameters_than_parts(nodes: list[PeerNode], size: int) -> None:
    outcomes = await play(nodes[:3], group_of(nodes[:3]), size=size, codec="float32")
    np.testing.assert_allclose(outcomes[0], np.mean(make_vectors(3, size), axis=0), atol=1e-6)
    assert len({outcome.tobytes() for outcome in outcomes}) == 1


async def test_callers_vector_is_as_before_when_it_is_read_only(nodes: list[PeerNode]) -> None:
    vectors = make_vectors(2, 1000)
    before = [vector.copy() for vector in vectors]
    for vector in vectors:
        vector.flags.writeable = False
    group = group_of(nodes[:2])
    await asyncio.gather(
        *(
            average_butterfly(node, group=group, vector=vector, codec="float32")
            for node, vector in zip(nodes[:2], vectors, strict=True)
        )
    )
    assert all((vector == copy).all() for vector, copy in zip(vectors, before, strict=True))


async def test_nothing_is_left_when_rounds_end(nodes: list[PeerNode]) -> None:
    await play(nodes[:3], group_of(nodes[:3]))
    await asyncio.sleep(0)
    tasks, descriptors = len(asyncio.all_tasks()), psutil.Process().num_fds()
    await play(nodes[:3], group_of(nodes[:3]))
    await play(nodes[:3], group_of(nodes[:3]), hostile=nan_round())
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == tasks
    assert psutil.Process().num_fds() <= descriptors


# -- peers that lie ----------------------------------------------------------------------------------------------------


def hostile_round(**methods: Any) -> type[ButterflyRound]:
    """A round whose runner has these methods instead of its own."""
    runner = type("HostileRunner", (ButterflyRunner,), methods)
    return type("HostileRound", (ButterflyRound,), {"runner_type": runner})


def nan_round() -> type[ButterflyRound]:
    return hostile_round(
        _write_request=lambda runner, part, index: ButterflyRunner._write_request(runner, part * torch.nan, index)
    )


def write_message(runner: Any, part: torch.Tensor, index: int, **changes: Any) -> bytes:
    message = averaging_pb2.AveragingData.FromString(ButterflyRunner._write_request(runner, part, index))
    for name, value in changes.items():
        setattr(message, name, value)
    return bytes(message.SerializeToString())


LIES = {
    "NaN": (lambda runner, part, index: ButterflyRunner._write_request(runner, part * torch.nan, index), "holds NaN"),
    "shape": (lambda runner, part, index: ButterflyRunner._write_request(runner, part[:-1], index), "of shape"),
    "weight": (lambda runner, part, index: write_message(runner, part, index, weight=1e9), "with the weight"),
    "group": (lambda runner, part, index: write_message(runner, part, index, group_id=b"other"), "not for this round"),
    "size": (lambda runner, part, index: bytes(10_000_000), "announced a message of 10000000 bytes"),
    "garbage": (lambda runner, part, index: b"\xff" * 100, "cannot be parsed"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_everyone_names_the_peer_when_it_sends_a_bad_part(nodes: list[PeerNode], lie: str) -> None:
    write_request, reason = LIES[lie]
    outcomes = await play(nodes, group_of(nodes), hostile=hostile_round(_write_request=write_request))
    assert_all_blame(outcomes, nodes[-1].peer_id, reason)


async def test_everyone_learns_of_it_when_only_one_was_sent_a_bad_part(nodes: list[PeerNode]) -> None:
    async def send_parts(runner: Any, reducer: int, stream: FrameStream) -> None:
        if reducer == 0:
            runner._parts_by_peer[0] = [part * torch.nan for part in runner._parts_by_peer[0]]
        await ButterflyRunner._send_parts(runner, reducer, stream)

    outcomes = await play(nodes, group_of(nodes), hostile=hostile_round(_send_parts=send_parts))
    assert_all_blame(outcomes, nodes[-1].peer_id, "holds NaN, an infinity")
    assert [outcome.reported_by == "" for outcome in outcomes] == [True, False, False]


class AlteringStream:
    """Alters what a reducer sends."""

    def __init__(self, stream: FrameStream, factor: float) -> None:
        self.peer_id, self.receive, self._send, self._factor = stream.peer_id, stream.receive, stream.send, factor

    async def send(self, frame: bytes, timeout_s: float) -> None:
        message = averaging_pb2.AveragingData.FromString(frame)
        values = np.frombuffer(message.tensor_part.buffer, np.float16).copy()
        values[0] *= self._factor
        message.tensor_part.buffer = values.tobytes()
        await self._send(message.SerializeToString(), timeout_s)


@pytest.mark.parametrize(("factor", "reason"), [(1.01, "did not send us the same average as"), (np.nan, "holds NaN")])
async def test_everyone_names_the_reducer_when_it_alters_one_part_for_one_peer(
    nodes: list[PeerNode], factor: float, reason: str
) -> None:
    victim = nodes[1].peer_id

    async def serve(runner: Any, stream: Any) -> None:
        await ButterflyRunner.serve(runner, AlteringStream(stream, factor) if stream.peer_id == victim else stream)  # type: ignore[arg-type]

    outcomes = await play(nodes, group_of(nodes), hostile=hostile_round(serve=serve))
    assert_all_blame(outcomes, nodes[-1].peer_id, reason)


async def test_nobody_commits_when_a_peer_lies_about_its_result(nodes: list[PeerNode]) -> None:
    async def average(runner: Any) -> Vector:
        return await ButterflyRunner.average(runner) + np.float32(1.0)

    outcomes = await play(nodes[:3], group_of(nodes[:3]), hostile=hostile_round(average=average))
    assert all(isinstance(outcome, ButterflyError) for outcome in outcomes), outcomes
    assert all(nodes[2].peer_id in str(outcome) for outcome in outcomes)


# -- peers that are not there ------------------------------------------------------------------------------------------


async def wait_forever(*_: object) -> None:
    await asyncio.Event().wait()


async def test_everyone_names_the_peer_when_it_sends_no_parts(nodes: list[PeerNode]) -> None:
    outcomes = await play(nodes, group_of(nodes), hostile=hostile_round(average=wait_forever))
    assert_all_blame(outcomes, nodes[-1].peer_id, "sent no part within 1 s")


async def test_everyone_names_the_peer_when_it_stops_after_its_first_part(nodes: list[PeerNode]) -> None:
    async def send_parts(runner: Any, reducer: int, stream: FrameStream) -> None:
        await stream.send(runner._write_request(runner._parts_by_peer[reducer][0], 0), 1.0)

    outcomes = await play(nodes[:3], group_of(nodes[:3]), hostile=hostile_round(_send_parts=send_parts))
    assert_all_blame(outcomes, nodes[2].peer_id, "sent nothing for 1 s")


async def test_everyone_names_the_reducer_when_it_never_answers(nodes: list[PeerNode]) -> None:
    async def serve(runner: Any, stream: FrameStream) -> None:
        runner.all_senders_started.set()
        await wait_forever()

    outcomes = await play(nodes, group_of(nodes), hostile=hostile_round(serve=serve))
    assert_all_blame(outcomes, nodes[-1].peer_id, "nothing for 2 s")


async def test_everyone_names_the_peer_when_it_does_not_confirm(nodes: list[PeerNode]) -> None:
    class SilentRound(ButterflyRound):
        async def _work(self) -> Vector:
            self._links.exchange_digests = wait_forever  # type: ignore[method-assign,assignment]
            return await super()._work()

    outcomes = await play(nodes[:3], group_of(nodes[:3]), hostile=SilentRound)
    assert_all_blame(outcomes, nodes[2].peer_id, "did not confirm its result within 2 s")


async def test_everyone_names_the_peer_when_it_does_not_come(nodes: list[PeerNode]) -> None:
    stranger = Identity.generate().peer_id
    timeouts = ButterflyTimeouts(start_s=1.0, sender_s=1.0, reducer_s=2.0, round_s=10.0)
    outcomes = await play(nodes[:3], group_of(nodes[:3], extra=[stranger]), timeouts=timeouts)
    assert_all_blame(outcomes, stranger, "did not come within 1 s")


async def test_round_begins_when_the_last_peer_comes_late(nodes: list[PeerNode]) -> None:
    waiting = asyncio.Event()

    class WaitingRound(ButterflyRound):
        async def _work(self) -> Vector:
            waiting.set()
            return await super()._work()

    group, codec = group_of(nodes[:2]), get_part_codec("float16")
    first = asyncio.create_task(WaitingRound(nodes[0], group, np.ones(10, np.float32), codec, HASTE).run())
    await waiting.wait()
    second = await average_butterfly(nodes[1], group=group, vector=np.full(10, 3, np.float32))
    assert (await first).tolist() == second.tolist() == [2.0] * 10


async def test_round_ends_when_peers_see_the_group_differently(nodes: list[PeerNode]) -> None:
    group = group_of(nodes[:3])
    other = ButterflyGroup(
        group_id=group.group_id, peers=group.peers, weights=(1.0, 1.0, 1.5), addresses=group.addresses
    )
    outcomes = await asyncio.gather(
        *(
            average_butterfly(node, group=view, vector=np.ones(10, np.float32), timeouts=HASTE)
            for node, view in zip(nodes, (group, group, other), strict=False)
        ),
        return_exceptions=True,
    )
    assert_all_blame(outcomes[:2], nodes[2].peer_id, "has another view of the group")
    assert isinstance(outcomes[2], ButterflyError)


@contextmanager
def doomed_process(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", str, list[str]]]:
    command = [sys.executable, "-W", "ignore", "-c", DOOMED_SCRIPT, str(folder), str(SIZE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            peer_id, addresses = json.loads(process.stdout.readline())
            yield process, peer_id, addresses
        finally:
            process.kill()


async def test_everyone_names_the_peer_at_once_when_it_is_killed_half_way(nodes: list[PeerNode], folder: Path) -> None:
    with doomed_process(folder / "doomed") as (process, peer_id, addresses):
        assert process.stdin is not None
        assert process.stdout is not None
        group = group_of(nodes[:2], extra=[peer_id])
        facts = {name: getattr(group, name) for name in ("group_id", "peers", "weights")}
        facts["addresses"] = {**group.addresses, peer_id: addresses}
        process.stdin.write(json.dumps(facts) + "\n")
        process.stdin.flush()
        patient = ButterflyTimeouts(start_s=15.0, sender_s=50.0, reducer_s=60.0, round_s=90.0)
        honest = asyncio.ensure_future(play(nodes[:2], ButterflyGroup(**facts), timeouts=patient))
        assert await asyncio.to_thread(process.stdout.readline) == "half\n"
        process.kill()
        async with asyncio.timeout(5.0):
            outcomes = await honest
        assert_all_blame(outcomes, peer_id, "broke off")


async def test_own_machine_is_named_when_its_daemon_dies(nodes: list[PeerNode], folder: Path) -> None:
    async with await start_node(folder, "dying") as node:

        async def average(_: object) -> None:
            sockets = str(node._folder)
            next(c for c in psutil.Process().children() if any(sockets in word for word in c.cmdline())).kill()
            await node.died.wait()
            await asyncio.Event().wait()

        doomed = hostile_round(average=average)
        group = group_of([*nodes[:2], node])
        codec = get_part_codec("float16")
        ending = asyncio.ensure_future(doomed(node, group, np.ones(SIZE, np.float32), codec, HASTE).run())
        outcomes = await play(nodes[:2], group)
        assert_all_blame(outcomes, node.peer_id, "broke off")
        with pytest.raises(ButterflyError, match="this machine's libp2p daemon is gone"):
            await ending


async def test_stranger_is_shut_out_when_it_knows_the_group_id(nodes: list[PeerNode]) -> None:
    members, stranger = nodes[:3], nodes[3]
    group = group_of(members)
    playing = asyncio.ensure_future(play(members, group))
    refused = 0
    while not playing.done():
        for protocol_name in (LINK_PROTOCOL, PART_PROTOCOL):
            try:
                name, victim = protocol_name + group.group_id, members[0]
                stream = await open_stream(stranger, name, victim.peer_id, victim.addresses, 1000, 2.0)
            except ButterflyError:
                continue  # before it begins and after it ended
            try:
                await stream.send(bytes([Tell.FAILED, 0]) + b"lies", 2.0)
                await stream.receive(2.0)
            except ButterflyError as error:
                refused += error.reason == "broke off"
            await stream.close()
    outcomes = await playing
    assert len({outcome.tobytes() for outcome in outcomes}) == 1
    assert refused > 0


# -- calls that make no sense ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
async def test_vector_is_refused_when_it_cannot_travel(nodes: list[PeerNode], value: float) -> None:
    vector = np.full(10, value, np.float32)
    with pytest.raises(PayloadError):
        await average_butterfly(nodes[0], group=group_of(nodes[:2]), vector=vector)


async def test_call_is_refused_when_it_makes_no_sense(nodes: list[PeerNode]) -> None:
    vector = np.ones(10, np.float32)
    with pytest.raises(ValueError, match="is not in the group"):
        await average_butterfly(nodes[3], group=group_of(nodes[:2]), vector=vector)
    with pytest.raises(ConfigError, match="unknown butterfly codec `int3`"):
        await average_butterfly(nodes[0], group=group_of(nodes[:2]), vector=vector, codec="int3")
