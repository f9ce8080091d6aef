"""Whole runs that are merged in groups: the two-level form, and the butterfly."""

from pathlib import Path
from typing import Any

import pytest

from protocol.documents import Manifest
from tests.integration.test_run import verify, wait_for_round, worker_status
from tests.processes import read_manifests, start_coordinator, start_worker, wait_until

NAMES = ("ada", "ben", "cleo")
SHORT = {"train": {"tokens": 8_000}, "round": {"inner_steps": 5, "min_peers": 3, "exchange_s": 20.0}}


def play(tmp_path: Path, exchange: dict[str, Any]) -> list[Manifest]:
    folder = tmp_path / "run"
    with start_coordinator(folder, options=["--exit-when-finished"], exchange=exchange, **SHORT) as coordinator:
        with (
            start_worker(coordinator.invite, tmp_path / "ada") as ada,
            start_worker(coordinator.invite, tmp_path / "ben"),
            start_worker(coordinator.invite, tmp_path / "cleo"),
        ):
            wait_until(lambda: not ada.is_alive(), 150)
            assert ada.process.returncode == 0, ada.last_lines()
        assert coordinator.process.wait(30) == 0, coordinator.last_lines()
    facts = verify(folder)
    assert {worker_status(tmp_path / name)["digest"] for name in NAMES} == {facts["digest"]}
    manifests = read_manifests(folder)
    assert any(manifest.groups for manifest in manifests)
    return manifests


def test_replicas_end_equal_when_groups_are_merged_first(tmp_path: Path) -> None:
    manifests = play(tmp_path, {"group_size": 2})
    whole = [manifest for manifest in manifests if len(manifest.contributions) == 3]
    assert all([len(group.peers) for group in manifest.groups] == [2, 1] for manifest in whole)
    assert all(group.codec == "int8" for manifest in whole for group in manifest.groups)


def test_replicas_end_equal_when_workers_average_by_butterfly(tmp_path: Path) -> None:
    manifests = play(tmp_path, {"method": "butterfly"})
    assert all(len(manifest.groups) == 1 for manifest in manifests)
    assert max(len(manifest.groups[0].peers) for manifest in manifests) == 3


@pytest.mark.parametrize("exchange", [{"group_size": 2}, {"method": "butterfly"}], ids=["two-level", "butterfly"])
def test_run_goes_on_when_a_worker_is_killed_amid_groups(tmp_path: Path, exchange: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    spec: dict[str, Any] = {
        "round": {"inner_steps": 5, "min_peers": 2, "exchange_s": 8.0, "heartbeat_timeout_s": 5.0},
        "exchange": exchange,
    }
    with (
        start_coordinator(folder, **spec) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada"),
        start_worker(coordinator.invite, tmp_path / "ben"),
        start_worker(coordinator.invite, tmp_path / "cleo") as cleo,
    ):
        wait_for_round(coordinator, 2, 90)
        cleo.kill()
        wait_for_round(coordinator, int(coordinator.status()["round"]) + 3, 90)
    verify(folder)
