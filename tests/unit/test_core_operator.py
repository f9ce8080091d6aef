"""What the operator does to a run: bans, approvals and the round time, as the core takes them."""

from typing import Any

import pytest

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.events import load_event
from coordinator.core.state import LeaseStatus, PeerStatus, Phase, dump_state, load_state
from tests.core_run import CoreRun, outstanding


def start(*names: str, **sections: dict[str, Any]) -> CoreRun:
    run = CoreRun(num_shards=100, **sections)
    run.start(*names)
    return run


def ban(run: CoreRun, name: str, reason: str = "") -> None:
    run.send(ev.PeerBanned(peer=name, reason=reason))


# ---- ban


def test_session_ends_and_shards_go_back_when_a_training_peer_is_banned() -> None:
    run = start("ann", "bob")
    units = run.lease("ann").units
    ban(run, "ann", "noise")
    dismissed = run.find(fx.DismissPeer)[0]
    assert (dismissed.peer, dismissed.code, dismissed.reason) == ("ann", "banned", "its operator banned it (noise)")
    assert run.lease("ann").status is LeaseStatus.CLOSED
    assert set(units) <= set(run.state.pool.returned)
    assert run.peer("ann").status is PeerStatus.GONE


def test_round_goes_on_without_the_peer_when_it_is_banned() -> None:
    run = start("ann", "bob")
    run.contribute("bob")
    ban(run, "ann")
    assert [credit.peer for closed in run.find(fx.CloseRound) for credit in closed.credits] == ["bob"]


def test_accepted_contribution_is_credited_when_its_peer_is_banned_in_the_same_round() -> None:
    run = start("ann", "bob")
    run.contribute("ann")
    ban(run, "ann")
    run.contribute("bob")
    assert {credit.peer for closed in run.find(fx.CloseRound) for credit in closed.credits} == {"ann", "bob"}
    assert run.peer("ann").credited_tokens > 0


def test_committed_contribution_is_refused_when_its_peer_is_banned_before_the_check() -> None:
    run = start("ann", "bob")
    header = run.commit("ann")
    ban(run, "ann")
    assert [(judged.peer, judged.accepted) for judged in run.find(fx.JudgeContribution)] == [("ann", False)]
    run.check("ann", header.payload_hash)
    assert run.effects == []
    assert machine.pending_checks(run.state) == []


def test_carried_shards_are_free_when_their_peer_is_banned() -> None:
    run = start("ann", "bob", exchange={"max_contributors": 1})
    aside = next(name for name, lease in run.state.round.leases.items() if lease.status is LeaseStatus.ASIDE)  # type: ignore[union-attr]
    run.contribute(*({"ann", "bob"} - {aside}))
    assert run.peer(aside).carried
    held = len(outstanding(run.state))
    ban(run, aside)
    assert run.peer(aside).carried == []
    assert len(outstanding(run.state)) == held


def test_banned_peer_is_refused_when_it_joins_again_until_it_is_unbanned() -> None:
    run = start("ann", "bob")
    ban(run, "ann", "noise")
    for event in (ev.CoordinatorRestarted(), ev.PeerUnbanned(peer="bob")):
        run.send(event)
    run.join("ann")
    assert [(refused.code, "noise" in refused.reason) for refused in run.find(fx.RefusePeer)] == [("banned", True)]
    run.send(ev.PeerUnbanned(peer="ann"))
    run.join("ann")
    assert run.find(fx.RefusePeer) == []
    assert run.peer("ann").ban_reason == ""


def test_nothing_happens_when_a_stranger_is_banned_or_a_peer_twice() -> None:
    run = start("ann")
    ban(run, "nobody")
    assert run.effects == []
    ban(run, "ann")
    ban(run, "ann")
    assert run.find(fx.DismissPeer) == []


# ---- approval


def test_worker_has_no_part_in_the_run_when_it_is_not_approved() -> None:
    run = CoreRun(round={"min_peers": 1})
    run.join("ann", needs_approval=True)
    assert run.find(fx.HoldPeer)[0].reason == "waiting for the operator's approval"
    run.report("ann")
    assert run.state.reports == {}
    assert run.state.phase is Phase.WAITING_FOR_PEERS
    assert machine.describe_phase(run.state) == "0 of 1 workers have joined; 1 for the operator to approve"


