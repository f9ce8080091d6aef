"""The butterfly with a peer that lies: everyone notices, nobody commits, and the liar is named."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from hivemind.proto import averaging_pb2

from protocol.errors import ButterflyError
from protocol.exchange.butterfly import ButterflyGroup, average_butterfly
from protocol.exchange.butterfly.links import LINK_PROTOCOL, Tell
from protocol.exchange.butterfly.reduce import ButterflyRunner
from protocol.exchange.butterfly.round import PART_PROTOCOL, ButterflyRound
from protocol.exchange.butterfly.streams import FrameStream, open_stream
from protocol.exchange.peer import PeerNode
from tests.butterfly_rounds import HASTE, Vector, assert_all_blame, group_of, hostile_round, play, started_nodes

pytestmark = [
    pytest.mark.chaos,  # real timeouts of seconds: on two busy cores some run out, so not in `make test`
    pytest.mark.asyncio(loop_scope="module"),
    # hivemind uses importlib.resources.path, which is deprecated from 3.11 to 3.12
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning:hivemind.p2p.p2p_daemon"),
    # it hands numpy arrays to torch, and a torch number to another
    pytest.mark.filterwarnings("ignore::UserWarning:hivemind.compression.*"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[PeerNode]]:
    """For all tests: that a round works after so many failed ones is a test in itself."""
    async with started_nodes(tmp_path_factory.mktemp("butterfly"), 4) as nodes:
        yield nodes


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


async def test_nothing_is_left_when_rounds_end(nodes: list[PeerNode]) -> None:
    await play(nodes[:3], group_of(nodes[:3]))
    await asyncio.sleep(0)
    tasks, descriptors = len(asyncio.all_tasks()), psutil.Process().num_fds()
    await play(nodes[:3], group_of(nodes[:3]))
    await play(nodes[:3], group_of(nodes[:3]), hostile=nan_round())
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == tasks
    assert psutil.Process().num_fds() <= descriptors


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
