"""Who is let in, whose state is the run's, and what happens to those that vanish, return, pause or start again."""

import pytest

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import LeaseStatus, PeerStatus, Phase
from protocol.signing import sha256_hex
from tests.core_run import CoreRun, digest_after

WRONG = sha256_hex(b"a state that diverged")


def start(*names: str, **round_: object) -> CoreRun:
    """A run whose first round is open."""
    run = CoreRun(round={"inner_steps": 10, "min_peers": len(names), **round_})
    run.start(*names)
    return run


def merge_one_round(run: CoreRun) -> None:
    """All contribute; nobody has reported the new state yet."""
    run.contribute(*run.num_leased())
    assert run.state.phase is Phase.MERGE


# ---- invites


def test_newcomer_is_refused_when_the_invite_is_used_up() -> None:
    run = CoreRun()
    run.send(ev.InviteIssued(token_id="once", uses=1))
    run.join("ann", token_id="once")
    assert run.find(fx.RefusePeer) == []
    run.join("bob", token_id="once")
    assert run.find(fx.RefusePeer)[0].code == "invite_used_up"
    assert "bob" not in run.state.peers


@pytest.mark.parametrize("token_id", ["revoked", "never issued"])
def test_newcomer_is_refused_when_the_invite_is_not_good(token_id: str) -> None:
    run = CoreRun()
    run.send(ev.InviteIssued(token_id="revoked", uses=10))
    run.send(ev.InviteRevoked(token_id="revoked"))
    run.join("ann", token_id=token_id)
    assert run.find(fx.RefusePeer)[0].code == "invite_revoked"


def test_peer_comes_back_when_its_invite_was_used_up_and_revoked_since() -> None:
    run = CoreRun()
    run.send(ev.InviteIssued(token_id="once", uses=1))
    run.join("ann", token_id="once")
    run.send(ev.InviteRevoked(token_id="once"))
    run.send(ev.PeerLeft(peer="ann", reason="asleep"))
    run.join("ann", token_id="once")
    assert run.find(fx.RefusePeer) == []
    assert run.peer("ann").status is PeerStatus.SYNCING


def test_invite_is_used_once_when_the_same_peer_joins_many_times() -> None:
    run = CoreRun()
    run.send(ev.InviteIssued(token_id="twice", uses=2))
    for _ in range(5):
        run.join("ann", token_id="twice")
    run.join("bob", token_id="twice")
    assert run.find(fx.RefusePeer) == []


# ---- which state is the run's


def test_odd_one_is_resynced_when_one_of_three_digests_differs() -> None:
    run = start("ann", "bob", "cid", min_peers=2)
    merge_one_round(run)
    run.report("ann", "bob")
    run.report("cid", digest=WRONG)
    assert [resync.peer for resync in run.find(fx.RequestResync)] == ["cid"]
    assert set(run.num_leased()) == {"ann", "bob"}
    assert run.peer("cid").status is PeerStatus.SYNCING


def test_no_round_opens_when_too_few_agree_on_the_state() -> None:
    run = start("ann", "bob", "cid", min_peers=3)
    merge_one_round(run)
    run.report("ann", "bob")
    run.report("cid", digest=WRONG)
    assert run.state.round is None
    assert run.state.phase is Phase.WARMUP
    run.report("cid")
    assert set(run.num_leased()) == {"ann", "bob", "cid"}


def test_validators_word_decides_when_most_workers_hold_another_state() -> None:
    run = start("ann", "bob", "cid", min_peers=1)
    run.join("val", role="validator")
    run.report("val")
    merge_one_round(run)
    run.report("val")
    run.report("bob")
    run.report("ann", "cid", digest=WRONG)
    assert {resync.peer for resync in run.find(fx.RequestResync)} == {"ann", "cid"}
    assert set(run.num_leased()) == {"bob"}


def test_first_rounds_state_is_known_when_every_worker_claims_another() -> None:
    run = CoreRun(round={"min_peers": 1})
    run.join("liar")
    run.report("liar", digest=WRONG)
    assert run.state.round is None
    assert [resync.peer for resync in run.find(fx.RequestResync)] == ["liar"]
    run.join("ann")
    run.report("ann")
    assert set(run.num_leased()) == {"ann"}


def test_round_is_void_when_the_validator_finds_that_it_was_opened_on_another_state() -> None:
    run = start("ann", "bob", min_peers=2)
    run.join("val", role="validator")
    merge_one_round(run)
    run.report("ann", "bob", digest=WRONG)
    assert run.state.round is not None
    run.commit("ann")
    run.report("val")
    assert "validator" in run.find(fx.VoidRound)[0].reason
    assert not run.find(fx.JudgeContribution)[0].accepted
    run.wait_for_deadline()
    assert {resync.peer for resync in run.find(fx.RequestResync)} == {"ann", "bob"}
    assert len(run.closed) == 1, "a manifest on a state that nobody can follow would end the run"


