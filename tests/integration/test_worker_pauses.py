"""A worker that pauses for its owner, is killed and comes back: the run goes on, and nothing that was done is lost."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import RunningCoordinator, RunningWorker, start_coordinator, start_worker, wait_until

LONG: dict[str, Any] = {"round": {"min_peers": 1}, "train": {"tokens": 10_000_000}}
QUIET = "pause_on_battery = false\nbattery_min_percent = 0\nmemory_min_free_gb = 0\ndisk_min_free_gb = 0\n"


def manyhands(*arguments: str) -> str:
    command = [sys.executable, "-m", "manyhands", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def peer_of(coordinator: RunningCoordinator, name: str) -> Any:
    peers: Any = coordinator.status()["peers"]
    return next((peer for peer in peers if peer["name"] == name), None)


def wait_for(
    coordinator: RunningCoordinator, worker: RunningWorker, holds: Callable[[Any], bool], timeout_s: float = 60
) -> Any:
    """The worker's line in the coordinator's status, once it is as wanted."""

    def look() -> Any:
        assert worker.is_alive(), worker.last_lines()
        peer = peer_of(coordinator, worker.name)
        return peer if peer and holds(peer) else None

    return wait_until(look, timeout_s)


def receipts(home: Path) -> int:
    (status,) = json.loads(manyhands("worker", "status", "--home", str(home), "--json"))
    return int(status["accepted"])


def worker_log(home: Path) -> str:
    return "".join(path.read_text() for path in home.glob("runs/*/worker.log"))


def settings(tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(QUIET + more)
    return path


def test_run_goes_on_without_a_worker_that_its_owner_pauses(tmp_path: Path) -> None:
    with (
        start_coordinator(tmp_path / "run", **LONG) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada", settings=settings(tmp_path)) as ada,
        start_worker(coordinator.invite, tmp_path / "ben"),
    ):
        wait_for(coordinator, ada, lambda peer: peer["accepted"] > 0)
        assert "paused until" in manyhands("worker", "pause", "--for", "10m", "--home", str(ada.home))
        paused = wait_for(coordinator, ada, lambda peer: peer["pause_reason"] == "user_pause", 10)
        assert paused["activity"].startswith("paused")
        (status,) = json.loads(manyhands("worker", "status", "--home", str(ada.home), "--json"))
        assert status["pause_reason"] == "user_pause"
        round_ = int(str(coordinator.status()["round"]))
        wait_until(lambda: int(str(coordinator.status()["round"])) >= round_ + 3, 60)
        accepted = peer_of(coordinator, "ada")["accepted"]
        wait_until(lambda: int(str(coordinator.status()["round"])) >= round_ + 5, 60)
        assert peer_of(coordinator, "ada")["accepted"] == accepted
        manyhands("worker", "resume", "--home", str(ada.home))
        wait_for(coordinator, ada, lambda peer: peer["accepted"] > accepted)
        assert peer_of(coordinator, "ada")["refused"] == 0


def test_worker_leaves_the_run_when_its_traffic_is_used_up(tmp_path: Path) -> None:
    path = settings(tmp_path)
    with (
        start_coordinator(tmp_path / "run", **LONG) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada", settings=path) as ada,
    ):
        wait_for(coordinator, ada, lambda peer: peer["accepted"] > 1)
        manyhands("worker", "set", "monthly_traffic_gb", "1e-6", "--file", str(path))
        wait_for(coordinator, ada, lambda peer: peer["status"] == "gone")
        (status,) = json.loads(manyhands("worker", "status", "--home", str(ada.home), "--json"))
        assert status["pause_reason"] == "traffic_cap"
        manyhands("worker", "set", "monthly_traffic_gb", "0", "--file", str(path))
        wait_for(coordinator, ada, lambda peer: peer["status"] != "gone")


@pytest.mark.parametrize("overlap", [False, True])
def test_killed_worker_goes_on_with_what_it_had_done(tmp_path: Path, overlap: bool) -> None:
    home = tmp_path / "ada"
    with start_coordinator(tmp_path / "run", **LONG, exchange={"overlap": overlap}) as coordinator:
        with start_worker(coordinator.invite, home) as ada:
            before = wait_for(coordinator, ada, lambda peer: peer["accepted"] > 2)
            ada.process.kill()
            ada.process.wait()
            (saved,) = home.glob("runs/*/optimizer.safetensors")
            assert saved.stat().st_size > 0
        with start_worker(coordinator.invite, home) as again:
            after = wait_for(coordinator, again, lambda peer: peer["accepted"] > before["accepted"] + 2)
            assert after["refused"] == 0
            wait_until(
                lambda: receipts(home) > before["accepted"], 30, every_s=0.5
            )  # those of both; they come after the merge
            assert "goes on with the work of the last time" in worker_log(home)
    assert json.loads(manyhands("verify", str(tmp_path / "run"), "--json"))["rounds"] > 3


def test_killed_worker_goes_on_in_the_middle_of_its_lease(tmp_path: Path) -> None:
    long_lease = {"round": {"inner_steps": 4000, "min_peers": 2}, "train": LONG["train"]}
    options = ("--checkpoint-steps", "50")
    with (
        start_coordinator(tmp_path / "run", **long_lease) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ben") as ben,  # keeps the round open
    ):
        home = tmp_path / "ada"
        with start_worker(coordinator.invite, home, options=options) as ada:
            wait_for(coordinator, ada, lambda peer: peer["inner_step"] > 100)
        with start_worker(coordinator.invite, home, options=options) as again:
            wait_until(lambda: "goes on with a lease" in worker_log(home), 60)
            assert wait_for(coordinator, again, lambda peer: peer["connected"])["lease"] == "open"
            assert ben.is_alive()
