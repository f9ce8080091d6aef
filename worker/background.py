"""Workers as processes of this machine: which run here, one begun in the background, and how they are ended.

A worker counts as running when it holds its run's lock, so a process number that the system gave to somebody else is
never taken for it, nor stopped.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import ConfigError, ManyhandsError
from protocol.exchange.store import naming_full_disks
from worker.home import RunHome, is_running, list_runs

JOIN_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.1


class WorkerEndedError(ManyhandsError):
    """A worker that was begun in the background ended before it had joined."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def running_pid(run: RunHome) -> int | None:
    """The process of the run's worker; None when none runs."""
    pid = run.read_status().get("pid")
    return int(str(pid)) if is_running(pid) and _is_locked(run) else None


def list_pids(home: Path) -> list[int]:
    """The processes of all workers that keep their things in `home`."""
    return [pid for run in list_runs(home) if (pid := running_pid(run)) is not None]


def find_runs(home: Path, which: str | None) -> list[RunHome]:
    """The runs in `home`: all, or those whose id begins with `which` or whose name is `which`.

    Raises ConfigError when there is none of that description.
    """
    runs = list_runs(home)
    if which is None:
        return runs
    found = [run for run in runs if run.run_id.startswith(which) or run.read_status().get("run") == which]
    if not found:
        known = ", ".join(_describe(run) for run in runs) or "none yet"
        raise ConfigError(f"no run here is called {which!r}; known: {known}")
    return found


def find_one_run(home: Path, which: str | None) -> RunHome:
    """One run: the one that is meant, or the only one that runs, or the one that was worked for last.

    Raises ConfigError when that is not clear.
    """
    runs = find_runs(home, which)
    if not runs:
        raise ConfigError("no worker has run here yet; `manyhands worker start INVITE` joins a run")
    candidates = [run for run in runs if running_pid(run) is not None] or runs
    if len(candidates) == 1:
        return candidates[0]
    if which is None and candidates is runs:
        return max(candidates, key=lambda run: float(str(run.read_status().get("unix_s", 0.0))))
    raise ConfigError(f"several runs are here: {', '.join(_describe(run) for run in candidates)}; name one")


def write_invite(run: RunHome, invite_text: str) -> Path:
    """Keep the invite where only this user reads it: on a command line everybody could."""
    with naming_full_disks(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / "invite"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)
            file.write(invite_text + "\n")
    return path


def start_in_background(run: RunHome, invite_text: str, options: Sequence[str]) -> int:
    """Begin `worker start` with `options` in a session of its own and wait until it has joined; returns its process.

    Raises WorkerEndedError with the worker's own last line when it ends first.
    """
    pid = running_pid(run)
    if pid is not None:
        raise ManyhandsError(
            f"a worker of this run is running already (process {pid}); `manyhands worker stop` ends it"
        )
    invite_path = write_invite(run, invite_text)
    out = run.folder / "worker.out"
    command = [sys.executable, "-m", "manyhands", "worker", "start", str(invite_path), "--quiet", *options]
    with naming_full_disks(run.folder), out.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=run.folder, start_new_session=True
        )
    try:
        _wait_until_joined(process, run, out)
    except KeyboardInterrupt:
        process.terminate()
        raise
    return process.pid


def stop_workers(runs: Sequence[RunHome]) -> list[RunHome]:
    """Ask the workers of these runs to stop, and wait; returns those that had one.

    Raises ManyhandsError when one is still there after a minute.
    """
    running = [(run, pid) for run in runs if (pid := running_pid(run)) is not None]
    for _, pid in running:
        os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while left := [pid for run, pid in running if running_pid(run) == pid]:
        if time.monotonic() > deadline_s:
            numbers = ", ".join(map(str, left))
            raise ManyhandsError(f"process {numbers} did not end within {STOP_TIMEOUT_S:.0f} s; `kill -9 {numbers}`")
        time.sleep(_POLL_S)
    return [run for run, _ in running]


def _wait_until_joined(process: "subprocess.Popen[bytes]", run: RunHome, out: Path) -> None:
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        status = run.read_status()
        if status.get("pid") == process.pid and status.get("run"):
            return
        if process.poll() is not None:
            lines = out.read_text(errors="replace").strip().splitlines()
            last = lines[-1].removeprefix("manyhands: ") if lines else f"it ended with exit code {process.returncode}"
            raise WorkerEndedError(last, process.returncode or 1)
        time.sleep(_POLL_S)
    raise WorkerEndedError(
        f"the worker (process {process.pid}) has not joined within {JOIN_TIMEOUT_S:.0f} s and goes on trying; "
        "`manyhands worker logs -f` shows why, `manyhands worker stop` ends it",
        4,
    )


def _is_locked(run: RunHome) -> bool:
    try:
        descriptor = os.open(run.folder / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _describe(run: RunHome) -> str:
    name = run.read_status().get("run")
    return f"{name} ({run.run_id[:8]})" if name else run.run_id[:8]
