"""What goes on record of a run, and what is read of it, with a real database and signed receipts."""

from pathlib import Path

import pytest

from coordinator.core import events as ev
from coordinator.records import reader, runs
from coordinator.records.views import Bar, Waterfall
from protocol.documents import Receipt, open_signed
from protocol.signing import Signed
from tests.recorded_run import START_UNIX_S, RecordedRun


@pytest.fixture
def run(tmp_path: Path) -> RecordedRun:
    return RecordedRun(tmp_path)


def bars_of(waterfall: Waterfall | None) -> dict[str, Bar]:
    assert waterfall is not None
    return {bar.name: bar for bar in waterfall.bars}


def kinds(run: RecordedRun) -> list[str]:
    return [incident.kind for incident in reader.read_incidents(run.database.engine)]


def test_times_of_a_lease_are_on_record_when_its_round_is_merged(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    opened = run.unix_s
    run.now_s += 10
    header = run.commit(ann)
    run.now_s += 2
    run.check(ann, header.payload_hash)
    assert run.recorder is not None
    open_bars = bars_of(run.recorder.open_round())
    assert [open_bars["ann"].result, open_bars["bob"].result] == ["accepted", "open"]
    assert open_bars["ann"].committed_unix_s == opened + 10
    run.contribute(bob, after_s=20.0)
    closed = run.unix_s
    run.now_s += 3
    run.report(ann)
    waterfall = reader.read_waterfall(run.database.engine, 0)
    bars = bars_of(waterfall)
    assert waterfall is not None
    assert (waterfall.opened_unix_s, waterfall.closed_unix_s) == (opened, closed)
    assert waterfall.straggler == bob
    lease = bars["ann"]
    assert (lease.result, lease.reason, lease.device) == ("accepted", "", "NVIDIA H100 PCIe, 80 GB")
    assert (lease.leased_unix_s, lease.committed_unix_s, lease.checked_unix_s) == (opened, opened + 10, opened + 12)
    assert (lease.merged_unix_s, bars["bob"].merged_unix_s) == (closed + 3, None)
    assert (lease.compute_s, lease.tokens, lease.inner_steps, lease.payload_bytes) == (4.0, 80, 10, 100)


def test_each_lease_says_what_became_of_it_when_a_round_closes_at_its_deadline(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, round={"quorum_fraction": 0.01})
    names = ["ann", "bob", "cleo", "dan", "eve", "fay"]
    ann, bob, cleo, dan, eve, fay = peers = run.meet(*names)
    run.start(*peers)
    run.contribute(ann, after_s=5.0)
    run.check(bob, run.commit(bob).payload_hash, refused_because="the vector is not finite")
    run.commit(cleo)  # its payload does not come
    run.send(ev.LeaseReturned(peer=dan, lease_id=run.granted[dan].lease_id, reason="paused"))
    run.send(ev.PeerLeft(peer=eve, reason="it said goodbye"))
    run.wait_for_deadline()
    bars = bars_of(reader.read_waterfall(run.database.engine))
    assert {name: bars[name].result for name in names} == {
        "ann": "accepted",
        "bob": "refused",
        "cleo": "late",
        "dan": "returned",
        "eve": "away",
        "fay": "expired",
    }
    assert bars["bob"].reason == "the vector is not finite"
    run.commit(fay)  # after its round: it counts as late from now on
    assert bars_of(reader.read_waterfall(run.database.engine, 0))["fay"].result == "late"
    totals = {
        line.name: (line.accepted, line.late, line.refused) for line in reader.read_leaderboard(run.database.engine)
    }
    assert totals["ann"] == (1, 0, 0)
    assert totals["bob"] == (0, 0, 1)
    assert totals["cleo"] == totals["fay"] == (0, 1, 0)


def test_nobody_can_mark_another_peers_work_as_late(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.contribute(ann, bob)
    run.commit(bob, lease_id=run.granted[ann].lease_id)
    assert bars_of(reader.read_waterfall(run.database.engine, 0))["ann"].result == "accepted"


def test_leases_of_a_void_round_stay_beside_those_of_its_next_attempt(run: RecordedRun) -> None:
    (ann,) = run.meet("ann")
    run.start(ann)
    run.send(ev.LeaseReturned(peer=ann, lease_id=run.granted[ann].lease_id, reason="busy"))
    run.wait_for_deadline()
    assert kinds(run) == ["void_round"]
    assert reader.read_incidents(run.database.engine)[0].until_unix_s is None
    run.contribute(ann)
    waterfall = reader.read_waterfall(run.database.engine, 0)
    assert waterfall is not None
    assert [bar.result for bar in waterfall.bars] == ["returned", "accepted"]
    assert reader.read_incidents(run.database.engine)[0].until_unix_s == run.unix_s


def test_lost_worker_is_one_incident_until_it_is_back(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.send(ev.PeerLeft(peer=bob, reason="the session ended"))
    lost = reader.read_incidents(run.database.engine)[0]
    assert (lost.kind, lost.name, lost.until_unix_s) == ("lost_peer", "bob", None)
    assert lost.evidence["lease_id"] == run.granted[bob].lease_id
    run.now_s += 30
    run.join(bob)
    run.now_s += 30
    run.send(ev.PeerLeft(peer=bob, reason="the session ended"))
    again = [incident for incident in reader.read_incidents(run.database.engine) if incident.kind == "lost_peer"]
    assert [(incident.id, incident.count) for incident in again] == [(lost.id, 2)]
    run.now_s += 3600
    run.join(bob)
    run.now_s += 3600
    run.send(ev.PeerLeft(peer=bob, reason="the session ended"))
    assert kinds(run).count("lost_peer") == 2  # long after the first: another one
    run.join(bob)
    run.send(ev.PeerLeft(peer=bob, reason="it said goodbye"))
    assert kinds(run).count("lost_peer") == 2
    marks = [marker.kind for marker in reader.read_markers(run.database.engine) if marker.peer == bob]
    assert marks == ["join", "lost", "join", "lost", "join", "lost", "join", "leave"]


def test_lost_worker_is_over_when_its_round_closed_without_it(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.send(ev.PeerLeft(peer=bob, reason=ev.SESSION_ENDED))
    run.contribute(ann)
    lost = reader.read_incidents(run.database.engine)[0]
    assert (lost.kind, lost.until_unix_s, lost.first_round) == ("lost_peer", run.unix_s, 0)
    assert "without it" in lost.action


def test_evidence_is_kept_when_an_incident_ends_after_a_restart(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.send(ev.PeerLeft(peer=bob, reason=ev.SESSION_ENDED))
    before = reader.read_incidents(run.database.engine)[0]
    run.restart()
    run.join(bob)
    after = next(i for i in reader.read_incidents(run.database.engine) if i.id == before.id)
    assert after.until_unix_s == run.unix_s
    assert after.evidence == before.evidence


def test_what_goes_wrong_is_an_incident_with_its_evidence(run: RecordedRun) -> None:
    ann, bob, val = run.meet("ann", "bob", "val")
    run.start(ann, bob)
    run.join(val, role="validator")
    run.send(ev.PeerLeft(peer=val, reason="the session ended"))
    header = run.commit(bob)
    run.check(bob, header.payload_hash, refused_because="the vector is not finite")
    run.send(ev.StateReported(peer=bob, round=0, digest="f" * 64))
    run.send(ev.PeerBanned(peer=bob, reason="enough"))
    found = {incident.kind: incident for incident in reader.read_incidents(run.database.engine)}
    assert set(found) == {"validator_lost", "refused", "digest_mismatch", "ban"}
    assert found["refused"].evidence == {"reason": "the vector is not finite", "payload_hash": header.payload_hash}
    assert found["refused"].until_unix_s is not None
    assert "ffffffffffff" in found["digest_mismatch"].evidence["reason"]
    assert found["ban"].evidence == {"reason": "enough"}
    assert all(incident.action for incident in found.values())


def test_a_peer_that_fetched_the_state_again_is_no_longer_an_incident(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.send(ev.StateReported(peer=bob, round=0, digest="f" * 64))
    assert reader.read_incidents(run.database.engine)[0].until_unix_s is None
    run.report(bob)
    assert reader.read_incidents(run.database.engine)[0].until_unix_s == run.unix_s


def test_records_go_on_when_the_coordinator_was_restarted(run: RecordedRun) -> None:
    ann, bob, cleo = run.meet("ann", "bob", "cleo")
    run.start(ann, bob, cleo)
    run.contribute(ann)
    run.send(ev.PeerLeft(peer=bob, reason="the session ended"))
    last_event = run.unix_s
    run.restart(down_s=60.0)
    restart = reader.read_incidents(run.database.engine)[0]
    assert (restart.kind, restart.since_unix_s, restart.until_unix_s) == ("restart", last_event, last_event + 60)
    assert run.recorder is not None
    assert {name: bar.result for name, bar in bars_of(run.recorder.open_round()).items()} == {
        "ann": "accepted",
        "bob": "away",
        "cleo": "open",
    }
    run.join(ann)
    run.join(bob, lease_id=run.granted[bob].lease_id)
    run.contribute(bob, cleo)
    bars = bars_of(reader.read_waterfall(run.database.engine, 0))
    assert [bar.result for bar in bars.values()] == ["accepted", "accepted", "accepted"]
    lost = next(i for i in reader.read_incidents(run.database.engine) if i.kind == "lost_peer")
    assert lost.until_unix_s is not None
    assert len(reader.read_leaderboard(run.database.engine)) == 3


def test_credit_and_proofs_can_be_read_when_rounds_were_merged(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    for _ in range(3):
        run.contribute(ann, bob)
        run.report(ann, bob)
    engine = run.database.engine
    board = reader.read_leaderboard(engine)
    assert [(line.rank, line.tokens, line.share, line.compute_s) for line in board] == [
        (1, 240, 0.5, 12.0),
        (2, 240, 0.5, 12.0),
    ]
    history = reader.read_peer(engine, ann)
    assert history is not None
    assert [point.tokens for point in history.credited] == [80, 160, 240]
    assert [lease.round for lease in history.leases] == [2, 1, 0]
    assert reader.read_peer(engine, "nobody") is None
    receipts = reader.read_receipts(engine, peer=ann, limit=2)
    assert [receipt.round for receipt in receipts] == [2, 1]
    assert len(reader.read_receipts(engine)) == 6
    assert [r.seq for r in reader.read_receipts(engine, before_seq=receipts[0].seq, peer=ann)] == [
        receipts[1].seq,
        reader.read_receipts(engine, peer=ann)[2].seq,
    ]
    assert board[0].last_receipt_seq is not None
    proof = reader.read_proof(engine, board[0].last_receipt_seq)
    assert proof is not None
    receipt = open_signed(Signed.from_json(proof.signed), Receipt, signer=run.coordinator.public_key)
    assert (receipt.seq, receipt.previous, receipt.tokens) == (proof.seq, proof.previous, 80)
    before = reader.read_proof(engine, proof.seq - 1)
    assert before is not None
    assert before.hash == proof.previous
    assert reader.read_proof(engine, 10_000) is None


def test_time_is_split_into_computing_exchanging_and_waiting(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.contribute(ann, after_s=10.0)  # 4 s of them computing, 6 fetching; then it waits for bob
    run.contribute(bob, after_s=10.0)
    run.now_s += 2
    run.report(ann, bob)  # the next round opens when the last of them reports
    found = reader.read_communication(run.database.engine)
    assert (found.tokens, found.payload_bytes, found.bytes_per_token) == (160, 200, 1.25)
    assert found.compute_s == 8.0
    assert found.exchange_s == pytest.approx(6.0 + 16.0 + 2.0 + 0.0, abs=2.1)  # bob's report opened the next round
    assert found.idle_s == pytest.approx(10.0, abs=2.1)
    assert found.codec == run.granted[ann].codec
    assert [plan.round for plan in found.plans] == [0]


def test_curves_and_cost_are_bounded_and_split_by_device(run: RecordedRun, tmp_path: Path) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.compute_s = 9.0
    for _ in range(4):
        run.contribute(ann, bob)
        run.report(ann, bob)
    curves = runs.read_curves(run.database.engine)
    assert [point.tokens for point in curves.train] == [160, 320, 480, 640]
    assert curves.train[0].loss == 3.0
    assert [point.round for point in curves.held_out] == [0, 2]
    assert curves.train[2].elapsed_s == curves.train[2].unix_s - curves.train[0].unix_s
    cost = runs.read_cost(run.database.engine, tmp_path)
    devices = {device.device_class: device for device in cost.runs[0].devices}
    assert devices["data-centre GPU"].hours == devices["CPU"].hours == pytest.approx(36.0 / 3600)
    assert devices["CPU"].energy_kwh == pytest.approx(36.0 / 3600 * cost.watts["CPU"] / 1000)
    assert cost.runs[0].tokens == 640


def test_runs_beside_this_one_are_read_only_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    here, other, broken = tmp_path / "here", tmp_path / "other", tmp_path / "broken"
    for folder in (here, other, broken):
        folder.mkdir()
    (broken / "run.db").write_bytes(b"once upon a time " * 100)
    run = RecordedRun(other)
    (ann,) = run.meet("ann")
    run.start(ann)
    run.contribute(ann)
    run.database.close()
    this = RecordedRun(here)
    before = {path.name for path in other.iterdir()}
    cost = runs.read_cost(this.database.engine, here)
    assert [line.folder for line in cost.runs] == ["here", "other"]
    assert cost.runs[1].tokens == 80
    assert cost.unread == ("broken",)
    assert [earlier.folder for earlier in runs.read_earlier_runs(here)] == ["other"]
    curves = runs.read_earlier_run(other)
    assert curves is not None
    assert len(curves.train) == 1
    assert runs.read_earlier_run(broken) is None
    assert {path.name for path in other.iterdir()} - before <= {"run.db-shm", "run.db-wal"}
    this.database.close()


def test_oldest_rounds_are_forgotten_when_there_are_too_many_rows(
    run: RecordedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.records.recorder.MAX_WORK_ROWS", 6)
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    for _ in range(3):
        run.report(ann, bob)
        run.contribute(ann, bob)
    run.restart()
    run.start(ann, bob)
    for _ in range(2):
        run.contribute(ann, bob)
        run.report(ann, bob)
    engine = run.database.engine
    waterfall = reader.read_waterfall(engine)
    assert waterfall is not None
    assert (waterfall.first_round, waterfall.last_round) == (run.state.rounds_merged - 3, run.state.rounds_merged - 1)
    assert reader.read_waterfall(engine, 0) is None
    history = reader.read_peer(engine, ann)
    assert history is not None
    assert history.credited[-1].tokens == history.tokens  # what was forgotten still counts
    assert len(history.leases) == 3
    assert history.joined_unix_s == START_UNIX_S
