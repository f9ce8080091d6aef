"""The operator's commands against a real run: who waits, is let in or turned away, and what the owners read."""

import asyncio
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.operator import operate
from coordinator.run_folder import RunFolder
from tests.processes import (
    RunningCoordinator,
    RunningWorker,
    read_manifests,
    start_coordinator,
    start_worker,
    wait_until,
)

LONG: dict[str, Any] = {"train": {"tokens": 100_000_000}, "round": {"inner_steps": 5, "exchange_s": 3.0}}
WAITING = "waiting for the operator's approval"


def command(*arguments: object, expect: int = 0) -> str:
    """`manyhands coordinator …`: what it prints, or, where it is to fail, the one line that it says why."""
    words = [sys.executable, "-m", "manyhands", "coordinator", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expect, done.stderr
    if expect:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr
    return done.stdout


def ask(coordinator: RunningCoordinator, verb: Any = "status", **options: Any) -> dict[str, Any]:
    return asyncio.run(operate(RunFolder(coordinator.folder), verb, **options))


def peer_of(coordinator: RunningCoordinator, worker: RunningWorker) -> Any:
    assert worker.is_alive(), worker.last_lines()
    return next((peer for peer in ask(coordinator)["peers"] if peer["name"] == worker.name), None)


def wait_for(coordinator: RunningCoordinator, worker: RunningWorker, **facts: object) -> Any:
    """The worker's line in the status once it has these facts."""

    def look() -> Any:
        peer = peer_of(coordinator, worker)
        return peer if peer and facts.items() <= peer.items() else None

    return wait_until(look, 60, every_s=0.2)


def activity(worker: RunningWorker) -> str:
    """What the owner reads."""
    words = [sys.executable, "-m", "manyhands", "worker", "status", "--home", str(worker.home), "--json"]
    (status,) = json.loads(subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout)
    return str(status["activity"])


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    """A run in which every worker is to be approved."""
    folder = tmp_path_factory.mktemp("operator") / "run"
    with start_coordinator(folder, options=["--no-validator"], invite={"approval": True}, **LONG) as running:
        yield running


def test_token_is_printed_and_kept_for_its_owner_when_a_run_starts(coordinator: RunningCoordinator) -> None:
    facts = coordinator.read_json()
    assert facts is not None
    path = coordinator.folder / "operator-token"
    assert facts["operator_token"] == path.read_text().strip()
    assert len(facts["operator_token"]) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert facts["operator_token"] not in json.dumps(ask(coordinator))
    assert facts["operator_token"] not in coordinator.last_lines(1000)


def test_worker_waits_computes_and_is_turned_away_as_the_operator_says(
    coordinator: RunningCoordinator, tmp_path: Path
) -> None:
    with start_worker(coordinator.invite, tmp_path / "ada") as ada:
        waiting = wait_for(coordinator, ada, waiting_for_approval=True, connected=True)
        assert (waiting["status"], waiting["lease"], waiting["lag_rounds"]) == ("syncing", "", None)
        assert waiting["activity"] == WAITING
        verdict = ask(coordinator)["verdict"]
        assert verdict["level"] == "stalled"
        assert "0 of 1 workers have joined; 1 for the operator to approve" in verdict["cause"]
        wait_until(lambda: activity(ada) == WAITING, 40)
        assert not list((ada.home).rglob("blobs/*/*")), "nothing of the run is fetched before the approval"
        assert ask(coordinator)["round"] == 0

        assert command("approve", "ada", coordinator.folder) == "ada is approved\n"
        wait_for(coordinator, ada, waiting_for_approval=False)
        trained = wait_until(lambda: (peer := peer_of(coordinator, ada)) and peer["accepted"] >= 2 and peer, 60)
        assert trained["software"].startswith("manyhands ")
        assert trained["joined_unix_s"] > 1e9
        assert trained["reachable"] is True
        assert trained["lag_rounds"] in (0, 1)

        said = command("ban", ada.name, coordinator.folder, "--reason", "noise")
        assert said.startswith("ada is banned; ")
        assert ada.process.wait(30) == 5
        banned = next(peer for peer in ask(coordinator)["peers"] if peer["name"] == "ada")
        assert (banned["banned"], banned["status"], banned["connected"], banned["lost"]) == (True, "gone", False, None)
        assert "its operator banned it (noise)" in ada.last_lines(1)
    merged = read_manifests(coordinator.folder)
    assert banned["accepted"] == len(merged) >= 2, "what was accepted stays"

    with start_worker(coordinator.invite, tmp_path / "ada") as again:
        assert again.process.wait(60) == 5
        assert "its operator banned it (noise)" in again.last_lines(1)
    assert "may join again" in command("unban", banned["peer"][8:16], coordinator.folder)
    with start_worker(coordinator.invite, tmp_path / "ada") as back:
        wait_for(coordinator, back, banned=False, waiting_for_approval=False, connected=True)
        wait_until(lambda: peer_of(coordinator, back)["accepted"] > banned["accepted"], 60)


def test_waiting_worker_says_goodbye_when_its_owner_stops_it(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    with start_worker(coordinator.invite, tmp_path / "bea") as bea:
        wait_for(coordinator, bea, waiting_for_approval=True, connected=True)
        assert bea.stop() == 0
        peer = next(peer for peer in ask(coordinator)["peers"] if peer["name"] == "bea")
        assert (peer["status"], peer["lost"], peer["waiting_for_approval"]) == ("gone", None, True)


def test_nobody_new_joins_when_an_invite_is_revoked(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    invite = command("invite", coordinator.folder, "--uses", 3).strip()
    newest = json.loads(command("invites", coordinator.folder, "--json"))[0]
    assert (newest["role"], newest["uses"], newest["uses_left"], newest["joined"]) == ("worker", 3, 3, 0)
    assert newest["id"] in command("invites", coordinator.folder)
    assert command("revoke", newest["id"][:10], coordinator.folder).startswith("nobody new joins with")
    with start_worker(invite, tmp_path / "cid") as cid:
        assert cid.process.wait(60) == 3
        assert "this invite was revoked" in cid.last_lines(1)


def test_rounds_take_the_time_that_the_operator_wants(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    with start_worker(coordinator.invite, tmp_path / "dot") as dot:
        wait_for(coordinator, dot, waiting_for_approval=True)
        ask(coordinator, "approve", peer="dot")
        wait_until(lambda: peer_of(coordinator, dot)["accepted"] >= 2, 60)
        assert "rounds should take 2 s" in command("round-time", 2, coordinator.folder)
        status = wait_until(lambda: (now := ask(coordinator))["plan"].startswith("rounds of 2 s") and now, 60)
        assert status["round_time_s"] == 2.0
        wait_until(lambda: ask(coordinator)["round"] >= status["round"] + 2, 60)
        manifests = read_manifests(coordinator.folder)
        assert "as the operator wants" in manifests[-1].plan
        assert manifests[-1].inner_steps > 5
        command("round-time", 0, coordinator.folder)
        wait_until(lambda: ask(coordinator)["plan"] == "as run.toml says", 60)


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (("ban", "nobody"), "no peer is called 'nobody'; `manyhands coordinator status` lists them", 1),
        (("approve", "12D3KooW!"), "no peer is called", 1),
        (("revoke", "zz"), "no invite begins with 'zz'", 1),
        (("round-time", "9999"), "1 to 3600 seconds", 1),
        (("ban", "x" * 65), "peer: String should have at most 64 characters", 2),
        (("ban", "ada", "--reason", "two\nlines"), "reason: ", 2),
    ],
)
def test_command_fails_in_one_line_when_it_makes_no_sense(
    coordinator: RunningCoordinator, arguments: tuple[str, ...], sentence: str, code: int
) -> None:
    assert sentence in command(*arguments, coordinator.folder, expect=code)