def test_validator_is_waited_for_when_the_workers_disagree() -> None:
    run = start("ann", "bob", min_peers=1)
    run.join("val", role="validator")
    run.report("val")
    merge_one_round(run)
    run.report("ann")
    run.report("bob", digest=WRONG)
    assert run.state.phase is Phase.MERGE
    run.report("val")
    assert set(run.num_leased()) == {"ann"}


def test_validator_is_not_waited_for_when_the_workers_agree() -> None:
    run = start("ann", "bob")
    run.join("val", role="validator")
    run.report("val")
    merge_one_round(run)
    run.report("ann", "bob")
    assert set(run.num_leased()) == {"ann", "bob"}


def test_joiner_is_resynced_when_its_state_is_not_the_open_rounds() -> None:
    run = start("ann")
    run.join("bob")
    run.report("bob", digest=WRONG)
    assert run.find(fx.RequestResync)[0].peer == "bob"
    run.report("bob")
    assert run.peer("bob").status is PeerStatus.READY


def test_peer_is_resynced_when_it_is_ahead_of_the_run() -> None:
    run = start("ann")
    run.join("bob")
    run.send(ev.StateReported(peer="bob", round=7, digest=digest_after(7)))
    assert run.find(fx.RequestResync)[0].peer == "bob"


def test_peer_gets_no_lease_when_the_state_it_reports_is_an_old_one() -> None:
    run = start("ann", "bob", min_peers=1)
    merge_one_round(run)
    run.join("cid")
    run.send(ev.StateReported(peer="cid", round=0, digest=digest_after(0)))
    run.report("ann", "bob")
    assert set(run.num_leased()) == {"ann", "bob"}
    assert run.peer("cid").status is PeerStatus.SYNCING


# ---- merging


def test_next_round_opens_when_all_who_held_the_state_have_merged() -> None:
    run = start("ann", "bob", min_peers=1)
    merge_one_round(run)
    run.report("ann")
    assert run.state.phase is Phase.MERGE
    run.report("bob")
    assert set(run.num_leased()) == {"ann", "bob"}


def test_next_round_opens_without_the_slow_merger_when_its_time_is_up() -> None:
    run = start("ann", "bob", min_peers=1, merge_timeout_s=20.0)
    merge_one_round(run)
    run.report("ann")
    run.wait(19.0)
    assert run.state.phase is Phase.MERGE
    run.wait_for_deadline()
    assert set(run.num_leased()) == {"ann"}
    run.report("bob")
    run.contribute("ann")
    run.report("ann", "bob")
    assert set(run.num_leased()) == {"ann", "bob"}


def test_merger_is_still_waited_for_when_its_last_report_arrives_again() -> None:
    run = start("ann", "bob", min_peers=1)
    merge_one_round(run)
    run.send(ev.StateReported(peer="ann", round=0, digest=digest_after(0)))
    run.report("bob")
    assert run.state.phase is Phase.MERGE
    run.report("ann")
    assert set(run.num_leased()) == {"ann", "bob"}
    assert run.find(fx.RequestResync) == []


def test_merge_does_not_wait_for_a_peer_when_it_has_left() -> None:
    run = start("ann", "bob", min_peers=1)
    merge_one_round(run)
    run.report("ann")
    run.send(ev.PeerLeft(peer="bob", reason="gone"))
    assert set(run.num_leased()) == {"ann"}


# ---- vanishing and coming back


def test_peer_goes_on_with_its_lease_when_it_comes_back_and_names_it() -> None:
    run = start("ann", "bob")
    lease_id = run.granted["ann"].lease_id
    run.send(ev.PeerLeft(peer="ann", reason="wifi"))
    assert run.lease("ann").status is LeaseStatus.AWAY
    run.join("ann", lease_id=lease_id)
    run.contribute("bob")
    assert run.state.phase is Phase.TRAIN, "the round waits for it again"
    run.contribute("ann")
    assert {credit.peer for credit in run.closed[0].credits} == {"ann", "bob"}


def test_lease_goes_back_when_its_peer_returns_without_it() -> None:
    run = start("ann", "bob")
    units = set(run.granted["ann"].units)
    run.join("ann", lease_id=None)  # a new process: it remembers nothing
    assert run.lease("ann").status is LeaseStatus.CLOSED
    run.contribute("bob")
    run.report("ann", "bob")
    assert units <= {unit for lease in run.granted.values() for unit in lease.units}


def test_round_does_not_wait_when_a_peer_left_and_its_shards_are_leased_again() -> None:
    run = start("ann", "bob", min_peers=1)
    units = set(run.granted["ann"].units)
    run.send(ev.PeerLeft(peer="ann", reason="gone"))
    run.contribute("bob")
    assert run.closed[0].closed_because == "every lease is settled"
    run.report("bob")
    assert units == set(run.granted["bob"].units)


