"""Workers in the background, their log, and the doctor, with a real coordinator."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_worker_commands import manyhands
from tests.processes import RunningCoordinator, start_coordinator, wait_until

OPTIONS = ["--threads", "1", "--loopback", "--always"]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    with start_coordinator(folder, options=["--no-validator"], name="first", round={"min_peers": 1}) as running:
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A worker's home; whatever still runs there at the end is stopped."""
    yield tmp_path / "home"
    manyhands("worker", "stop", "--home", str(tmp_path / "home"))


def detach(coordinator: RunningCoordinator, home: Path, name: str) -> "subprocess.CompletedProcess[str]":
    return manyhands("worker", "start", coordinator.invite, "--home", str(home), "--name", name, *OPTIONS, "--detach")


def read_status(home: Path, *run: str) -> list[dict[str, Any]]:
    statuses: list[dict[str, Any]] = json.loads(
        manyhands("worker", "status", *run, "--home", str(home), "--json").stdout
    )
    return statuses


def test_worker_computes_in_the_background_until_stopped_when_detached(
    coordinator: RunningCoordinator, home: Path
) -> None:
    done = detach(coordinator, home, "ada")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("joined first (run ")
    assert f"`manyhands worker logs -f --home {home}`" in done.stdout
    (status,) = read_status(home)
    assert status["running"]
    assert os.getsid(status["pid"]) == status["pid"]
    wait_until(lambda: read_status(home)[0]["steps_trained"] > 0, 60)
    assert coordinator.invite not in Path(f"/proc/{status['pid']}/cmdline").read_text()

    again = detach(coordinator, home, "ada")
    assert again.returncode == 1
    assert "is running already" in again.stderr

    assert manyhands("worker", "stop", "first", "--home", str(home)).stdout == "1 stopped\n"
    assert not read_status(home)[0]["running"]
    shown = manyhands("worker", "logs", "--home", str(home), "--lines", "1")
    assert shown.returncode == 0
    assert shown.stdout.rstrip().endswith("the worker stopped")
    assert "joined  run=first" in manyhands("worker", "logs", "first", "--home", str(home)).stdout


def test_one_of_two_workers_is_stopped_when_its_run_is_named(
    coordinator: RunningCoordinator, home: Path, tmp_path: Path
) -> None:
    with start_coordinator(tmp_path / "second", options=["--no-validator"], name="second") as second:
        for running in (coordinator, second):
            assert detach(running, home, "ada").returncode == 0
        assert [status["running"] for status in read_status(home)] == [True, True]
        unclear = manyhands("worker", "logs", "--home", str(home))
        assert unclear.returncode == 2
        assert "several runs" in unclear.stderr
        assert manyhands("worker", "stop", "second", "--home", str(home)).stdout == "1 stopped\n"
        assert not read_status(home, "second")[0]["running"]
        assert read_status(home, "first")[0]["running"]


def test_childs_own_error_and_exit_code_come_back_when_it_cannot_join(tmp_path: Path, home: Path) -> None:
    with start_coordinator(tmp_path / "gone", options=["--no-validator"]) as gone:
        invite = gone.invite
    done = manyhands("worker", "start", invite, "--home", str(home), *OPTIONS, "--detach")
    assert done.returncode == 4
    assert done.stderr.startswith("manyhands: cannot reach the coordinator")
    assert len(done.stderr.splitlines()) == 1
    assert "the worker ended" in manyhands("worker", "logs", "--home", str(home)).stdout


def test_following_the_log_ends_tidily_when_interrupted(coordinator: RunningCoordinator, home: Path) -> None:
    assert detach(coordinator, home, "ada").returncode == 0
    command = [sys.executable, "-m", "manyhands", "worker", "logs", "-f", "--home", str(home)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is inherited, ignored in a background job
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        signal.signal(signal.SIGINT, before)
        assert following.stdout is not None
        assert following.stderr is not None
        assert "joined" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        assert following.wait(30) == 0
        assert following.stderr.read() == ""


def test_doctor_leaves_no_trace_when_it_does_not_join(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    before = coordinator.status()["peers"]
    findings = examine(coordinator, tmp_path / "none", 0)
    assert coordinator.status()["peers"] == before
    assert not (tmp_path / "none").exists()
    assert {topic for topic, found in findings.items() if found["level"] == "problem"} == set()
    assert findings["protocol"]["level"] == "ok"
    assert findings["coordinator"]["figures"]["round_trip_ms"] > 0
    assert abs(findings["clock"]["figures"]["offset_s"]) < 5
    assert findings["speed"]["level"] == "unknown"


def test_doctor_measures_the_model_and_gets_no_lease_when_it_joins(
    coordinator: RunningCoordinator, tmp_path: Path
) -> None:
    known = {peer["peer"] for peer in coordinator.status()["peers"]}
    findings = examine(coordinator, tmp_path / "none", 0, "--join")
    assert not (tmp_path / "none").exists()
    assert findings["speed"]["figures"]["steps_per_s"] > 0
    assert findings["optimizer"]["text"].endswith("of an inner step is muon's update")
    assert findings["download"]["figures"]["download_bps"] > 0
    assert findings["batch"]["figures"] == {"micro_batch": 4, "accumulation": 1}
    assert 0 < findings["share"]["figures"]["share"] <= 1
    (visitor,) = [peer for peer in coordinator.status()["peers"] if peer["peer"] not in known]
    assert visitor["status"] == "gone"
    events = (coordinator.errors).read_text()
    assert visitor["peer"] in events  # it did join
    assert (visitor["credited_tokens"], visitor["accepted"], visitor["steps_per_s"]) == (0, 0, 0)


def test_doctor_says_what_is_in_the_way_when_nobody_answers(tmp_path: Path) -> None:
    with start_coordinator(tmp_path / "gone", options=["--no-validator"]) as gone:
        pass
    findings = examine(gone, tmp_path / "none", 1)
    assert findings["coordinator"]["level"] == "problem"
    assert "cannot reach" in findings["coordinator"]["text"]


def test_doctor_does_not_disturb_a_worker_that_is_at_work(coordinator: RunningCoordinator, home: Path) -> None:
    assert detach(coordinator, home, "ada").returncode == 0
    wait_until(lambda: read_status(home)[0]["steps_per_s"] > 0, 60)
    findings = examine(coordinator, home, 0, "--join")
    assert "when a worker last computed here" in findings["speed"]["text"]
    assert findings["download"]["level"] == "unknown"
    time.sleep(1.0)  # a session that another one replaced would be over by now
    assert read_status(home)[0]["running"]


def examine(coordinator: RunningCoordinator, home: Path, exit_code: int, *options: str) -> dict[str, dict[str, Any]]:
    """The doctor's findings by topic."""
    place = ["--home", str(home), "--page", coordinator.page, "--threads", "1", "--json"]
    done = manyhands("worker", "doctor", coordinator.invite, *place, *options)
    assert done.returncode == exit_code, done.stderr
    return {found["topic"]: found for found in json.loads(done.stdout)["findings"]}
