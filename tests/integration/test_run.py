"""A whole run with real processes, and what happens to it when they are killed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

from protocol.shard_format import decode_shard
from tests.processes import RunningCoordinator, start_coordinator, start_worker, wait_until

SHORT = {"train": {"tokens": 12_000}, "checkpoint": {"every_rounds": 5}}
LONG = {"train": {"tokens": 10_000_000}}


def manyhands(*arguments: str, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user would."""
    command = [sys.executable, "-m", "manyhands", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def verify(folder: Path) -> dict[str, object]:
    done = manyhands("verify", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    facts: dict[str, object] = json.loads(done.stdout)
    return facts


def wait_for_round(coordinator: RunningCoordinator, round_: int, timeout_s: float = 60.0) -> None:
    wait_until(lambda: coordinator.status()["round"] >= round_, timeout_s, every_s=0.2)


def worker_status(home: Path) -> dict[str, object]:
    status: dict[str, object] = json.loads(next(home.glob("runs/*/status.json")).read_text())
    return status


def test_run_ends_with_equal_replicas_when_two_workers_train_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start_coordinator(folder, options=["--exit-when-finished"], **SHORT) as coordinator:
        with (
            start_worker(coordinator.invite, tmp_path / "ada") as ada,
            start_worker(coordinator.invite, tmp_path / "ben", options=["--throttle", "0.5"]) as ben,
        ):
            assert ada.process.wait(90) == 0, ada.last_lines()
            assert ben.process.wait(30) == 0, ben.last_lines()
        assert coordinator.process.wait(30) == 0, coordinator.last_lines()

    facts = verify(folder)
    digests = {worker_status(tmp_path / name)["digest"] for name in ("ada", "ben")}
    assert digests == {facts["digest"]}
    assert isinstance(facts["tokens"], int)
    assert facts["tokens"] >= 12_000
    assert isinstance(facts["credit"], dict)
    assert sum(facts["credit"].values()) == facts["tokens"]
    assert len(facts["credit"]) == 2

    exported = tmp_path / "exported"
    done = manyhands("export", str(folder), str(exported))
    assert done.returncode == 0, done.stderr
    assert loss_by_transformers(exported, folder) == pytest.approx(reported_loss(exported), abs=1e-4)
    written = manyhands("generate", str(exported), "--prompt", "the old", "--max-new-tokens", "20")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("the old")


def reported_loss(exported: Path) -> float:
    """The held-out loss that the validator signed, as the checkpoint carries it."""
    return float(json.loads((exported / "manyhands.json").read_text())["card"]["held_out_loss"])


def loss_by_transformers(exported: Path, folder: Path) -> float:
    """Held-out loss of the exported model, by transformers alone on the run's held-out text."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(exported, local_files_only=True).eval()
    rows = held_out_rows(folder)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in torch.from_numpy(rows)]
    return float(np.mean(losses))


def held_out_rows(folder: Path) -> np.ndarray:
    from coordinator.run_folder import RunFolder, find_genesis
    from protocol.documents import Genesis

    home = RunFolder(folder)
    database = home.open_database(home.spec())
    signed = find_genesis(database)
    database.close()
    assert signed is not None
    genesis = Genesis.model_validate_json(signed.body)
    return decode_shard(home.store.read(genesis.held_out_hash), genesis.vocabulary_size)


def test_run_goes_on_when_a_worker_is_killed_and_another_joins(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        start_coordinator(folder, **LONG) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada") as ada,
        start_worker(coordinator.invite, tmp_path / "ben") as ben,
    ):
        wait_for_round(coordinator, 2)
        ben.kill()
        with start_worker(coordinator.invite, tmp_path / "cleo") as cleo:
            wait_until(lambda: credited(coordinator, "cleo") > 0, 60, every_s=0.2)
            killed_at = coordinator.status()["round"]
            wait_for_round(coordinator, killed_at + 2)
            assert ada.is_alive()
            assert cleo.stop() == 0, cleo.last_lines()
        assert coordinator.stop() == 0, coordinator.last_lines()
    verify(folder)


def credited(coordinator: RunningCoordinator, name: str) -> int:
    return sum(peer["credited_tokens"] for peer in coordinator.status()["peers"] if peer["name"] == name)


def test_worker_hands_its_lease_back_when_it_is_told_to_stop(tmp_path: Path) -> None:
    # Leases of minutes: only a lease that is handed back lets the other worker's round close soon.
    slow = {"round": {"inner_steps": 4000}, **LONG}
    with (
        start_coordinator(tmp_path / "run", **slow) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada") as ada,
    ):
        wait_until(lambda: coordinator.status()["phase"] == "train", 60)
        assert ada.stop() == 0, ada.last_lines()
        status = wait_until(lambda: (s := coordinator.status())["phase"] == "waiting_for_peers" and s, timeout_s=10)
        assert [peer["status"] for peer in status["peers"] if peer["name"] == "ada"] == ["gone"]
        assert status["tokens"] == 0


def test_run_goes_on_from_its_folder_when_the_coordinator_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start_coordinator(folder, **LONG) as coordinator, start_worker(coordinator.invite, tmp_path / "ada") as ada:
        wait_for_round(coordinator, 3)
        coordinator.kill()
        before = verify(folder)
        with start_coordinator(folder) as again:
            assert again.status()["round"] >= before["rounds"]
            wait_for_round(again, int(str(before["rounds"])) + 3)
            assert ada.is_alive(), ada.last_lines()
            assert again.stop() == 0, again.last_lines()
    after = verify(folder)
    assert after["tokens"] > before["tokens"]


def test_verify_names_the_entry_when_the_ledger_is_altered(tmp_path: Path) -> None:
    import sqlite3

    folder = tmp_path / "run"
    with start_coordinator(folder, options=["--exit-when-finished"], **SHORT) as coordinator:
        with start_worker(coordinator.invite, tmp_path / "ada") as ada:
            assert ada.process.wait(90) == 0, ada.last_lines()
        coordinator.process.wait(30)
    with sqlite3.connect(folder / "run.db") as database:
        (seq, body) = database.execute("SELECT seq, body FROM ledger WHERE kind = 'receipt' LIMIT 1").fetchone()
        database.execute("UPDATE ledger SET body = ? WHERE seq = ?", (body.replace(b'"round":0', b'"round":1'), seq))
    done = manyhands("verify", str(folder))
    assert done.returncode == 7
    assert f"ledger entry {seq}:" in done.stderr
