"""What the governor counts and reads: traffic, pauses, this machine."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from protocol.errors import ConfigError
from worker.governor import control, probes
from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.sensors import SystemSensors
from worker.governor.traffic import Traffic, TrafficMeter
from worker.governor.user_idle import UserIdle, ask, parse_logind

# ---- traffic


def test_traffic_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    meter = TrafficMeter(path)
    meter.add(10, 200)
    meter.add(1, 2)
    meter.save()
    again = TrafficMeter(path)
    again.add(5, 0)
    assert again.this_month() == Traffic(16, 202)
    assert again.this_month().total == 218


def test_traffic_of_two_workers_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    one, two = TrafficMeter(path), TrafficMeter(path)
    one.add(10, 0)
    two.add(0, 20)
    one.save()
    two.save()
    one.save()
    assert one.this_month() == two.this_month() == TrafficMeter(path).this_month() == Traffic(10, 20)


def test_traffic_starts_again_when_the_month_ends(tmp_path: Path) -> None:
    path, now = tmp_path / "traffic.json", [datetime(2026, 11, 30, 23, 59)]
    meter = TrafficMeter(path, lambda: now[0])
    meter.add(10, 10)
    meter.save()
    now[0] = datetime(2026, 12, 1)
    assert meter.this_month() == Traffic()
    meter.add(3, 0)
    meter.save()
    assert TrafficMeter(path, lambda: now[0]).this_month() == Traffic(3, 0)
    assert json.loads(path.read_text())["month"] == "2026-12"


@pytest.mark.parametrize("content", ["", "[]", '{"month": 3}', "\x00\xff", '{"month": "2026-11", "sent_bytes": "x"}'])
def test_traffic_counts_on_when_its_file_is_broken(tmp_path: Path, content: str) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(content)
    meter = TrafficMeter(path, lambda: datetime(2026, 11, 1))
    meter.add(1, 1)
    meter.save()
    assert TrafficMeter(path, lambda: datetime(2026, 11, 1)).this_month() == Traffic(1, 1)


def test_traffic_is_kept_in_memory_when_the_disk_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    meter = TrafficMeter(tmp_path / "file" / "traffic.json")
    meter.add(1, 2)
    meter.save()
    assert meter.this_month() == Traffic(1, 2)


# ---- the volunteer's pause


def test_pause_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert control.read_pause(tmp_path) is None
    control.pause(tmp_path / "new", 1000.0, 60.0)
    assert control.read_pause(tmp_path / "new") == 1060.0
    control.pause(tmp_path / "new", 1000.0)
    assert control.read_pause(tmp_path / "new") == math.inf
    assert control.resume(tmp_path / "new")
    assert not control.resume(tmp_path / "new")
    assert control.read_pause(tmp_path / "new") is None


@pytest.mark.parametrize(
    "content", ["", "3", "[]", "{}", '{"until_unix_s": "x"}', '{"until_unix_s": 1' + "0" * 400 + "}"]
)
def test_pause_file_that_nobody_can_read_pauses_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "pause.json").write_text(content)
    assert control.read_pause(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("30m", 1800), ("1h30m", 5400), ("2d", 172_800), ("1D 2h", 93_600), ("45s", 45)]
)
def test_duration_is_understood(text: str, seconds: int) -> None:
    assert control.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "0m", "-2h", "1.5h", "30m1h", "soon", "9999d", "²h"])
def test_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="write 30m, 2h, 1h30m or 2d"):
        control.parse_duration(text)


# ---- this machine


def test_this_machine_is_read_without_raising_or_waiting(tmp_path: Path) -> None:
    meter = TrafficMeter(tmp_path / "traffic.json")
    meter.add(3, 4)
    sensors = SystemSensors(tmp_path, meter)
    started = time.monotonic()
    readings = sensors.read()
    assert time.monotonic() - started < 2.0
    assert readings.free_memory_bytes
    assert readings.free_disk_bytes
    assert readings.traffic_bytes == 7
    assert readings.user_pause_until_unix_s is None


def test_only_what_the_preferences_ask_for_is_read(tmp_path: Path) -> None:
    preferences = Preferences(memory_min_free_gb=0.0, store_max_gb=0.0)
    readings = SystemSensors(tmp_path).read(preferences)
    assert readings.free_disk_bytes
    assert readings.free_memory_bytes is readings.store_bytes is readings.user_idle_s is None


def test_source_that_raises_or_hangs_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(probes, "read_battery", lambda: 1 / 0)
    monkeypatch.setattr(probes, "read_cpu_celsius", lambda: hanging.wait(60) or 99.0)
    sensors = SystemSensors(tmp_path)
    started = time.monotonic()
    readings = sensors.read()
    assert time.monotonic() - started < 2.0
    assert (readings.on_battery, readings.battery_percent, readings.cpu_celsius) == (None, None, None)
    assert readings.free_memory_bytes
    started = time.monotonic()
    sensors.read()  # what hangs already is not waited for again
    assert time.monotonic() - started < 0.9
    hanging.set()


def test_other_programs_are_seen_and_own_children_are_not() -> None:
    busy = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as child:
        try:
            ours, theirs = probes.OtherPrograms(lambda: ()), _blind()
            ours.read(), theirs.read()
            before = psutil.Process(child.pid).cpu_times().user
            time.sleep(1.0)
            used = psutil.Process(child.pid).cpu_times().user - before
            with_child, without_child = theirs.read(), ours.read()
        finally:
            child.kill()
    assert with_child is not None
    assert without_child is not None
    assert with_child - without_child == pytest.approx(used / (psutil.cpu_count() or 1), abs=0.15)


def _blind() -> probes.OtherPrograms:
    """One that takes this process's children for other programs."""
    programs = probes.OtherPrograms(lambda: ())
    programs._find_family = lambda: None  # type: ignore[method-assign]
    return programs


