"""`manyhands demo`: a whole run on this machine, with real processes, sockets and a real kill.

A coordinator with its validator and three workers of different speed train a byte-level model on real text; a fourth
worker joins late and the slowest is killed with SIGKILL. Afterwards the demo measures what the fastest worker alone
would have reached in its own number of steps, has the run verified, and prints what came of it.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from coordinator.operator import operate
from coordinator.run_folder import RunFolder
from coordinator.text import read_documents
from protocol.errors import ManyhandsError
from protocol.run_spec import AUTO, RunSpec
from protocol.run_template import render_spec
from simulations.demo_report import DemoReport, WorkerShare, print_report

WORKERS = {"fast": 1.0, "medium": 0.6, "slow": 0.3}  # share of the time that each computes
LATE_JOINER = ("late", 0.4)
JOIN_AT, KILL_AT = 0.35, 0.6  # shares of the run's tokens
KILLED = "slow"
START_TIMEOUT_S = 90.0
INNER_STEPS = 10  # half the default: rounds are cheap on one machine, and short ones learn better
# Part of the workers' nominal speed that is left when they share two cores with the coordinator and the validator.
EFFICIENCY = 0.6


@dataclass
class Demo:
    """One demo: its folder, its processes, and what is known so far."""

    folder: Path
    spec: RunSpec
    console: Console
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    invite: str = ""

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.folder)

    def worker_home(self, name: str) -> Path:
        return self.folder / "workers" / name

    def start_coordinator(self) -> None:
        """Start the coordinator process and wait for its invite."""
        spec_path = self.folder / "demo.toml"
        spec_path.write_text(render_spec(self.spec))
        command = ["coordinator", "start", str(spec_path), "--folder", str(self.folder), "--json"]
        process = self._spawn("coordinator", command, stdout=subprocess.PIPE)
        line = process.stdout.readline() if process.stdout else b""
        if not line:
            raise ManyhandsError(f"the coordinator did not start: {self._last_line('coordinator')}")
        self.invite = json.loads(line)["invite"]

    def start_worker(self, name: str, throttle: float) -> None:
        home = self.worker_home(name)
        command = ["worker", "start", self.invite, "--name", name, "--home", str(home), "--loopback", "--always"]
        self._spawn(name, [*command, "--threads", "1", "--throttle", str(throttle)], stdout=subprocess.DEVNULL)

    def kill_worker(self, name: str) -> None:
        """SIGKILL: no goodbye, as when a machine is switched off."""
        self.processes[name].kill()
        self.processes[name].wait()

    def status(self) -> dict[str, Any]:
        """What the coordinator says of the run."""
        try:
            return asyncio.run(operate(self.run_folder, "status"))
        except ManyhandsError as error:
            if self.processes["coordinator"].poll() is not None:
                raise ManyhandsError(f"the coordinator ended: {self._last_line('coordinator')}") from error
            raise

    def worker_status(self, name: str) -> dict[str, Any]:
        path = next((self.worker_home(name) / "runs").glob("*/status.json"))
        status: dict[str, Any] = json.loads(path.read_text())
        return status

    def stop_all(self) -> None:
        """SIGTERM to whatever still runs, then SIGKILL."""
        running = [process for process in self.processes.values() if process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + 15.0
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def _spawn(self, name: str, arguments: list[str], stdout: int) -> subprocess.Popen[bytes]:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "manyhands", *arguments], stdout=stdout, stderr=errors, start_new_session=True
            )
        return self.processes[name]

    def _last_line(self, name: str) -> str:
        lines = (self.folder / "logs" / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("manyhands: ") if lines else "it said nothing"


def run_demo(*, text: str, seconds: float, folder: Path | None, keep: bool, as_json: bool) -> None:
    """Run the demo and print its summary. Raises ManyhandsError when something does not work."""
    console = Console(stderr=as_json, highlight=False)
    next(read_documents(text, "text"))  # a missing text is told before anything starts
    folder = folder or Path("manyhands-runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise ManyhandsError(f"{folder} is not empty; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with ExitStack() as stack:
        demo = Demo(folder, _size_run(text, seconds, console), console)
        stack.callback(demo.stop_all)
        demo.start_coordinator()
        first = _train(demo)
        report = _conclude(demo, first, time.monotonic() - started)
        if as_json:
            print(json.dumps(report.to_json()))  # noqa: T201 - it is what --json is for
        else:
            print_report(report, console)
        if keep:
            console.print(f"the page stays at {report.page} until Ctrl-C")
            _wait_for_interrupt()


def _size_run(text: str, seconds: float, console: Console) -> RunSpec:
    """Measure one worker's speed here and choose the tokens that all of them train in about `seconds`."""
    from simulations.alone import measure_steps_per_s

    spec = RunSpec.model_validate({"name": "demo", "data": {"source": text}})
    with console.status("measuring this machine"):
        speed = measure_steps_per_s(spec)
    tokens = int(speed * sum(WORKERS.values()) * EFFICIENCY * seconds) * spec.step_tokens
    console.print(f"one worker makes {speed:.1f} inner steps a second here; the run is {tokens:,} tokens")
    data = spec.model_dump()
    data["train"].update(tokens=tokens, learning_rate=AUTO)
    data["round"].update(min_peers=len(WORKERS), inner_steps=INNER_STEPS)
    data["coordinator"] = {"listen": f"127.0.0.1:{_free_port()}", "http": f"127.0.0.1:{_free_port()}"}
    return RunSpec.model_validate(data)