def test_what_a_gone_peer_carried_is_leased_again_when_the_next_round_opens() -> None:
    run = start("ann", "bob", min_peers=1)
    run.commit("ann")
    run.contribute("bob")
    run.send(ev.PeerLeft(peer="ann", reason="gone, and its payload never arrives"))
    run.wait_for_deadline()
    carried = set(run.peer("ann").carried)
    assert carried == set(run.granted["ann"].units)
    run.report("bob")
    assert carried == set(run.granted["bob"].units)


def test_what_a_peer_carries_stays_its_own_when_its_connection_breaks_between_rounds() -> None:
    run = start("ann", "bob", min_peers=1)
    missed = run.granted["ann"].units
    run.contribute("bob")
    run.wait_for_deadline()
    run.send(ev.PeerLeft(peer="ann", reason="wifi"))
    run.join("ann")
    run.report("ann", "bob")
    run.contribute("ann", units=(*run.granted["ann"].units, *missed))
    run.contribute("bob")
    credit = next(credit for credit in run.closed[1].credits if credit.peer == "ann")
    assert set(missed) < set(credit.units)


def test_leases_go_on_when_the_coordinator_restarts_in_mid_round() -> None:
    run = start("ann", "bob")
    leases = {name: grant.lease_id for name, grant in run.granted.items()}
    deadline_s = machine.next_deadline(run.state)
    run.contribute("ann")
    run.send(ev.CoordinatorRestarted())
    assert machine.next_deadline(run.state) == deadline_s
    for name, lease_id in leases.items():
        run.join(name, lease_id=lease_id)
    run.contribute("bob")
    assert {credit.peer for credit in run.closed[0].credits} == {"ann", "bob"}


# ---- pausing


def test_open_round_goes_on_and_none_follows_when_the_operator_pauses() -> None:
    run = start("ann")
    run.send(ev.PauseRequested(paused=True))
    assert set(run.num_leased()) == {"ann"}
    run.contribute("ann")
    assert len(run.closed) == 1
    run.report("ann")
    assert run.state.phase is Phase.PAUSED
    assert machine.next_deadline(run.state) is None
    run.send(ev.PauseRequested(paused=False), after_s=5_000.0)
    assert set(run.num_leased()) == {"ann"}


def test_slow_mergers_are_still_waited_for_when_a_pause_ends_soon() -> None:
    run = start("ann", "bob", min_peers=1)
    merge_one_round(run)
    run.report("ann")
    run.send(ev.PauseRequested(paused=True))
    run.send(ev.PauseRequested(paused=False), after_s=1.0)
    assert run.state.phase is Phase.MERGE
    run.report("bob")
    assert set(run.num_leased()) == {"ann", "bob"}


def test_checkpoint_is_not_moved_when_a_report_is_of_a_round_to_come_or_from_a_worker() -> None:
    run = start("ann")
    run.join("val", role="validator")
    for peer, round_ in (("val", 5), ("ann", 0)):
        run.send(
            ev.EvaluationReported(
                peer=peer, round=round_, digest=WRONG, held_out_loss=1.0, checkpoint=True, report_hash=WRONG
            )
        )
    assert run.state.checkpoint_digest == digest_after(0)


@pytest.mark.parametrize("phase", list(Phase))
def test_phase_is_described_in_words_when_asked(phase: Phase) -> None:
    run = start("ann")
    run.state.phase = phase
    assert machine.describe_phase(run.state)


# ---- pausing workers


def pause(run: CoreRun, name: str, reason: str = "battery") -> None:
    run.send(ev.AvailabilityReported(peer=name, pause_reason=reason))


def test_paused_worker_gets_no_lease_and_is_not_waited_for() -> None:
    run = start("ann", "bob", min_peers=1)
    merge_one_round(run)
    pause(run, "bob")
    run.report("ann")
    assert run.state.phase is Phase.TRAIN
    assert [grant.peer for grant in run.find(fx.GrantLease)] == ["ann"]


def test_round_waits_until_enough_workers_take_leases_again() -> None:
    run = start("ann", "bob")
    merge_one_round(run)
    pause(run, "bob")
    run.report("ann", "bob")
    assert run.state.round is None
    assert machine.describe_phase(run.state) == "2 of 2 workers have joined; 1 paused"
    pause(run, "bob", "")
    assert {grant.peer for grant in run.find(fx.GrantLease)} == {"ann", "bob"}


def test_paused_worker_keeps_its_lease_until_it_returns_it() -> None:
    run = start("ann", "bob")
    lease = run.granted["bob"]
    pause(run, "bob")
    run.contribute("ann")
    assert run.state.round is not None
    run.send(ev.LeaseReturned(peer="bob", lease_id=lease.lease_id, reason="paused: battery"))
    assert run.state.round is None
    assert run.closed[-1].leased_peers == 2
    assert run.peer("bob").refused == 0


def test_worker_that_joins_anew_is_not_paused() -> None:
    run = start("ann", "bob")
    pause(run, "bob")
    run.join("bob")
    assert run.peer("bob").pause_reason == ""