def test_folder_is_measured_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(1000))
    (tmp_path / "c").write_bytes(bytes(24))
    assert probes.read_folder_bytes(tmp_path) == 1024
    assert probes.read_folder_bytes(tmp_path / "not there") == 0
    assert probes.read_free_disk(tmp_path / "not" / "there") > 0


def test_idle_time_is_asked_of_the_first_that_answers() -> None:
    asked: list[str] = []

    def source(name: str, answers: list[float | None]) -> float | None:
        asked.append(name)
        return answers.pop(0)

    first: list[float | None] = [None, None]
    second: list[float | None] = [3.0, 4.0, None, None]
    idle = UserIdle((lambda: source("first", first), lambda: source("second", second)))
    assert [idle.read(), idle.read()] == [3.0, 4.0]
    assert asked == ["first", "second", "second"]
    assert idle.read() is None  # it went away; all are asked again, and then left alone for a while
    assert idle.read() is None
    assert asked == ["first", "second", "second", "second", "first", "second"]


@pytest.mark.parametrize(
    ("answer", "idle_s"),
    [
        ("IdleHint=no\nIdleSinceHint=0\n", 0.0),
        ("IdleHint=yes\nIdleSinceHint=1000000000\n", 500.0),
        ("IdleHint=yes\nIdleSinceHint=9000000000\n", 0.0),
        ("IdleHint=yes\n", None),
        ("", None),
    ],
)
def test_logind_is_understood(answer: str, idle_s: float | None) -> None:
    assert parse_logind(answer, now_unix_s=1500.0) == idle_s


def test_command_that_is_missing_fails_or_hangs_is_no_answer() -> None:
    assert ask("manyhands-no-such-command") is None
    assert ask(sys.executable, "-c", "raise SystemExit(1)") is None
    assert ask(sys.executable, "-c", "import time; time.sleep(30)") is None


@pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's tools")
@pytest.mark.parametrize(
    ("tool", "answer", "metered", "idle_s"),
    [
        ("busctl", "u 1", True, None),
        ("busctl", "u 4", False, None),
        ("busctl", "u 0", None, None),
        ("gdbus", "(uint64 90500,)", None, 90.5),
        ("loginctl", "IdleHint=no", None, 0.0),
        ("loginctl", "Failed to connect to bus", None, None),
    ],
)
def test_answers_of_the_desktop_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, answer: str, metered: bool | None, idle_s: float | None
) -> None:
    program = tmp_path / tool
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    for other in {"busctl", "gdbus", "loginctl"} - {tool}:
        (tmp_path / other).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / other).chmod(0o755)
    monkeypatch.delenv("DISPLAY", raising=False)
    assert probes.read_metered() is metered
    assert UserIdle().read() == idle_s


def test_priority_is_applied_to_all_threads_and_undone() -> None:
    """In a process of its own: not everybody may become less nice again."""
    script = """
import os, threading
from worker.governor.priority import Priority
end = threading.Event()
thread = threading.Thread(target=end.wait, daemon=True)
thread.start()
priority = Priority()
assert priority.apply(7, "idle")
print(os.nice(0), os.getpriority(os.PRIO_PROCESS, thread.native_id) if os.uname().sysname == "Linux" else 7)
undone = priority.undo()
print(undone, os.nice(0))
end.set()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "7 7" or os.nice(0) > 7
    assert second in (f"True {os.nice(0)}", "False 7")


def test_readings_know_nothing_by_default() -> None:
    readings = Readings()
    assert all(getattr(readings, name) is None for name in Readings.__slots__)
