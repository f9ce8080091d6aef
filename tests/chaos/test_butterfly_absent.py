"""The butterfly with a peer that is not there, falls silent, or dies: the others end soon, and name it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio

from protocol.errors import ButterflyError
from protocol.exchange.butterfly import ButterflyGroup, ButterflyTimeouts
from protocol.exchange.butterfly.parts import get_part_codec
from protocol.exchange.butterfly.round import ButterflyRound
from protocol.exchange.butterfly.streams import FrameStream
from protocol.exchange.peer import PeerNode
from protocol.identity import Identity
from tests.butterfly_rounds import (
    HASTE,
    SIZE,
    Vector,
    assert_all_blame,
    group_of,
    hostile_round,
    play,
    start_node,
    started_nodes,
    wait_forever,
)

pytestmark = [
    pytest.mark.chaos,  # real timeouts of seconds: on two busy cores some run out, so not in `make test`
    pytest.mark.asyncio(loop_scope="module"),
    # hivemind uses importlib.resources.path, which is deprecated from 3.11 to 3.12
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning:hivemind.p2p.p2p_daemon"),
    # it hands numpy arrays to torch, and a torch number to another
    pytest.mark.filterwarnings("ignore::UserWarning:hivemind.compression.*"),
]
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[PeerNode]]:
    """For all tests: that a round works after so many failed ones is a test in itself."""
    async with started_nodes(tmp_path_factory.mktemp("butterfly"), 4) as nodes:
        yield nodes


async def test_everyone_names_the_peer_when_it_sends_no_parts(nodes: list[PeerNode]) -> None:
    outcomes = await play(nodes, group_of(nodes), hostile=hostile_round(average=wait_forever))
    assert_all_blame(outcomes, nodes[-1].peer_id, "sent no part within 1.5 s")


async def test_everyone_names_the_peer_when_it_stops_after_its_first_part(nodes: list[PeerNode]) -> None:
    async def send_parts(runner: Any, reducer: int, stream: FrameStream) -> None:
        await stream.send(runner._write_request(runner._parts_by_peer[reducer][0], 0), 1.0)

    outcomes = await play(nodes[:3], group_of(nodes[:3]), hostile=hostile_round(_send_parts=send_parts))
    assert_all_blame(outcomes, nodes[2].peer_id, "sent nothing for 1.5 s")


async def test_everyone_names_the_reducer_when_it_never_answers(nodes: list[PeerNode]) -> None:
    async def serve(runner: Any, stream: FrameStream) -> None:
        runner.all_senders_started.set()
        await wait_forever()

    outcomes = await play(nodes, group_of(nodes), hostile=hostile_round(serve=serve))
    assert_all_blame(outcomes, nodes[-1].peer_id, "nothing for 3 s")


async def test_everyone_names_the_peer_when_it_does_not_confirm(nodes: list[PeerNode]) -> None:
    class SilentRound(ButterflyRound):
        async def _work(self) -> Vector:
            self._links.exchange_digests = wait_forever  # type: ignore[method-assign,assignment]
            return await super()._work()

    outcomes = await play(nodes[:3], group_of(nodes[:3]), hostile=SilentRound)
    assert_all_blame(outcomes, nodes[2].peer_id, "did not confirm its result within 3 s")


async def test_everyone_names_the_peer_when_it_does_not_come(nodes: list[PeerNode]) -> None:
    stranger = Identity.generate().peer_id
    timeouts = ButterflyTimeouts(start_s=2.0, sender_s=1.5, reducer_s=3.0, round_s=40.0)
    outcomes = await play(nodes[:3], group_of(nodes[:3], extra=[stranger]), timeouts=timeouts)
    assert_all_blame(outcomes, stranger, "did not come within 2 s")


async def test_everyone_names_the_peer_and_nothing_is_left_when_it_is_cancelled(nodes: list[PeerNode]) -> None:
    met = asyncio.Event()

    async def average(_: object) -> None:
        met.set()
        await asyncio.Event().wait()

    group, codec = group_of(nodes[:3]), get_part_codec("float16")
    leaving = hostile_round(average=average)(nodes[2], group, np.ones(SIZE, np.float32), codec, HASTE)
    task = asyncio.ensure_future(leaving.run())
    playing = asyncio.ensure_future(play(nodes[:2], group))
    await met.wait()
    task.cancel()
    assert_all_blame(await playing, nodes[2].peer_id, "broke off")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(group.group_id in name for node in nodes for name in node.p2p._client.control.handlers)


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


async def test_everyone_names_the_peer_at_once_when_it_is_killed_half_way(
    nodes: list[PeerNode], tmp_path: Path
) -> None:
    with doomed_process(tmp_path) as (process, peer_id, addresses):
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


async def test_own_machine_is_named_when_its_daemon_dies(nodes: list[PeerNode], tmp_path: Path) -> None:
    async with await start_node(tmp_path, "dying") as node:

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
