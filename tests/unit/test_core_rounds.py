"""What a round takes, what it refuses, how it ends, and where work goes that was not in time."""

import pytest

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import leases, machine
from coordinator.core.state import MAX_EXCHANGE_S, LeaseStatus, Phase, Unit
from tests.core_run import SHARD_TOKENS, CoreRun, outstanding


def start(*names: str, **round_: object) -> CoreRun:
    """A run whose first round is open, with ten shards leased to each worker."""
    run = CoreRun(round={"inner_steps": 10, "min_peers": len(names), **round_})
    run.start(*names)
    return run


def test_round_closes_at_once_when_every_lease_is_settled() -> None:
    run = start("ann", "bob")
    run.contribute("ann")
    run.contribute("bob")
    closed = run.find(fx.CloseRound)[0]
    assert closed.closed_because == "every lease is settled"
    assert {credit.peer: credit.tokens for credit in closed.credits} == {"ann": 80, "bob": 80}
    assert run.state.tokens_credited == closed.tokens_after == 160


def test_round_closes_with_what_is_there_when_its_deadline_comes() -> None:
    run = start("ann", "bob")
    run.contribute("ann")
    run.wait_for_deadline()
    closed = run.find(fx.CloseRound)[0]
    assert [credit.peer for credit in closed.credits] == ["ann"]
    assert (closed.leased_peers, closed.closed_because) == (2, "deadline")


def test_late_work_is_credited_once_with_the_next_contribution_when_the_round_was_missed() -> None:
    run = start("ann", "bob")
    run.contribute("ann")
    run.wait_for_deadline()
    missed = run.granted["bob"].units
    late = run.commit("bob")
    assert "late" in run.find(fx.JudgeContribution)[0].reason
    assert late.units == missed
    run.report("ann", "bob")
    run.contribute("bob", units=(*run.granted["bob"].units, *missed))
    everywhere = outstanding(run.state)
    assert len(everywhere) == len(set(everywhere)), "a shard is in two places"
    run.contribute("ann")
    credits_ = {credit.peer: credit.units for credit in run.find(fx.CloseRound)[0].credits}
    assert set(missed) < set(credits_["bob"])
    run.report("ann", "bob")
    run.contribute("bob", units=(*run.granted["bob"].units, *missed))
    run.contribute("ann")
    credits_ = {credit.peer: credit.units for credit in run.find(fx.CloseRound)[0].credits}
    assert set(missed).isdisjoint(credits_["bob"]), "credited a second time"


def test_carried_shards_are_leased_again_when_the_next_contribution_does_not_name_them() -> None:
    run = start("ann", "bob")
    lost = set(run.granted["bob"].units)
    run.contribute("ann")
    run.wait_for_deadline()
    run.report("ann", "bob")
    run.contribute("bob")  # it started again, and knows nothing of what it did before
    run.contribute("ann")
    run.report("ann", "bob")
    assert lost <= {unit for grant in run.granted.values() for unit in grant.units}


def test_peer_is_told_and_keeps_its_work_when_its_payload_does_not_arrive_in_time() -> None:
    run = start("ann", "bob")
    run.contribute("ann")
    header = run.commit("bob")
    run.wait_for_deadline()
    verdict = run.find(fx.JudgeContribution)[0]
    assert (verdict.peer, verdict.payload_hash, verdict.accepted) == ("bob", header.payload_hash, False)
    run.check("bob", header.payload_hash)  # it arrives after all
    assert run.effects == []
    assert run.peer("bob").carried == list(header.units)


def test_nothing_is_credited_and_the_work_is_kept_when_the_quorum_is_missed() -> None:
    run = start("ann", "bob", "cid", quorum_fraction=0.5)
    run.contribute("ann")
    done = run.granted["ann"].units
    run.wait_for_deadline()
    assert "quorum" in run.find(fx.VoidRound)[0].reason
    assert not run.closed
    assert run.state.tokens_credited == run.peer("ann").credited_tokens == 0
    assert run.state.rounds_merged == 0
    assert run.state.round is not None, "the next round opens: all still hold the state"
    run.contribute("bob", "cid")
    run.contribute("ann", units=(*run.granted["ann"].units, *done))
    credit = next(credit for credit in run.closed[0].credits if credit.peer == "ann")
    assert set(credit.units) == {*run.granted["ann"].units, *done}


