"""The verdict names what happened to real processes, soon: killed, stopped and restarted ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import RunningCoordinator, RunningWorker, start_coordinator, start_worker, wait_until

NAMED_WITHIN_S = 15.0
LONG: dict[str, Any] = {
    "train": {"tokens": 100_000_000},
    "round": {"inner_steps": 40, "heartbeat_timeout_s": 10.0},
}


def ask(coordinator: RunningCoordinator) -> dict[str, Any]:
    """`coordinator status --json`, as an operator's script would."""
    command = [sys.executable, "-m", "manyhands", "coordinator", "status", str(coordinator.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    status: dict[str, Any] = json.loads(done.stdout)
    return status


def expect(coordinator: RunningCoordinator, cause: str, act: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Wait until the verdict's cause matches, after `act`; print how long that took."""
    seen: set[str] = set()

    def is_named() -> dict[str, Any] | None:
        verdict: dict[str, Any] = ask(coordinator)["verdict"]
        seen.add(verdict["cause"])
        return verdict if re.search(cause, verdict["cause"]) else None

    act()
    began_s = time.monotonic()
    try:
        verdict = wait_until(is_named, NAMED_WITHIN_S, every_s=0.2)
    except AssertionError as error:
        raise AssertionError(f"{cause!r} was not named; {seen}") from error
    assert verdict is not None
    print(f"{time.monotonic() - began_s:4.1f} s: {verdict['level']}: {verdict['cause']}")  # noqa: T201 # a figure
    return verdict


def wait_for_workers(coordinator: RunningCoordinator, count: int) -> None:
    wait_until(lambda: coordinator.status()["workers"] == count and coordinator.status()["round"] >= 2, 60)


def signal_group(worker: RunningWorker, number: signal.Signals) -> None:
    os.killpg(worker.pid, number)


def test_verdict_names_the_worker_when_it_stalls_or_is_killed(tmp_path: Path) -> None:
    with (
        start_coordinator(tmp_path / "run", options=["--no-validator"], **LONG) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada"),
        start_worker(coordinator.invite, tmp_path / "ben") as ben,
        start_worker(coordinator.invite, tmp_path / "cyd") as cyd,
    ):
        wait_for_workers(coordinator, 3)
        assert expect(coordinator, r"round \d+: \d of 3 workers train")["level"] == "healthy"
        verdict = expect(coordinator, "worker ben stalls", lambda: signal_group(ben, signal.SIGSTOP))
        assert verdict["level"] == "degraded"
        expect(coordinator, "worker ben was lost: nothing was heard from it")
        signal_group(ben, signal.SIGCONT)
        expect(coordinator, r"round \d+: \d of 3 workers train")
        verdict = expect(coordinator, "worker cyd was lost: its connection ended", cyd.kill)
        assert verdict["level"] == "degraded"
        assert ben.stop() == 0
        (gone,) = [peer for peer in ask(coordinator)["peers"] if peer["name"] == "ben"]
        assert (gone["connected"], gone["lost"]) == (False, None)  # it said goodbye


def test_verdict_names_validator_and_restart_when_they_are_killed(tmp_path: Path) -> None:
    with start_coordinator(tmp_path / "run", **LONG) as first, start_worker(first.invite, tmp_path / "ada"):
        wait_for_workers(first, 1)
        wait_until(lambda: any(p["role"] == "validator" and p["connected"] for p in first.status()["peers"]), 60)
        children = psutil.Process(first.pid).children()
        validator = next(child for child in children if "validate" in child.cmdline())
        verdict = expect(first, "the validator is gone", validator.kill)
        assert verdict["level"] == "degraded"
        first.kill()
        with start_coordinator(tmp_path / "run", options=["--no-validator"]) as again:
            expect(again, r"the coordinator was restarted; \d of 1 workers are back")
            expect(again, "1 of 1 workers are back")


HOSTILE = """
import sys
import worker.contributor
from manyhands import main

class Rubbish:
    name = "sparse"

    def encode(self, vector):
        return b"no payload of any codec" * 8

    def pieces(self, payload, num_parameters):
        return iter(())

worker.contributor.get_codec = lambda name, options: Rubbish()
sys.argv = ["manyhands", *sys.argv[1:]]
main()
"""


def test_verdict_names_the_worker_whose_payload_is_refused(tmp_path: Path) -> None:
    run: dict[str, Any] = {**LONG, "exchange": {"codec": "sparse"}}
    with (
        start_coordinator(tmp_path / "run", options=["--no-validator"], **run) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada"),
    ):
        wait_for_workers(coordinator, 1)
        options = [
            "--home",
            str(tmp_path / "mal"),
            "--name",
            "mal",
            "--threads",
            "1",
            "--loopback",
            "--json",
            "--always",
        ]
        command = [sys.executable, "-c", HOSTILE, "worker", "start", coordinator.invite, *options]
        with (tmp_path / "mal.err").open("wb") as errors:
            mal = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            refused = wait_until(lambda: sum(peer["refused"] for peer in ask(coordinator)["peers"]), 60, every_s=0.2)
            assert refused > 0
            verdict = expect(coordinator, "a contribution was refused: .*mal|mal.*a contribution was refused")
            assert verdict["level"] == "degraded"
        finally:
            os.killpg(mal.pid, signal.SIGKILL)
            mal.wait()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system: root on Linux")
def test_verdict_says_that_the_disk_runs_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(disk)], check=True)
    try:
        with (
            start_coordinator(disk / "run", options=["--no-validator"], **LONG) as coordinator,
            start_worker(coordinator.invite, tmp_path / "ada"),
        ):
            wait_for_workers(coordinator, 1)
            assert expect(coordinator, "little room is left on the disk of the run folder")["level"] == "degraded"
            filler = (disk / "filler").write_bytes
            verdict = expect(coordinator, "the disk of the run folder is full", lambda: filler(bytes(110 << 20)))
            assert verdict["level"] == "stalled"
            assert coordinator.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
