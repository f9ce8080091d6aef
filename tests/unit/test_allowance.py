"""Several runs on one machine share what its owner allows."""

from pathlib import Path

import pytest

from worker import allowance as module
from worker.allowance import MAX_STORE_BYTES, Allowance
from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.traffic import TrafficMeter
from worker.home import RunHome

OWN, RUNNING, IDLE = "a" * 16, "b" * 16, "c" * 16


class NoSensors:
    def read(self, preferences: Preferences | None = None) -> Readings:
        return Readings()


async def make_allowance(home: Path, store_max_gb: float) -> Allowance:
    path = home / "worker.toml"
    path.write_text(f"store_max_gb = {store_max_gb}\ncompute_share = 0.5\ncpu_threads = 3\n")

    def make_sensors(_: TrafficMeter) -> NoSensors:
        return NoSensors()

    allowance = Allowance(
        RunHome(home, OWN),
        preferences_path=path,
        throttle=0.8,
        threads=None,
        make_sensors=make_sensors,
        on_decision=lambda _: None,
    )
    await allowance.begin()
    return allowance


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With this run, one at work, and one that is not and has left 300 kB."""
    for run_id in (OWN, RUNNING, IDLE):
        (tmp_path / "runs" / run_id).mkdir(parents=True)
    RunHome(tmp_path, OWN).store.put(bytes(500_000))
    RunHome(tmp_path, IDLE).store.put(bytes(300_000))
    monkeypatch.setattr(module, "running_pid", lambda run: 1 if run.run_id == RUNNING else None)
    return tmp_path


async def test_runs_at_work_share_what_others_left_on_the_disk(home: Path) -> None:
    assert (await make_allowance(home, 0.001)).max_store_bytes() == 250_000


async def test_run_keeps_a_little_when_others_hold_everything(home: Path) -> None:
    assert (await make_allowance(home, 0.0001)).max_store_bytes() == 4_000


@pytest.mark.parametrize("store_max_gb", [0.0, 100.0])
async def test_run_has_its_own_limit_when_much_is_allowed(home: Path, store_max_gb: float) -> None:
    assert (await make_allowance(home, store_max_gb)).max_store_bytes() == MAX_STORE_BYTES


async def test_command_line_and_settings_both_limit(home: Path) -> None:
    allowance = await make_allowance(home, 1.0)
    assert (allowance.throttle, allowance.choose_threads(), allowance.paused) == (0.5, 3, False)