def test_quorum_is_of_all_that_was_leased_when_peers_leave() -> None:
    run = start("ann", "bob", "cid", quorum_fraction=0.5)
    for name in ("bob", "cid"):
        run.send(ev.PeerLeft(peer=name, reason="closed its laptop"))
    run.contribute("ann")
    assert run.find(fx.VoidRound), "two of three are gone: a third of what was leased is no quorum"


def test_shards_are_leased_again_when_their_payload_is_refused() -> None:
    run = start("ann", "bob")
    refused = run.commit("ann")
    run.check("ann", refused.payload_hash, refused_because="not a payload")
    assert not run.find(fx.JudgeContribution)[0].accepted
    run.contribute("bob")
    run.report("ann", "bob")
    again = {unit for grant in run.find(fx.GrantLease) for unit in grant.units}
    assert set(refused.units) <= again
    assert run.peer("ann").credited_tokens == 0


def test_unfinished_shards_go_back_when_a_lease_was_done_in_part() -> None:
    run = start("ann")
    units = run.granted["ann"].units
    run.contribute("ann", units=units[:3])
    assert run.peer("ann").credited_shards == 3
    run.report("ann")
    assert set(units[3:]) <= set(run.granted["ann"].units)


def test_round_waits_for_the_payload_when_only_the_header_is_there() -> None:
    run = start("ann")
    header = run.commit("ann")
    assert run.find(fx.CheckPayload)[0].payload_hash == header.payload_hash
    assert machine.pending_checks(run.state) == run.effects
    assert run.state.phase is Phase.TRAIN


def test_payload_is_asked_for_again_and_counted_once_when_a_header_is_sent_twice() -> None:
    run = start("ann", "bob")
    header = run.commit("ann")
    run.send(header)
    assert run.find(fx.CheckPayload)[0].payload_hash == header.payload_hash
    run.check("ann", header.payload_hash)
    run.check("ann", header.payload_hash)
    run.contribute("bob")
    assert len(run.closed[0].credits) == 2


def test_first_header_stands_when_another_one_follows_for_the_same_lease() -> None:
    run = start("ann", "bob")
    first = run.commit("ann")
    run.commit("ann", units=first.units[:5])
    assert "committed already" in run.find(fx.JudgeContribution)[0].reason
    run.check("ann", first.payload_hash)
    run.contribute("bob")
    assert first.contribution_hash in {credit.contribution_hash for credit in run.closed[0].credits}


def test_verdict_stands_when_a_payload_is_looked_at_twice() -> None:
    run = start("ann", "bob")
    header = run.commit("ann")
    run.check("ann", header.payload_hash, norm=3.0)
    run.check("ann", header.payload_hash, refused_because="the disk broke since")
    assert run.effects == []
    run.contribute("bob")
    assert {credit.peer: credit.norm for credit in run.closed[0].credits} == {"ann": 3.0, "bob": 1.0}


FOREIGN: Unit = (55, 5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lease_id": 999}, "late"),
        ({"base_digest": "0" * 64}, "another state"),
        ({"tokens": 81}, "tokens"),
        ({"units": [FOREIGN]}, "none of the lease's shards"),
        ({"units": []}, "none of the lease's shards"),
        ({"units": [FOREIGN, FOREIGN]}, "twice"),
        ({"units": [(1, index) for index in range(2 * leases.MAX_UNITS + 1)]}, "at most"),
    ],
)
def test_header_is_refused_with_a_reason_when_it_does_not_fulfil_the_lease(
    changes: dict[str, object], reason: str
) -> None:
    run = start("ann", "bob")
    run.commit("ann", **changes)  # type: ignore[arg-type] # any field of a header
    verdict = run.find(fx.JudgeContribution)[0]
    assert not verdict.accepted
    assert reason in verdict.reason
    assert run.peer("ann").refused == 1
    run.contribute("ann")
    assert run.find(fx.JudgeContribution)[0].accepted, "the lease is still there for an honest header"


def test_shards_of_others_earn_nothing_when_a_header_names_them() -> None:
    run = start("ann", "bob")
    run.contribute("ann", units=(*run.granted["ann"].units, *run.granted["bob"].units, FOREIGN))
    run.contribute("bob")
    credits_ = {credit.peer: credit.units for credit in run.closed[0].credits}
    assert credits_ == {"ann": run.granted["ann"].units, "bob": run.granted["bob"].units}


