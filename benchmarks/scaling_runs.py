"""Small real runs on home links, whose bytes and seconds a round are compared with what the cost model says.

Every host is a network namespace with a link of its own (benchmarks.wan_run), so bytes are counted on the links, with
all headers, and seconds are those of real links. The run is paused before the first counted round and after the last:
what is counted is whole rounds and nothing else but heartbeats.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.wan_network import Host, Network, Traffic, inside, open_network
from benchmarks.wan_run import Run
from coordinator.run_folder import RunFolder
from protocol.documents import Genesis, Manifest
from protocol.run_spec import RunSpec

UP_MBPS, DOWN_MBPS = 20, 100
NUM_WORKERS = 6
HEARTBEAT_TIMEOUT_S = 5.0
SETTLE_S = 2.5  # two heartbeats: what workers say of themselves is up to date
TIMEOUT_S = 240.0
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a round was, as a mean over the counted ones. Bytes are on the links of all workers together."""

    num_parameters: int
    manifests: Sequence[Manifest]
    workers_up: float
    workers_down: float
    received_from_workers: float  # payloads alone, by the workers' own word
    coordinator_in: float
    coordinator_out: float
    close_s: float  # from a round's opening to its close, without inner steps
    merge_s: float  # from a close to the next opening


def make_spec(exchange: Mapping[str, Any], address: str) -> RunSpec:
    """Short inner steps, and time enough for every exchange."""
    return RunSpec.model_validate(
        {
            "name": "scaling",
            "model": {"config": MODEL},
            "data": {"sequence_length": 32, "max_tokens": 1_000_000},
            "train": {"batch_sequences": 1, "optimizer": "adamw", "learning_rate": 1e-3, "tokens": 100_000_000},
            "round": {
                "inner_steps": 2,
                "min_peers": NUM_WORKERS,
                "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S,
                "exchange_s": 120.0,
                "merge_timeout_s": 120.0,
            },
            "exchange": dict(exchange),
            "coordinator": {"listen": f"{address}:7640"},
        }
    )


def play(exchange: Mapping[str, Any], num_rounds: int) -> Played:
    """A run of NUM_WORKERS workers with this exchange. Needs root (benchmarks.wan_network.find_obstacle)."""
    with (
        tempfile.TemporaryDirectory(prefix="mhscale-", dir="/tmp") as folder,
        open_network(up_mbps=UP_MBPS, down_mbps=DOWN_MBPS) as network,
    ):
        return _Observed(network, Path(folder)).play(exchange, num_rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Count:
    """Since the start: rounds merged, bytes on links, and what the workers say."""

    rounds: int
    workers: Traffic
    coordinator: Traffic
    bytes_received: int
    compute_s: Sequence[float]


class _Observed(Run):
    """A run that can be paused and counted."""

    def __init__(self, network: Network, folder: Path) -> None:
        super().__init__(network, folder)
        self._hosts: dict[str, Host] = {}
        self._links = network
        self._home = folder / "run"

    def play(self, exchange: Mapping[str, Any], num_rounds: int) -> Played:
        """The first round, which makes connections, is not counted."""
        self.start(partial(make_spec, exchange), {f"worker{index}": False for index in range(NUM_WORKERS)})
        before = self._count_after(1)
        self._operate("resume")
        return self._conclude(before, self._count_after(before.rounds + num_rounds))

    def _count_after(self, num_rounds: int) -> _Count:
        """Wait until all workers have merged so many rounds, and pause."""
        self.wait_for(lambda: min(self._rounds_merged()) >= num_rounds, TIMEOUT_S)
        self._operate("pause")
        self.wait_for(lambda: self._ask()["phase"] == "paused", TIMEOUT_S)
        rounds = int(self._ask()["round"])
        self.wait_for(lambda: set(self._rounds_merged()) == {rounds}, TIMEOUT_S)
        time.sleep(SETTLE_S)
        self._rounds_merged()
        statuses = [worker.status for worker in self.workers]
        links = [self._links.read_traffic(worker.host) for worker in self.workers]
        return _Count(
            rounds=rounds,
            workers=Traffic(up_bytes=sum(t.up_bytes for t in links), down_bytes=sum(t.down_bytes for t in links)),
            coordinator=self._links.read_traffic(self._hosts["coordinator"]),
            bytes_received=sum(status["bytes_received"] for status in statuses),
            compute_s=[status["compute_s"] for status in statuses],
        )

    def _conclude(self, before: _Count, after: _Count) -> Played:
        counted = after.rounds - before.rounds
        folder = RunFolder(self._home)
        with closing(folder.open_database(folder.spec())) as database:
            genesis, *manifests = database.read_ledger(kinds=("genesis", "manifest"))
            rounds = database.read_rounds(last=counted)
        open_s = fmean(row.seconds for row in rounds[1:])
        compute_s = max(late - early for early, late in zip(before.compute_s, after.compute_s, strict=True)) / counted
        return Played(
            num_parameters=Genesis.model_validate_json(genesis.body).num_parameters,
            manifests=[Manifest.model_validate_json(row.body) for row in manifests[before.rounds :]],
            workers_up=(after.workers.up_bytes - before.workers.up_bytes) / counted,
            workers_down=(after.workers.down_bytes - before.workers.down_bytes) / counted,
            received_from_workers=(after.bytes_received - before.bytes_received) / counted,
            coordinator_in=(after.coordinator.down_bytes - before.coordinator.down_bytes) / counted,
            coordinator_out=(after.coordinator.up_bytes - before.coordinator.up_bytes) / counted,
            close_s=open_s - compute_s,
            merge_s=(rounds[-1].unix_s - rounds[0].unix_s) / (counted - 1) - open_s,
        )

    def _rounds_merged(self) -> list[int]:
        for worker in self.workers:
            worker.observe(self._links)
        return [int(worker.status.get("round", -1)) for worker in self.workers]

    def _ask(self) -> Any:
        return json.loads(self._operate("status", "--json"))

    def _operate(self, verb: str, *options: str) -> str:
        prefix = inside(self._hosts["coordinator"].namespace)
        command = [*prefix, sys.executable, "-m", "manyhands", "coordinator", verb, str(self._home), *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _spawn(self, name: str, host: Host, arguments: Sequence[str | Path]) -> Path:
        self._hosts[name] = host
        return super()._spawn(name, host, arguments)
