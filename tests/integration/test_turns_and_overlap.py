"""Whole runs whose workers take turns, and train on while a round is exchanged and merged."""

import itertools
import re
from pathlib import Path
from typing import Any

from protocol.documents import Manifest
from tests.integration.test_run import verify, worker_status
from tests.processes import read_manifests, start_coordinator, start_worker

SHORT = {"train": {"tokens": 16_000}, "checkpoint": {"every_rounds": 5}}
STEP_TOKENS = 4 * 32


def play(tmp_path: Path, exchange: dict[str, Any], **sections: Any) -> list[Manifest]:
    """A run of two workers from beginning to end; what holds for every run is asserted here."""
    folder = tmp_path / "run"
    with start_coordinator(
        folder, options=["--exit-when-finished"], exchange=exchange, **(SHORT | sections)
    ) as coordinator:
        with (
            start_worker(coordinator.invite, tmp_path / "ada") as ada,
            start_worker(coordinator.invite, tmp_path / "ben", options=["--throttle", "0.6"]) as ben,
        ):
            assert ada.process.wait(120) == 0, ada.last_lines()
            assert ben.process.wait(30) == 0, ben.last_lines()
        assert coordinator.process.wait(30) == 0, coordinator.last_lines()
    facts = verify(folder)
    assert {worker_status(tmp_path / name)["digest"] for name in ("ada", "ben")} == {facts["digest"]}
    assert isinstance(facts["credit"], dict)
    assert len(facts["credit"]) == 2
    steps_trained = sum(int(str(worker_status(tmp_path / name)["steps_trained"])) for name in ("ada", "ben"))
    assert sum(facts["credit"].values()) <= steps_trained * STEP_TOKENS, "more was credited than trained"
    return read_manifests(folder)


def test_shards_trained_ahead_are_merged_when_overlap_is_on(tmp_path: Path) -> None:
    manifests = play(
        tmp_path,
        {"overlap": True, "codec": "auto"},
        round={"inner_steps": 5, "min_peers": 2},
        train=SHORT["train"] | {"optimizer": "auto", "learning_rate": "auto"},
    )
    assert max(entry.tokens for manifest in manifests[1:] for entry in manifest.contributions) > 5 * STEP_TOKENS
    assert any("Mbit/s" in manifest.plan for manifest in manifests), "no link was ever measured"
    assert all(re.search(r"(muon|adamw) \(.*% of a step\), rate", manifest.plan) for manifest in manifests)


def test_workers_contribute_by_turns_when_there_is_one_place(tmp_path: Path) -> None:
    manifests = play(tmp_path, {"max_contributors": 1, "overlap": True}, round={"inner_steps": 5, "min_peers": 2})
    peers = [entry.peer for manifest in manifests for entry in manifest.contributions]
    assert len(peers) == len(manifests)
    assert len(set(peers)) == 2
    assert all(first != second for first, second in itertools.pairwise(peers[:-1]))  # the last round may be one's alone
