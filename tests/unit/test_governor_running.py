"""The running governor with scripted sensors, and the commands that people type."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import typer
from typer.testing import CliRunner

from worker.governor import commands, control
from worker.governor.governor import Governor
from worker.governor.ladder import Decision
from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.settings_file import set_preference


class ScriptedSensors:
    """Says what the test says."""

    def __init__(self) -> None:
        self.readings = Readings()

    def read(self, preferences: Preferences | None = None) -> Readings:
        return self.readings


class Bench:
    def __init__(self, folder: Path, poll_s: float = 0.02) -> None:
        self.folder = folder
        self.path = folder / "worker.toml"
        self.sensors = ScriptedSensors()
        self.changes: list[Decision] = []
        self.preferences: list[Preferences] = []
        self.governor = Governor(
            self.path,
            folder,
            self.sensors,
            poll_s=poll_s,
            on_change=self.changes.append,
            on_preferences=self.preferences.append,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_reason_is_held_told_and_logged_when_it_changes(bench: Bench) -> None:
    with structlog.testing.capture_logs() as logs:
        await bench.governor.poll()
        assert not bench.governor.paused
        bench.sensors.readings = Readings(metered=True)
        for _ in range(3):
            await bench.governor.poll()
        assert bench.governor.paused
        bench.sensors.readings = Readings(metered=False)
        await bench.governor.poll()
    assert not bench.governor.paused
    assert [change.reason for change in bench.changes] == ["metered", None]
    assert [(line["event"], line.get("reason")) for line in logs] == [("paused", "metered"), ("computing again", None)]
    assert logs[0]["detail"]


async def test_changed_settings_are_read_while_running(bench: Bench) -> None:
    await bench.governor.poll()
    set_preference(bench.path, "compute_share", "0.5")
    await bench.governor.poll()
    await bench.governor.poll()
    assert bench.governor.throttle == 0.5
    assert bench.preferences == [Preferences(), Preferences(compute_share=0.5)]
    bench.path.unlink()
    await bench.governor.poll()
    assert bench.governor.throttle == 1.0


async def test_broken_settings_keep_the_last_good_ones_and_are_told_once(bench: Bench) -> None:
    set_preference(bench.path, "compute_share", "0.5")
    await bench.governor.poll()
    bench.path.write_text("compute_share = 7\n")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await bench.governor.poll()
    assert bench.governor.throttle == 0.5
    assert len(logs) == 1
    assert "compute_share = 7" in logs[0]["error"]
    set_preference_text(bench.path, "compute_share = 0.25\n")
    await bench.governor.poll()
    assert bench.governor.throttle == 0.25


def set_preference_text(path: Path, text: str) -> None:
    """As an editor does: a new file under the old name."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # a flag of a thread has no event
        await asyncio.sleep(0.005)


async def test_computing_thread_stops_and_goes_on_with_the_flag(bench: Bench) -> None:
    steps, stop = [0], threading.Event()

    def compute() -> None:
        while bench.governor.wait_while_paused(stop.is_set):
            steps[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=compute)
    polling = asyncio.create_task(bench.governor.run())
    thread.start()
    try:
        async with asyncio.timeout(20):
            await until(lambda: steps[0] > 0)
            paused_at = time.monotonic()
            control.pause(bench.folder, time.time())
            await until(lambda: bench.governor.paused)
            pausing_s = time.monotonic() - paused_at
            await asyncio.sleep(0.05)
            before = steps[0]
            await asyncio.sleep(0.3)
            assert steps[0] == before
            resumed_at = time.monotonic()
            control.resume(bench.folder)
            await until(lambda: steps[0] > before)
            resuming_s = time.monotonic() - resumed_at
            control.pause(bench.folder, time.time())
            await until(lambda: bench.governor.paused)
            stop.set()  # a paused thread must end too
            await asyncio.to_thread(thread.join)
    finally:
        stop.set()
        polling.cancel()
    assert pausing_s < 2.0
    assert resuming_s < 2.0


async def test_pause_with_a_time_ends_by_itself(tmp_path: Path) -> None:
    now = [1000.0]
    sensors = ScriptedSensors()
    governor = Governor(tmp_path / "worker.toml", tmp_path, sensors, clock=lambda: now[0])
    control.pause(tmp_path, now[0], 60.0)
    assert await governor.poll() == Decision(
        reason=governor.decision.reason, detail="for the time that you gave", until_unix_s=1060.0
    )
    now[0] = 1061.0
    assert (await governor.poll()).reason is None


async def test_readings_are_kept_for_who_shows_them(bench: Bench) -> None:
    bench.sensors.readings = Readings(cpu_celsius=50.0)
    control.pause(bench.folder, 0.0, 5.0)
    await bench.governor.poll()
    assert bench.governor.readings == replace(bench.sensors.readings, user_pause_until_unix_s=5.0)


# ---- commands

app = typer.Typer()
app.command()(commands.pause)
app.command()(commands.resume)
app.command("set")(commands.set_)
app.command()(commands.settings)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_say_in_one_line_what_is_true_now(tmp_path: Path) -> None:
    assert run("pause", "--home", tmp_path) == "paused until `manyhands worker resume`\n"
    assert run("pause", "--for", "2h", "--home", tmp_path).startswith("paused until ")
    assert control.read_pause(tmp_path) == pytest.approx(time.time() + 7200, abs=60)
    assert run("resume", "--home", tmp_path) == "resumed\n"
    assert run("resume", "--home", tmp_path).startswith("it was not paused")
    path = tmp_path / "worker.toml"
    assert run("set", "compute_share", "0.5", "--file", path) == f"compute_share = 0.5  ({path})\n"


def test_settings_show_value_default_and_meaning_of_every_key(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    run("set", "schedule", "sat-sun", "--file", path)
    shown = json.loads(run("settings", "--json", "--file", path))
    assert shown["file"] == str(path)
    assert [entry["key"] for entry in shown["settings"]] == list(Preferences.model_fields)
    changed = [entry for entry in shown["settings"] if entry["value"] != entry["default"]]
    assert [(entry["key"], entry["value"]) for entry in changed] == [("schedule", ["sat-sun"])]
    table = run("settings", "--file", path)
    assert all(key in table for key in Preferences.model_fields)


@pytest.mark.parametrize("name", ["pause", "resume", "set", "settings"])
def test_help_has_examples(name: str) -> None:
    assert f"manyhands worker {name}" in run(name, "--help")
