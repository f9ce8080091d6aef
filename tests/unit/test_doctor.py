"""The doctor's checks: what is ok, what needs attention, what is in the way."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from protocol.documents import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Invite
from worker.doctor import machine, outside
from worker.doctor.checkup import Checkup
from worker.doctor.findings import Finding, Level, can_compute, render_json
from worker.governor.preferences import CompileMode


def finding(level: Level) -> Finding:
    return Finding(topic="disk", level=level, text="so much", figures={"free_bytes": 3})


def test_only_a_problem_keeps_a_machine_from_computing() -> None:
    others = [finding(level) for level in Level if level is not Level.PROBLEM]
    assert can_compute(others)
    assert not can_compute([*others, finding(Level.PROBLEM)])


def test_json_has_level_text_and_figures_of_each_finding() -> None:
    shown = json.loads(render_json([finding(Level.ATTENTION)]))
    assert shown["can_compute"]
    (row,) = shown["findings"]
    assert (row["level"], row["figures"]) == ("attention", {"free_bytes": 3})


def test_packages_are_a_problem_when_one_is_of_a_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_packages().level is Level.OK
    monkeypatch.setattr(machine, "requires", lambda _: ["numpy<1.0", "no-such-package-here", "psycopg ; extra == 'x'"])
    found = machine.check_packages()
    assert found.level is Level.PROBLEM
    assert "is not <1.0" in found.text
    assert "no-such-package-here is missing" in found.text
    assert "psycopg" not in found.text


@pytest.mark.parametrize(
    ("free_bytes", "level"),
    [(300_000_000, Level.PROBLEM), (900_000_000, Level.ATTENTION), (8_000_000_000, Level.OK)],
)
def test_memory_is_judged_by_what_is_free(free_bytes: int, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: free_bytes)
    assert machine.check_memory().level is level


@pytest.mark.parametrize(
    ("free_bytes", "level"),
    [(100_000_000, Level.PROBLEM), (3_000_000_000, Level.ATTENTION), (90_000_000_000, Level.OK)],
)
def test_disk_is_judged_by_what_is_free(
    free_bytes: int, level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    assert machine.check_disk(tmp_path / "not" / "yet").level is level
    assert not (tmp_path / "not").exists()


def test_disk_is_a_problem_when_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in machine.check_disk(tmp_path).text


@pytest.mark.parametrize(
    ("battery", "level"),
    [
        (None, Level.OK),
        (SimpleNamespace(percent=80.0, power_plugged=True), Level.OK),
        (SimpleNamespace(percent=80.0, power_plugged=False), Level.ATTENTION),
        (SimpleNamespace(percent=80.0, power_plugged=None), Level.OK),  # the system does not know
    ],
)
def test_power_needs_attention_when_a_battery_is_drained(
    battery: object, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert machine.check_power().level is level


def test_gpu_needs_attention_when_it_is_there_but_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_display_vendors", lambda: {machine.NVIDIA})
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: "")
    without_driver = machine.check_gpu(torch.device("cpu"))
    assert without_driver.level is Level.ATTENTION
    assert "install NVIDIA's driver" in without_driver.advice
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: "570.1")
    assert "torch built for CUDA" in machine.check_gpu(torch.device("cpu")).advice


@pytest.mark.parametrize(
    ("obstacle", "mode", "level", "said"),
    [
        ("", "off", Level.OK, "set compile auto"),
        ("", "auto", Level.OK, "where it pays"),
        ("there is no C++ compiler (g++)", "off", Level.OK, "no C++ compiler"),
        ("there is no C++ compiler (g++)", "on", Level.ATTENTION, "no C++ compiler"),
    ],
)
def test_compiling_needs_attention_when_it_is_wanted_and_not_possible(
    obstacle: str, mode: CompileMode, level: Level, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_obstacle", lambda _: obstacle)
    finding = machine.check_compiling(torch.device("cpu"), mode)
    assert finding.level is level
    assert said in finding.text


def test_matrix_products_are_timed() -> None:
    assert machine.measure_gflops(torch.device("cpu"), seconds=0.05) > 0.1


@pytest.mark.parametrize(
    ("offset_s", "level"),
    [(None, Level.UNKNOWN), (0.4, Level.OK), (-3.0, Level.OK), (400.0, Level.ATTENTION), (-400.0, Level.ATTENTION)],
)
def test_clock_is_judged_by_its_offset(offset_s: float | None, level: Level) -> None:
    assert outside.check_clock(offset_s).level is level


@pytest.mark.parametrize(
    ("theirs", "level"),
    [
        (PROTOCOL_VERSION, Level.OK),
        (OLDEST_PROTOCOL_VERSION - 1, Level.PROBLEM),
        (PROTOCOL_VERSION + 1, Level.ATTENTION),
    ],
)
def test_protocol_is_judged_by_the_version_that_is_offered(theirs: int, level: Level) -> None:
    assert outside.check_protocol(theirs).level is level


def test_invite_needs_attention_when_it_expires_soon() -> None:
    invite = Invite(
        run_id="0" * 16,
        address="example.org:7640",
        tls_fingerprint="0" * 64,
        token_id="0" * 16,
        role="worker",
        expires_unix_s=1,
        uses=1,
    )
    assert outside.check_invite(invite).level is Level.ATTENTION


def test_reachability_is_not_claimed_when_the_coordinator_is_here() -> None:
    assert outside.check_reachability("127.0.0.1:7640").level is Level.UNKNOWN


def test_unknown_device_and_damaged_invite_are_problems_and_not_errors(tmp_path: Path) -> None:
    checkup = Checkup(home=tmp_path / "home", name="ada", device_name="gpu")
    checkup.look_at_run("mh1.nonsense", checkup.look_at_machine())
    problems = {found.topic for found in checkup.findings if found.level is Level.PROBLEM}
    assert problems == {"device", "invite"}
    assert not (tmp_path / "home").exists()
