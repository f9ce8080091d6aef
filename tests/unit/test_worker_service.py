"""What is written for systemd and launchd, what is removed again, and the log beside it."""

import json
import os
import plistlib
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import structlog

from protocol.errors import ManyhandsError
from worker import service
from worker.background import find_one_run, find_runs, running_pid, write_invite
from worker.home import RunHome
from worker.logs import MAX_BYTES, NAME, NUM_OLDER, follow, log_to_file, render, tail

RUN_ID = "0123456789abcdef"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunHome:
    """A run's folder and a user's configuration of their own, with an invite in place."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config" / "manyhands").mkdir(parents=True)
    run = RunHome(tmp_path / "worker home", RUN_ID)
    write_invite(run, "mh1.secret")
    return run


@pytest.mark.parametrize("version", [252, 256])
def test_unit_is_accepted_when_systemd_analyses_it(run: RunHome, tmp_path: Path, version: int) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    if version > service.systemd_version():
        pytest.skip(f"settings of systemd {version} are not known to the one here")
    unit = tmp_path / "manyhands-01234567.service"
    unit.write_text(service.render_unit(run, ["--name", 'attic "50 %" $HOME'], systemd_version=version))
    (tmp_path / "runtime").mkdir(mode=0o700)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "runtime")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(unit.name) not in done.stderr  # nor a warning


def test_unit_holds_neither_invite_nor_what_systemd_would_expand(run: RunHome) -> None:
    unit = service.render_unit(run, ["--name", "50 % $HOME"], systemd_version=252)
    (command,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert "mh1." not in unit
    assert command.endswith('--quiet --name "50 %% $$HOME"')
    assert "RestartSteps" not in unit
    assert "RestartSteps" in service.render_unit(run, [], systemd_version=254)
    assert (run.folder / "invite").stat().st_mode & 0o777 == 0o600


def test_invite_is_private_again_when_its_file_was_not(run: RunHome) -> None:
    (run.folder / "invite").chmod(0o644)
    assert write_invite(run, "mh1.other").stat().st_mode & 0o777 == 0o600


def test_plist_restarts_in_the_background_when_launchd_reads_it(run: RunHome) -> None:
    agent = plistlib.loads(service.render_plist(run, ["--name", "attic"]))
    assert agent["Label"] == "org.manyhands.worker.01234567"
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ProcessType"] == "Background"
    assert agent["LowPriorityIO"] is True
    assert agent["ProgramArguments"][3:5] == ["worker", "start"]
    assert "mh1." not in " ".join(agent["ProgramArguments"])


def test_service_is_found_and_removed_when_no_manager_runs(run: RunHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run.home / "none"))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    with pytest.raises(ManyhandsError, match="systemctl --user enable --now manyhands-01234567"):
        service.install(run, [])
    (found,) = service.find_services()
    assert found.home == run.home
    assert service.find_services("ffff") == []
    service.uninstall(found)
    assert service.find_services() == []


def test_foreign_units_are_left_alone_when_services_are_looked_for(run: RunHome, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "systemd" / "user"
    folder.mkdir(parents=True)
    (folder / "manyhands-backup.service").write_text("[Service]\nExecStart=true\n")
    assert service.find_services() == []


def test_purge_leaves_what_is_not_the_workers(run: RunHome) -> None:
    run.identity()
    (run.home / "holiday.jpg").write_text("mine")
    service.default_path().write_text("")
    assert len(service.purge(run.home)) == 3
    assert [path.name for path in run.home.iterdir()] == ["holiday.jpg"]


# ---- which run


def test_run_is_found_by_name_and_id_when_several_are_here(run: RunHome) -> None:
    other = RunHome(run.home, "fedcba9876543210")
    other.folder.mkdir()
    run.write_status({"run": "poems"})
    other.write_status({"run": "weather"})
    assert find_runs(run.home, "weather") == [other]
    assert find_one_run(run.home, "0123") == run
    assert find_one_run(run.home, None) == other  # it was written last
    with pytest.raises(ManyhandsError, match="known: poems"):
        find_runs(run.home, "chess")


def test_stale_process_is_not_taken_for_a_worker_when_it_holds_no_lock(run: RunHome) -> None:
    run.write_status({"run": "poems"})  # by this very process, which runs, but is no worker
    assert running_pid(run) is None
    descriptor = run.lock()
    assert running_pid(run) == os.getpid()
    os.close(descriptor)
    assert running_pid(run) is None


# ---- the log


@pytest.fixture
def events(tmp_path: Path) -> Iterator[Path]:
    """A folder to which this process logs, until the test ends."""
    before = structlog.get_config()
    log_to_file(tmp_path, quiet=True)
    yield tmp_path
    structlog.configure(**before)


def test_events_are_json_lines_when_a_worker_logs(events: Path) -> None:
    structlog.get_logger().info("joined", run="poems")
    (line,) = tail(events, 10)
    assert json.loads(line)["run"] == "poems"
    assert render(line).endswith("info     joined  run=poems")


def test_exception_is_in_the_log_with_its_trace(events: Path) -> None:
    try:
        raise ValueError("no such thing")
    except ValueError:
        structlog.get_logger().exception("it failed")
    shown = render(tail(events, 1)[0])
    assert "it failed" in shown
    assert "ValueError: no such thing" in shown.splitlines()[-1]


def test_log_stays_within_its_size_when_much_is_written(events: Path) -> None:
    log, text = structlog.get_logger(), "x" * 20_000
    for number in range(700):
        log.info("a lot", number=number, text=text)
    files = list(events.glob(f"{NAME}*"))
    assert len(files) == 1 + NUM_OLDER
    assert sum(path.stat().st_size for path in files) <= (1 + NUM_OLDER) * MAX_BYTES
    assert [json.loads(line)["number"] for line in tail(events, 300)] == list(range(400, 700))


def test_following_misses_nothing_when_the_log_is_rotated(events: Path) -> None:
    log, text = structlog.get_logger(), "x" * 20_000
    log.info("first", number=-1)
    lines = follow(events, 5)
    assert json.loads(next(lines))["number"] == -1
    for start in range(0, 400, 80):
        for number in range(start, start + 80):
            log.info("next", number=number, text=text)
        assert [json.loads(line)["number"] for line in islice(lines, 80)] == list(range(start, start + 80))
    lines.close()


def test_nothing_reaches_the_terminal_raw_when_a_log_line_is_shown() -> None:
    line = json.dumps({"event": "bad \x1b[2J", "level": "info", "timestamp": "2026-01-01T00:00:00Z", "from": "\x07"})
    assert "\x1b" not in render(line)
    assert "\x07" not in render(line)
    assert render("no json \x1b") == "no json \N{REPLACEMENT CHARACTER}"
