"""A coordinator and workers as real processes, each on a host of a network (benchmarks.wan_network), under observation.

A worker says in its status file how many seconds it has spent in inner steps; each time that it says more, a sample is
taken. Nothing is asked of the processes that a user could not ask.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.wan_network import Host, Network, Traffic, inside
from coordinator.run_folder import RunFolder
from protocol.documents import Genesis, Manifest
from protocol.run_spec import RunSpec
from protocol.run_template import render_spec

START_TIMEOUT_S = 120.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A worker's own word. compute_s: in inner steps since it started. round: rounds that it has merged."""

    unix_s: float
    compute_s: float
    round: int
    traffic: Traffic


@dataclass(slots=True, kw_only=True)
class Worker:
    """A worker process, and what it said: a sample each time that it had computed more."""

    name: str
    host: Host
    home: Path
    samples: list[Sample] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)

    def has_computed_after(self, num_rounds: int) -> bool:
        return bool(self.samples) and self.samples[-1].round >= num_rounds

    def first_after(self, num_rounds: int) -> Sample:
        return next(sample for sample in self.samples if sample.round >= num_rounds)

    def observe(self, network: Network) -> None:
        """Read its status file, which it replaces as a whole."""
        path = next(self.home.glob("runs/*/status.json"), None)
        if path is None:
            return
        self.status = json.loads(path.read_text())
        compute_s = self.status["compute_s"]
        if compute_s > (self.samples[-1].compute_s if self.samples else 0.0):
            unix_s, round_ = self.status["unix_s"], self.status["round"]
            traffic = network.read_traffic(self.host)
            self.samples.append(Sample(unix_s=unix_s, compute_s=compute_s, round=round_, traffic=traffic))


class Run:
    """A coordinator and workers; they end with the network. What they write to stderr is in `folder`, NAME.log."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.workers: list[Worker] = []
        self.digests: dict[int, set[str]] = {}  # rounds merged -> what workers then hold
        self._network = network
        self._folder = folder
        self._run_folder = folder / "run"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, make_spec: Callable[[str], RunSpec], workers: Mapping[str, bool]) -> None:
        """Start all processes. `make_spec` is given the coordinator's address; `workers`: whether each is behind NAT.

        Raises RuntimeError when the coordinator does not start.
        """
        host = self._network.add_coordinator()
        spec_path = self._folder / "wan.toml"
        spec_path.write_text(render_spec(make_spec(host.address)))
        options: list[str | Path] = ["--folder", self._run_folder, "--no-validator", "--json"]
        out = self._spawn("coordinator", host, ["coordinator", "start", spec_path, *options])
        self.wait_for(lambda: out.read_bytes().endswith(b"\n"), START_TIMEOUT_S)
        invite = json.loads(out.read_text())["invite"]
        for name, behind_nat in workers.items():
            home = self._folder / name
            worker = Worker(name=name, host=self._network.add_worker(name, behind_nat=behind_nat), home=home)
            options = ["--name", name, "--home", home, "--threads", "1", "--json", "--always"]
            self._spawn(name, worker.host, ["worker", "start", invite, *options])
            self.workers.append(worker)

    def read_facts(self) -> tuple[int, str]:
        """Of a run with rounds: the number of parameters, and what the last round exchanged and why."""
        folder = RunFolder(self._run_folder)
        with closing(folder.open_database(folder.spec())) as database:
            genesis, *manifests = database.read_ledger(kinds=("genesis", "manifest"))
        plan = Manifest.model_validate_json(manifests[-1].body).plan
        return Genesis.model_validate_json(genesis.body).num_parameters, plan

    def have_computed_after(self, num_rounds: int) -> bool:
        """Look at all workers; whether each has made steps since it merged so many rounds."""
        for worker in self.workers:
            worker.observe(self._network)
            if worker.status and worker.status["digest"]:
                self.digests.setdefault(worker.status["round"], set()).add(worker.status["digest"])
        return all(worker.has_computed_after(num_rounds) for worker in self.workers)

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> None:
        """Poll until true. Raises TimeoutError, and RuntimeError with its last words when a process has ended."""
        deadline_s = time.monotonic() + timeout_s
        while not predicate():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    log = self._log(name).read_text(errors="replace")
                    raise RuntimeError(f"{name} ended with exit code {process.returncode}:\n{log[-2000:]}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"nothing happened for {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def _spawn(self, name: str, host: Host, arguments: Sequence[str | Path]) -> Path:
        """Start `manyhands …` on a host; the file that its stdout goes to."""
        out = self._folder / f"{name}.out"
        command = (*inside(host.namespace), sys.executable, "-m", "manyhands", *arguments)
        with self._log(name).open("wb") as errors, out.open("wb") as output:
            self._processes[name] = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        return out

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"
