"""`manyhands worker status` and `stop`, and what a second worker in the same home is told."""

import json
import stat
import subprocess
import sys
from pathlib import Path

from tests.processes import start_coordinator, start_worker, wait_until


def manyhands(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "manyhands", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_worker_is_found_and_stopped_when_its_owner_asks(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with (
        start_coordinator(tmp_path / "run", options=["--no-validator"], round={"min_peers": 2}) as coordinator,
        start_worker(coordinator.invite, home, name="ada") as worker,
    ):
        wait_until(lambda: list(home.glob("runs/*/status.json")), 60)
        (status,) = json.loads(manyhands("worker", "status", "--home", str(home), "--json").stdout)
        assert status["running"]
        assert status["name"] == "ada"

        second = manyhands("worker", "start", coordinator.invite, "--home", str(home), "--loopback")
        assert second.returncode == 1
        assert "is running already" in second.stderr

        assert stat.S_IMODE((home / "identity.key").stat().st_mode) == 0o600
        assert manyhands("worker", "stop", "--home", str(home)).stdout.strip() == "1 stopped"
        assert worker.process.wait(30) == 0, worker.last_lines()
        (status,) = json.loads(manyhands("worker", "status", "--home", str(home), "--json").stdout)
        assert not status["running"]


def test_status_says_how_to_begin_when_no_worker_has_run(tmp_path: Path) -> None:
    done = manyhands("worker", "status", "--home", str(tmp_path))
    assert done.returncode == 0
    assert "manyhands worker start" in done.stdout


def test_run_toml_is_not_replaced_when_it_is_there(tmp_path: Path) -> None:
    assert manyhands("init", str(tmp_path / "run.toml")).returncode == 0
    again = manyhands("init", str(tmp_path / "run.toml"))
    assert again.returncode == 2
    assert "--force" in again.stderr