def test_rounds_allow_more_for_the_exchange_when_no_payload_arrived_in_time() -> None:
    run = start("ann", "bob", exchange_s=10.0)
    allowed_s = []
    for _ in range(3):
        round_ = run.state.round
        assert round_ is not None
        allowed_s.append(round_.deadline_s - round_.opened_s - 2.0 * round_.expected_s)
        run.commit("ann")
        run.commit("bob")
        run.wait_for_deadline()
        assert "no contribution" in run.find(fx.VoidRound)[0].reason
    assert allowed_s == pytest.approx([10.0, 20.0, 40.0])
    for _ in range(20):
        run.commit("ann")
        run.commit("bob")
        run.wait_for_deadline()
    assert run.state.exchange_s == MAX_EXCHANGE_S
    assert run.state.late_rounds == 9  # no more than it takes to get there


def test_rounds_allow_less_for_the_exchange_again_when_half_of_it_would_do() -> None:
    run = start("ann", "bob", exchange_s=10.0)
    for _ in range(2):
        run.commit("ann")
        run.commit("bob")
        run.wait_for_deadline()
    allowed_s = [run.state.exchange_s]
    for _ in range(3):
        run.contribute("ann", "bob")
        run.report("ann", "bob")
        allowed_s.append(run.state.exchange_s)
    assert allowed_s == [40.0, 20.0, 10.0, 10.0]


def test_rounds_allow_no_more_when_somebody_was_in_time_or_nobody_had_anything_to_send() -> None:
    run = start("ann", "bob", exchange_s=10.0)
    run.commit("ann")
    run.contribute("bob")
    run.wait_for_deadline()
    assert len(run.closed) == 1
    run.report("ann", "bob")
    run.wait_for_deadline()
    assert run.find(fx.VoidRound)
    assert run.state.exchange_s == 10.0


def test_rounds_do_not_follow_each_other_at_once_when_every_peer_hands_its_lease_back() -> None:
    run = start("ann", exchange_s=10.0)
    rounds_voided = 0
    for _ in range(100):
        if run.state.round is not None:
            lease = run.granted["ann"]
            run.send(ev.LeaseReturned(peer="ann", lease_id=lease.lease_id, reason="out of memory"), after_s=0.01)
            rounds_voided += len(run.find(fx.VoidRound))
        else:
            run.wait_for_deadline()
    assert run.now_s >= 10.0 * (rounds_voided - 1)


def test_joiner_gets_its_first_lease_in_the_next_round_when_it_joins_in_mid_round() -> None:
    run = start("ann", "bob")
    members = set(run.num_leased())
    run.join("cid")
    run.report("cid")
    assert run.find(fx.GrantLease) == []
    assert set(run.num_leased()) == members
    run.contribute("ann", "bob")
    run.report("ann", "bob", "cid")
    assert set(run.num_leased()) == {"ann", "bob", "cid"}


def test_credits_are_in_canonical_order_and_weights_capped_when_a_round_closes() -> None:
    run = CoreRun(round={"inner_steps": 10, "min_peers": 3}, aggregation={"max_weight_fraction": 0.4})
    run.join("ann", "bob", "cid")
    for name, speed in {"ann": 1.0, "bob": 1.0, "cid": 8.0}.items():
        run.report(name, claimed_steps_per_s=speed)
    for name, norm in {"ann": 1.0, "bob": 1.0, "cid": 100.0}.items():
        run.check(name, run.commit(name).payload_hash, norm=norm)
    closed = run.closed[0]
    assert [credit.payload_hash for credit in closed.credits] == sorted(
        credit.payload_hash for credit in closed.credits
    )
    cid = next(credit for credit in closed.credits if credit.peer == "cid")
    assert cid.weight / closed.divisor == pytest.approx(0.4)
    assert cid.clip == pytest.approx(0.02)  # twice the median norm of 1, of 100
    assert cid.tokens == 80 * SHARD_TOKENS, "credit is for work, whatever the weight"


def test_lease_is_closed_for_good_when_it_was_handed_back() -> None:
    run = start("ann", "bob")
    run.send(ev.LeaseReturned(peer="ann", lease_id=run.granted["ann"].lease_id, reason="battery"))
    assert run.lease("ann").status is LeaseStatus.CLOSED
    run.commit("ann")
    assert "closed already" in run.find(fx.JudgeContribution)[0].reason
