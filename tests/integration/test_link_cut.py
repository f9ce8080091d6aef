"""The link between one worker and the coordinator is cut for a while in the middle of a run: loudly, and silently.

Three worker processes, of which one reaches the coordinator through a TCP proxy of this test; workers reach each other
throughout.
"""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from coordinator.operator import operate
from coordinator.run_folder import RunFolder
from protocol.documents import Manifest
from protocol.exchange.dial import split_address
from protocol.invite import decode_invite, encode_invite
from tests.processes import RunningCoordinator, RunningWorker, free_port, start_coordinator, start_worker, wait_until

HEARTBEAT_TIMEOUT_S = 12.0  # above the time until a round's deadline, also when late rounds have doubled exchange_s
ROUND_TIMEOUT_S = 15.0
NAMES = ("ada", "ben", "cleo")
OVERRIDES: dict[str, Any] = {
    "train": {"tokens": 100_000_000},
    "round": {
        "inner_steps": 40,
        "min_peers": 2,
        "exchange_s": 1.0,
        "merge_timeout_s": 1.0,
        "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S,
    },
}


class Proxy:
    """A TCP proxy in front of one address, in a thread. It can be opened again after each kind of cut."""

    def __init__(self, target: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._target = target
        self._flowing = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def open(self) -> None:
        """Accept connections and let bytes through, also those that were held back."""
        self._do(self._open())

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        self._do(self._cut())

    def stall(self) -> None:
        """Let no byte through, nor any end of a connection; new connections are accepted and get no answer."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def close(self) -> None:
        self._do(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(10)

    async def _open(self) -> None:
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connect, *split_address(self.address))

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._flowing.set()
        while self._writers:
            for writer in self._writers:
                writer.transport.abort()
            await asyncio.sleep(0.01)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*split_address(self._target))
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    await self._flowing.wait()
                    writer.write(data)
                    await writer.drain()
            await self._flowing.wait()
        finally:
            writer.close()
            self._writers.discard(writer)


@dataclass(kw_only=True)
class Scene:
    """A run with three workers; the last one, cleo, is behind the proxy."""

    coordinator: RunningCoordinator
    proxy: Proxy
    workers: list[RunningWorker]

    @property
    def round(self) -> int:
        return int(self.coordinator.status()["round"])

    @property
    def cleo(self) -> dict[str, Any]:
        """What the coordinator knows of the worker behind the proxy; nothing before it joined."""
        return next((peer for peer in self.coordinator.status()["peers"] if peer["name"] == "cleo"), {})

    def wait_until_all_train(self) -> int:
        """Return at the beginning of a round in which all workers have leases: the round."""
        before = self.round

        def has_begun() -> bool:
            status = self.coordinator.status()
            return status["round"] > before and "3 workers have leases" in status["reason"]

        wait_until(has_begun, 60, every_s=0.02)
        return self.round

    def wait_for_rounds(self, count: int) -> None:
        first = self.round
        wait_until(lambda: self.round >= first + count, count * ROUND_TIMEOUT_S)

    def wait_until_it_contributes_again(self) -> None:
        accepted = self.cleo["accepted"]
        wait_until(lambda: self.cleo["accepted"] > accepted, 30)

    def read_log(self, event: str) -> list[dict[str, Any]]:
        """What the coordinator logged of that kind."""
        lines = (json.loads(line) for line in self.coordinator.errors.read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def wait_for_manifest(self, round_: int) -> Manifest:
        """The manifest of a round that is open now."""
        wait_until(lambda: self.round > round_, ROUND_TIMEOUT_S)
        home = RunFolder(self.coordinator.folder)
        with closing(home.open_database(home.spec())) as database:
            row = next(database.read_ledger(0, kinds=("manifest",), from_round=round_))
        return Manifest.model_validate_json(row.body)

    def check_digests(self) -> None:
        """All workers live, they and a replay of the ledger have the same state, and nobody ever had another."""
        home = RunFolder(self.coordinator.folder)
        asyncio.run(operate(home, "pause"))
        wait_until(lambda: self.coordinator.status()["phase"] == "paused", ROUND_TIMEOUT_S)
        assert [worker.name for worker in self.workers if worker.is_alive()] == list(NAMES)
        statuses = [wait_until(partial(read_status, worker, self.round), 15) for worker in self.workers]
        command = [sys.executable, "-m", "manyhands", "verify", str(home.path), "--json"]
        verified = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert verified.returncode == 0, verified.stderr
        assert {status["digest"] for status in statuses if status} == {json.loads(verified.stdout)["digest"]}
        assert self.read_log("digest differs") == []
        asyncio.run(operate(home, "resume"))


def read_status(worker: RunningWorker, round_: int) -> dict[str, Any] | None:
    """What the worker says of itself once it has merged so many rounds."""
    status: dict[str, Any] = json.loads(next(worker.home.glob("runs/*/status.json")).read_text())
    return status if status["round"] == round_ else None


def redirect(coordinator: RunningCoordinator, address: str) -> str:
    """The coordinator's invite with another address, signed by its key."""
    invite, _ = decode_invite(coordinator.invite)
    return encode_invite(invite.model_copy(update={"address": address}), RunFolder(coordinator.folder).identity())


@contextmanager
def open_proxy(target: str) -> Iterator[Proxy]:
    proxy = Proxy(target)
    try:
        proxy.open()
        yield proxy
    finally:
        proxy.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The run, once all three have contributed."""
    folder = tmp_path_factory.mktemp("link")
    with (
        start_coordinator(folder / "run", options=["--no-validator"], **OVERRIDES) as coordinator,
        open_proxy(coordinator.address) as proxy,
        start_worker(coordinator.invite, folder / "ada") as ada,
        start_worker(coordinator.invite, folder / "ben") as ben,
        start_worker(redirect(coordinator, proxy.address), folder / "cleo") as cleo,
    ):
        scene = Scene(coordinator=coordinator, proxy=proxy, workers=[ada, ben, cleo])
        wait_until(lambda: scene.cleo.get("accepted", 0) > 0, 90)
        yield scene


def test_worker_contributes_again_when_its_connections_were_closed_and_refused(scene: Scene) -> None:
    round_ = scene.wait_until_all_train()
    scene.proxy.cut()
    closed = scene.wait_for_manifest(round_)
    assert (closed.leased_peers, len(closed.contributions)) == (3, 2)
    scene.wait_for_rounds(2)
    assert scene.cleo["status"] == "gone"
    scene.proxy.open()
    scene.wait_until_it_contributes_again()
    assert scene.cleo["peer"] in {line["peer"] for line in scene.read_log("left")}
    assert f"cannot reach the coordinator at {scene.proxy.address}" in scene.workers[-1].errors.read_text()
    scene.check_digests()


def test_worker_contributes_again_when_its_link_stalled_for_longer_than_the_heartbeat_timeout(scene: Scene) -> None:
    round_ = scene.wait_until_all_train()
    scene.proxy.stall()
    closed = scene.wait_for_manifest(round_)
    assert (closed.closed_because, closed.leased_peers, len(closed.contributions)) == ("deadline", 3, 2)
    wait_until(lambda: scene.cleo["status"] == "gone", 2 * HEARTBEAT_TIMEOUT_S)
    assert [line["peer"] for line in scene.read_log("silent peer")] == [scene.cleo["peer"]]
    scene.wait_for_rounds(2)
    scene.proxy.open()
    scene.wait_until_it_contributes_again()
    scene.check_digests()
