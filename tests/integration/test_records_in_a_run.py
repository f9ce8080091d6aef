"""What real processes leave on record: leases, a killed worker, proofs, a coordinator that was killed and went on."""

from pathlib import Path

from coordinator.run_folder import RunFolder, find_genesis
from protocol.documents import Receipt, open_signed
from protocol.signing import Signed
from tests.processes import RunningCoordinator, start_coordinator, start_worker, wait_until


def kinds(coordinator: RunningCoordinator) -> set[str]:
    return {incident["kind"] for incident in coordinator.get("/api/incidents")}


def check_records(coordinator: RunningCoordinator) -> None:
    """The answers of a run with merged rounds fit together, and a receipt is the coordinator's."""
    board = coordinator.get("/api/leaderboard")
    assert board[0]["tokens"] > 0
    assert board[0]["compute_s"] > 0.0
    proof = coordinator.get(f"/api/proof/{board[0]['last_receipt_seq']}")
    home = RunFolder(coordinator.folder)
    database = home.open_database(home.spec())
    genesis = find_genesis(database)
    database.close()
    assert genesis is not None
    receipt = open_signed(Signed.from_json(proof["signed"]), Receipt, signer=genesis.public_key)
    assert receipt.peer == board[0]["peer"]
    waterfall = coordinator.get("/api/waterfall?round=1")
    assert "accepted" in {bar["result"] for bar in waterfall["bars"]}
    for bar in waterfall["bars"]:
        if bar["result"] == "accepted":
            assert bar["leased_unix_s"] < bar["committed_unix_s"] <= bar["checked_unix_s"] <= waterfall["closed_unix_s"]
    spent = coordinator.get("/api/communication")
    assert spent["bytes_per_token"] > 0
    assert spent["compute_s"] > 0
    assert coordinator.get("/api/coordinator")["commit_p99_s"] > 0


def test_killed_workers_and_coordinators_are_incidents(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        start_coordinator(run, options=["--no-validator"], round={"inner_steps": 40}) as coordinator,
        start_worker(coordinator.invite, tmp_path / "ada"),
        start_worker(coordinator.invite, tmp_path / "bob") as bob,
    ):
        wait_until(lambda: coordinator.status()["round"] >= 3 and coordinator.status()["workers"] == 2, 60)
        check_records(coordinator)
        bob.kill()
        wait_until(lambda: "lost_peer" in kinds(coordinator), 30)
        coordinator.kill()
        with start_coordinator(run, options=["--no-validator"]) as again:
            assert "restart" in kinds(again)
            before = again.status()["round"]
            wait_until(lambda: again.status()["round"] >= before + 2, 60)
            check_records(again)
            assert {"join", "lost", "restart", "codec"} <= {mark["kind"] for mark in again.get("/api/markers")}
            text = str([again.get(path) for path in ("/api/status", "/api/markers", "/api/incidents")])
            assert "mh1." not in text
            assert (run / "operator-token").read_text().strip() not in text