def test_worker_is_let_in_when_it_is_approved() -> None:
    run = CoreRun()
    run.join("ann", needs_approval=True)
    run.send(ev.PeerApproved(peer="ann"))
    assert run.find(fx.AdmitPeer) == [fx.AdmitPeer(peer="ann")]
    run.report("ann")
    assert set(run.num_leased()) == {"ann"}


def test_worker_is_welcome_at_once_when_it_was_approved_while_it_was_away() -> None:
    run = CoreRun()
    run.join("ann", needs_approval=True)
    run.send(ev.PeerLeft(peer="ann", reason="asleep"))
    run.send(ev.PeerApproved(peer="ann"))
    assert run.find(fx.AdmitPeer) == []
    run.join("ann", needs_approval=True)
    assert run.find(fx.HoldPeer) == []


def test_approval_is_asked_once_when_a_worker_joined_before_it_was_needed() -> None:
    run = CoreRun()
    run.join("ann")
    run.send(ev.CoordinatorRestarted())
    run.join("ann", needs_approval=True)
    assert run.find(fx.HoldPeer) == []


def test_waiting_worker_is_turned_away_when_it_is_banned() -> None:
    run = CoreRun()
    run.join("ann", needs_approval=True)
    ban(run, "ann")
    assert run.find(fx.DismissPeer)
    run.send(ev.PeerUnbanned(peer="ann"))
    run.join("ann", needs_approval=True)
    assert run.find(fx.HoldPeer) == [], "an operator who takes a ban back wants the worker"


# ---- round time


def test_next_round_takes_the_wanted_time_when_the_operator_sets_it() -> None:
    run = start("ann", "bob")
    run.play_round({"ann": 1.0, "bob": 1.0})
    run.send(ev.RoundTimeSet(seconds=40.0))
    assert run.state.round is not None
    assert run.state.round.expected_s == pytest.approx(10.0), "the open round does not change"
    run.play_round({"ann": 1.0, "bob": 1.0})
    assert run.state.round.expected_s == pytest.approx(40.0)
    assert run.num_leased() == {"ann": 40, "bob": 40}
    assert run.state.plan is not None
    assert run.state.plan.reason.startswith("rounds of 40 s, as the operator wants: int2, 40 inner steps")
    assert [(plan.round, "40 s" in plan.reason) for plan in run.find(fx.AnnouncePlan)] == [(2, True)]


def test_inner_steps_are_as_the_spec_says_when_the_round_time_is_taken_back() -> None:
    run = start("ann")
    run.send(ev.RoundTimeSet(seconds=40.0))
    run.play_round({"ann": 1.0})
    run.send(ev.RoundTimeSet(seconds=None))
    run.play_round({"ann": 1.0})
    assert run.num_leased() == {"ann": 10}
    assert run.state.plan is not None
    assert run.state.plan.reason == "as run.toml says"


def test_steps_stay_when_a_speed_changes_a_little_and_follow_when_much() -> None:
    run = start("ann")
    run.send(ev.RoundTimeSet(seconds=40.0))
    run.play_round({"ann": 1.0})
    for speed, steps in ((1.05, 40), (1.05, 40), (4.0, 101)):
        run.play_round({"ann": speed})
        assert run.state.plan is not None
        assert run.state.plan.inner_steps == pytest.approx(steps, abs=1)


# ---- old journals


def test_old_events_and_snapshots_are_read_when_they_lack_what_is_new() -> None:
    invite = load_event(b'{"token_id": "t", "uses": 3, "kind": "invite_issued"}')
    assert invite == ev.InviteIssued(token_id="t", uses=3)
    joined = load_event(
        b'{"peer": "p", "name": "n", "device": "", "role": "worker", "token_id": "t", "lease_id": null,'
        b' "kind": "peer_joined"}'
    )
    assert isinstance(joined, ev.PeerJoined)
    assert not joined.needs_approval
    run = start("ann")
    text = dump_state(run.state).decode()
    for new in ('"software":"",', '"waiting_for_approval":false,', '"banned":false,', '"ban_reason":"",'):
        assert new in text
        text = text.replace(new, "")
    text = text.replace('"round_time_s":null,', "").replace('"state_round":0,', "").replace(',"round_s":null', "")
    assert load_state(text.encode()).peers["ann"].state_round == -1
