"""Butterfly rounds for tests: real libp2p nodes on loopback, honest peers, and hostile ones.

A hostile peer is the product's own round with one thing done otherwise, so that all the rest of it is right.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ButterflyError
from protocol.exchange.butterfly import ButterflyGroup, ButterflyTimeouts, average_butterfly, group_id_of
from protocol.exchange.butterfly.parts import PART_VALUES_MAX, get_part_codec
from protocol.exchange.butterfly.reduce import ButterflyRunner
from protocol.exchange.butterfly.round import ButterflyRound
from protocol.exchange.peer import PeerNode
from protocol.exchange.store import BlobStore

Vector = NDArray[np.float32]
SIZE = 3 * PART_VALUES_MAX + 1000  # of three peers, each reduces two parts
HASTE = ButterflyTimeouts(start_s=20.0, sender_s=1.5, reducer_s=3.0, round_s=40.0)
_round_numbers = itertools.count()


async def start_node(folder: Path, name: str) -> PeerNode:
    return await PeerNode.start(BlobStore(folder / name), folder / f"{name}.key", public=False)


@asynccontextmanager
async def started_nodes(folder: Path, count: int) -> AsyncIterator[list[PeerNode]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(await start_node(folder, f"node{index}")) for index in range(count)]


def group_of(nodes: Sequence[PeerNode], weights: Sequence[float] = (), extra: Sequence[str] = ()) -> ButterflyGroup:
    """A group that was not there before: all of `nodes`, and the peer ids in `extra`."""
    peers = (*(node.peer_id for node in nodes), *extra)
    return ButterflyGroup(
        group_id=group_id_of("test", next(_round_numbers)),
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


def hostile_round(**methods: Any) -> type[ButterflyRound]:
    """A round whose runner has these methods instead of its own."""
    runner = type("HostileRunner", (ButterflyRunner,), methods)
    return type("HostileRound", (ButterflyRound,), {"runner_type": runner})


async def wait_forever(*_: object) -> None:
    await asyncio.Event().wait()
