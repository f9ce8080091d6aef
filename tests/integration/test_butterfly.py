"""The butterfly among honest peers, and what it refuses. Peers that lie, fall silent or die: tests/chaos."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from protocol.errors import ConfigError, PayloadError
from protocol.exchange.butterfly import ButterflyTimeouts, average_butterfly
from protocol.exchange.butterfly.parts import get_part_codec
from protocol.exchange.butterfly.round import ButterflyRound
from protocol.exchange.peer import PeerNode
from tests.butterfly_rounds import SIZE, Vector, group_of, make_vectors, play, started_nodes

PATIENCE = ButterflyTimeouts(start_s=30.0, sender_s=30.0, reducer_s=40.0, round_s=60.0)
pytestmark = [
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


@pytest.mark.parametrize(("codec", "tolerance"), [("float32", 1e-6), ("float16", 3e-3), ("uniform8", 2.0)])
async def test_all_peers_hold_the_weighted_mean_when_a_round_ends(
    nodes: list[PeerNode], codec: str, tolerance: float
) -> None:
    weights = (1.0, 250.0, 33.5, 7.0)
    outcomes = await play(nodes, group_of(nodes, weights), codec=codec, timeouts=PATIENCE)
    expected = np.average(np.stack(make_vectors(4, SIZE)).astype(np.float64), axis=0, weights=weights)
    assert np.abs(outcomes[0] - expected).max() < tolerance
    assert np.abs(outcomes[0] - expected).mean() < tolerance / 10
    assert outcomes[0].dtype == np.float32
    assert len({outcome.tobytes() for outcome in outcomes}) == 1


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_mean_is_right_when_there_are_fewer_parameters_than_parts(nodes: list[PeerNode], size: int) -> None:
    outcomes = await play(nodes[:3], group_of(nodes[:3]), size=size, codec="float32", timeouts=PATIENCE)
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


async def test_round_begins_when_the_last_peer_comes_late(nodes: list[PeerNode]) -> None:
    waiting = asyncio.Event()

    class WaitingRound(ButterflyRound):
        async def _work(self) -> Vector:
            waiting.set()
            return await super()._work()

    group, codec = group_of(nodes[:2]), get_part_codec("float16")
    first = asyncio.create_task(WaitingRound(nodes[0], group, np.ones(10, np.float32), codec, PATIENCE).run())
    await waiting.wait()
    second = await average_butterfly(nodes[1], group=group, vector=np.full(10, 3, np.float32))
    assert (await first).tolist() == second.tolist() == [2.0] * 10


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
