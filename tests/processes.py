"""Real coordinator and worker processes for tests, each in a process group of its own that is killed at the end.

    with start_coordinator(tmp_path / "run", train={"tokens": 10_000}) as coordinator:
        with start_worker(coordinator.invite, tmp_path / "worker", name="ada") as worker:
            wait_until(lambda: coordinator.status()["round"] >= 2, 30)

A process's output goes to files beside its folder, never to a pipe that could fill up; errors carry its last lines.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tomlkit

from coordinator.run_folder import RunFolder
from protocol.documents import Manifest

T = TypeVar("T")
TINY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY_RUN: dict[str, Any] = {
    "name": "tiny",
    "model": {"config": TINY_MODEL},
    "data": {"sequence_length": 32},
    "train": {"tokens": 1_000_000, "batch_sequences": 4},
    "round": {"inner_steps": 5},
    "checkpoint": {"every_rounds": 5},
}


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(predicate: Callable[[], T], timeout_s: float, every_s: float = 0.05) -> T:
    """Poll until the answer is true, and return it. Raises AssertionError with the last answer at the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (answer := predicate()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s; last answer: {answer!r}"
        time.sleep(every_s)
    return answer


def write_text(path: Path, size_bytes: int = 300_000, seed: int = 0) -> Path:
    """Write varied but learnable English-like sentences."""
    chance = random.Random(seed)  # noqa: S311 # text to train on, no secret
    subjects = ("the old clock", "a quiet river", "my neighbour", "the night train", "our first garden", "a small boat")
    verbs = ("carries", "remembers", "follows", "answers", "turns towards", "waits for")
    objects = ("the morning", "every visitor", "a lost letter", "the far hills", "nobody at all", "the sound of rain")
    sentences = []
    length = 0
    while length < size_bytes:
        sentence = f"{chance.choice(subjects)} {chance.choice(verbs)} {chance.choice(objects)}."
        sentences.append(sentence)
        length += len(sentence) + 1
    path.write_text("\n".join(sentences))
    return path


def read_manifests(folder: Path) -> list[Manifest]:
    """The manifests of a run folder, in order."""
    home = RunFolder(folder)
    database = home.open_database(home.spec())
    manifests = [Manifest.model_validate_json(row.body) for row in database.read_ledger(kinds=("manifest",))]
    database.close()
    return manifests


@dataclass(kw_only=True)
class Running:
    """A process of ours, its group and its output."""

    process: "subprocess.Popen[bytes]"
    out: Path
    errors: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def last_lines(self, count: int = 20) -> str:
        """The end of what it wrote to stderr."""
        return "\n".join(self.errors.read_text(errors="replace").splitlines()[-count:])

    def read_json(self) -> dict[str, Any] | None:
        """The first line of stdout as JSON once it is there whole. Raises AssertionError when the process ended."""
        alive = self.is_alive()  # asked first: what it wrote before it ended is read below
        line, newline, _ = self.out.read_text().partition("\n")
        if newline:
            facts: dict[str, Any] = json.loads(line)
            return facts
        assert alive, f"ended with exit code {self.process.returncode}:\n{self.last_lines()}"
        return None

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, as an operator would; returns the exit code."""
        self.process.terminate()
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL for the whole group, as a power cut would."""
        with suppress(ProcessLookupError):  # the whole group has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass(kw_only=True)
class RunningCoordinator(Running):
    """A coordinator to which peers can connect."""

    folder: Path
    invite: str
    address: str
    page: str

    def get(self, path: str) -> Any:
        """GET a JSON document from the page."""
        with urllib.request.urlopen(self.page + path, timeout=10) as answer:  # noqa: S310 # our own http:// page
            return json.load(answer)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.get("/api/status")
        return status


@dataclass(kw_only=True)
class RunningWorker(Running):
    """A worker that has been started; whether it has joined, the coordinator's status tells."""

    home: Path
    name: str


@contextmanager
def start_coordinator(
    folder: Path, *, options: Sequence[str] = (), ready_timeout_s: float = 60.0, **spec_overrides: Any
) -> Iterator[RunningCoordinator]:
    """Start a coordinator and wait until peers can join.

    A `folder` that does not exist becomes a new run: TINY_RUN with `spec_overrides` laid over it, section by section,
    on free loopback ports, with text written beside the folder unless `data.source` is given. A folder that exists is
    gone on with, on its old ports; then overrides are an error.
    """
    if folder.exists():
        if spec_overrides:
            raise ValueError(f"{folder} is a run already; its spec stays as it is")
        arguments = [str(folder)]
    else:
        spec_path = folder.with_name(f"{folder.name}.toml")
        spec_path.write_text(tomlkit.dumps(_complete_spec(folder, spec_overrides)))
        arguments = [str(spec_path), "--folder", str(folder)]
    with _start(["coordinator", "start", *arguments, "--json", *options], folder) as running:
        facts = wait_until(running.read_json, ready_timeout_s)
        assert facts is not None
        yield RunningCoordinator(
            **vars(running), folder=folder, invite=facts["invite"], address=facts["address"], page=facts["page"]
        )


@contextmanager
def start_worker(
    invite: str,
    home: Path,
    *,
    name: str | None = None,
    threads: int = 1,
    settings: Path | None = None,
    options: Sequence[str] = (),
) -> Iterator[RunningWorker]:
    """Start a worker on the loopback interface; without settings it never pauses. Does not wait until it has joined."""
    name = name or home.name
    arguments = ["--home", str(home), "--name", name, "--threads", str(threads), "--loopback", "--json", *options]
    arguments += ["--always"] if settings is None else ["--settings", str(settings)]
    with _start(["worker", "start", invite, *arguments], home) as running:
        yield RunningWorker(**vars(running), home=home, name=name)


def _complete_spec(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    spec = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY_RUN.items()}
    spec["coordinator"] = {"listen": f"127.0.0.1:{free_port()}", "http": f"127.0.0.1:{free_port()}"}
    for key, value in overrides.items():
        spec[key] = {**spec.get(key, {}), **value} if isinstance(value, dict) else value
    if "source" not in spec["data"]:
        spec["data"]["source"] = str(write_text(folder.with_name(f"{folder.name}-text.txt")))
    return spec


@contextmanager
def _start(arguments: Sequence[str], place: Path) -> Iterator[Running]:
    """Run `manyhands …` in a new process group, in the folder that holds `place`; its output goes beside `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    out, errors = place.with_name(f"{place.name}.out"), place.with_name(f"{place.name}.err")
    with out.open("wb") as out_file, errors.open("ab") as errors_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "manyhands", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=errors_file,
            cwd=place.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    running = Running(process=process, out=out, errors=errors)
    try:
        yield running
    finally:
        running.kill()