def _train(demo: Demo) -> dict[str, Any]:
    """Start the workers and follow the run to its end; returns the first status that had a held-out loss."""
    for name, throttle in WORKERS.items():
        demo.start_worker(name, throttle)
    first: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=demo.console, transient=True, disable=not demo.console.is_terminal) as progress:
        task = progress.add_task("starting three workers", total=demo.spec.train.tokens)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            status = demo.status()
            if not first and status["first_held_out_loss"] is not None:
                first = status
            share = status["tokens"] / demo.spec.train.tokens
            if status["round"] == 0 and time.monotonic() > deadline:
                raise ManyhandsError(f"no round was merged in {START_TIMEOUT_S:.0f} s; see {demo.folder / 'logs'}")
            if status["round"] > 0:
                progress.update(task, completed=status["tokens"], description=_describe(status))
            _disturb(demo, share, progress.console.print)
            if status["phase"] == "finished" and status["final_held_out_loss"] is not None:
                return first
            time.sleep(0.5)


def _describe(status: dict[str, Any]) -> str:
    return f"round {status['round']}, loss {status['train_loss']:.3f}, {status['workers']} workers"


def _disturb(demo: Demo, share: float, say: Callable[[str], None]) -> None:
    name, throttle = LATE_JOINER
    if share >= JOIN_AT and name not in demo.processes:
        say(f"a fourth worker, {name!r}, joins")
        demo.start_worker(name, throttle)
    if share >= KILL_AT and demo.processes[KILLED].poll() is None:
        say(f"the worker {KILLED!r} is killed (SIGKILL)")
        demo.kill_worker(KILLED)


def _conclude(demo: Demo, first: dict[str, Any], trained_s: float) -> DemoReport:
    """Measure the fastest worker alone, verify the run, and gather the figures."""
    from simulations.alone import train_alone
    from worker.checkpoint import list_checkpoints
    from worker.generate import generate

    last = demo.status()
    for name, process in demo.processes.items():
        if name not in ("coordinator", KILLED):
            process.wait(30)  # a worker ends by itself when the run is finished
    statuses = {name: demo.worker_status(name) for name in demo.processes if name != "coordinator"}
    verified = _verify(demo)
    steps = statuses["fast"]["steps_trained"]
    alone = train_alone(demo.run_folder, steps, demo.console)
    checkpoint = list_checkpoints(demo.run_folder.checkpoints)[-1]
    credit = {peer["name"]: peer["credited_tokens"] for peer in last["peers"]}
    return DemoReport(
        loss_start=first["first_held_out_loss"],
        loss_end=last["final_held_out_loss"],
        loss_alone=alone.held_out_loss,
        alone_steps=steps,
        alone_s=alone.seconds,
        trained_s=trained_s,
        num_parameters=last["num_parameters"],
        step_tokens=demo.spec.step_tokens,
        rounds=last["round"],
        tokens=last["tokens"],
        workers=[
            WorkerShare(
                name=name,
                tokens=credit.get(name, 0),
                rounds=status["accepted"],
                bytes_sent=status["bytes_sent"],
                digest="" if name == KILLED else status["digest"],
                killed=name == KILLED,
            )
            for name, status in statuses.items()
        ],
        verified_digest=verified["digest"],
        ledger_entries=verified["entries"],
        sample=generate(checkpoint, "def " if demo.spec.data.source == "stdlib" else "The ", 160, 0.7, 0),
        checkpoint=str(checkpoint),
        folder=str(demo.folder),
        page=last["page"],
    )


def _verify(demo: Demo) -> dict[str, Any]:
    command = [sys.executable, "-m", "manyhands", "verify", str(demo.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ManyhandsError(f"the run does not verify: {done.stderr.strip()}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
