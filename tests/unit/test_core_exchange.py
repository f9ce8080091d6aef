"""What a round exchanges, whose turn it is, and what is trained ahead: decided by the core when the round opens."""

import pytest

from coordinator.core import effects as fx
from coordinator.core import events as ev
from tests.core_run import SHARD_TOKENS, CoreRun, digest_after, outstanding

WORKERS = ("ann", "bob", "cid", "dot", "eve")


def start(*names: str, **sections: dict[str, object]) -> CoreRun:
    run = CoreRun(num_shards=10_000, **sections)
    run.start(*names)
    return run


def contributors(run: CoreRun) -> set[str]:
    return {name for name in run.num_leased() if run.granted[name].contribute}


def test_everybodys_turn_comes_when_there_are_more_workers_than_places() -> None:
    run = start(*WORKERS, exchange={"max_contributors": 2})
    turns = []
    for _ in range(5):
        turns.append(contributors(run))
        run.contribute(*turns[-1])
        run.report(*WORKERS)
    assert all(len(chosen) == 2 for chosen in turns)
    for first in range(3):
        assert set().union(*turns[first : first + 3]) == set(WORKERS)
    assert len(run.closed) == 5, "a round waited for somebody whose turn it was not"


def test_work_of_the_rounds_between_is_credited_when_a_peers_turn_comes() -> None:
    run = start("ann", "bob", exchange={"max_contributors": 1})
    (first,) = contributors(run)
    (second,) = {"ann", "bob"} - {first}
    waiting = run.granted[second].units
    run.contribute(first)
    run.report("ann", "bob")
    assert contributors(run) == {second}
    run.contribute(second, units=(*run.granted[second].units, *waiting))
    assert run.peer(second).credited_tokens == 20 * SHARD_TOKENS


def test_contribution_is_refused_when_it_is_not_the_peers_turn() -> None:
    run = start("ann", "bob", exchange={"max_contributors": 1})
    (other,) = {"ann", "bob"} - contributors(run)
    run.commit(other)
    (verdict,) = run.find(fx.JudgeContribution)
    assert not verdict.accepted
    assert "turn" in verdict.reason


def test_what_a_peer_trained_aside_is_leased_again_when_it_is_gone() -> None:
    run = start("ann", "bob", exchange={"max_contributors": 1})
    (first,) = contributors(run)
    (other,) = {"ann", "bob"} - {first}
    units = run.granted[other].units
    run.send(ev.PeerLeft(peer=other, reason="gone"))
    run.contribute(first)
    run.report(first)
    assert run.granted[first].units == units


def test_shards_trained_ahead_count_with_the_next_contribution_when_overlap_is_on() -> None:
    run = start("ann", "bob", exchange={"overlap": True})
    ahead = {name: run.granted[name].ahead for name in ("ann", "bob")}
    assert len(ahead["ann"]) == 20
    run.contribute("ann", "bob")
    run.report("ann", "bob")
    run.contribute("ann", units=(*run.granted["ann"].units, *ahead["ann"][:3]))
    assert run.peer("ann").carried == [], "what was not trained ahead stays with nobody"
    run.contribute("bob")
    assert run.peer("ann").credited_shards == 10 + 13
    assert run.peer("bob").credited_shards == 10 + 10
    everywhere = outstanding(run.state)
    assert len(set(everywhere)) == len(everywhere)


def test_shards_ahead_earn_nothing_when_they_are_named_before_the_round_is_closed() -> None:
    run = start("ann", exchange={"overlap": True})
    lease = run.granted["ann"]
    run.contribute("ann", units=(*lease.units, *lease.ahead))
    assert run.peer("ann").credited_shards == 10


def test_nothing_is_trained_ahead_when_the_round_is_the_last_one_or_overlap_is_off() -> None:
    last = start("ann", exchange={"overlap": True}, train={"tokens": 10 * SHARD_TOKENS, "batch_sequences": 1})
    assert last.granted["ann"].ahead == ()
    assert start("ann").granted["ann"].ahead == ()


def test_codec_and_steps_follow_the_measured_links_when_auto_is_asked_for() -> None:
    run = start("ann", "bob", exchange={"codec": "auto"}, round={"inner_steps": "auto"})
    assert run.granted["ann"].codec == "int2", "the middle of the road, before any link was measured"
    plans = []
    for upload_bps in (1e5, 1e5, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9):
        for name in ("ann", "bob"):
            committed = run.commit(name)
            run.now_s += 5.0
            run.send(ev.PayloadChecked(peer=name, payload_hash=committed.payload_hash, norm=1.0, upload_bps=upload_bps))
        run.report("ann", "bob")
        assert run.state.round is not None
        plans.append(run.state.round.plan)
        announced = run.find(fx.AnnouncePlan)
        assert all(effect.reason == plans[-1].reason and "Mbit/s" in effect.reason for effect in announced)
    assert len(dict(run.granted["ann"].codec_options)) <= 2
    slow, fast = plans[1], plans[-1]
    assert (slow.codec, slow.inner_steps) != (fast.codec, fast.inner_steps)
    assert slow.inner_steps >= fast.inner_steps
    assert run.closed[-1].inner_steps == plans[-2].inner_steps


def test_leases_and_manifest_name_the_learning_rate_when_the_run_leaves_it_to_auto() -> None:
    run = start("ann", "bob", train={"learning_rate": "auto"})
    assert run.state.round is not None
    rate = run.granted["ann"].learning_rate
    assert rate is not None
    assert rate == run.granted["bob"].learning_rate == run.state.round.plan.learning_rate
    assert f"learning rate {rate:.2g}, 2 workers" in run.state.round.plan.reason
    for name in ("ann", "bob"):
        committed = run.commit(name)
        run.send(ev.PayloadChecked(peer=name, payload_hash=committed.payload_hash, norm=1.0))
    assert run.closed[-1].learning_rate == rate
    assert start("ann").granted["ann"].learning_rate is None, "run.toml says it"


def test_all_leases_of_a_run_name_the_optimizer_that_its_first_workers_measured() -> None:
    run = start(train={"optimizer": "auto", "learning_rate": "auto"}, round={"min_peers": 2})
    run.join("ann", "bob")
    for name, share in (("ann", 0.9), ("bob", 0.8)):
        run.report(name, optimizer_share=share)
    assert run.state.round is not None
    plan = run.state.round.plan
    assert {run.granted[name].optimizer for name in ("ann", "bob")} == {"adamw"}
    assert "adamw (muon: 85% of a step), rate" in plan.reason
    alike = start("ann", "bob", train={"optimizer": "adamw", "learning_rate": "auto"})
    assert alike.state.round is not None
    assert plan.learning_rate == alike.state.round.plan.learning_rate
    assert alike.granted["ann"].optimizer is None, "run.toml says it"
    run.contribute("ann", "bob")
    run.report("ann", "bob", optimizer_share=0.1)
    assert run.granted["ann"].round == 1
    assert run.granted["ann"].optimizer == "adamw", "a run keeps what it has begun with"


@pytest.mark.parametrize("share", [-1.0, 0.0, 1.5, 1e300])
def test_a_share_that_cannot_be_is_not_taken(share: float) -> None:
    run = start(train={"optimizer": "auto", "learning_rate": "auto"})
    run.join("ann")
    run.report("ann", optimizer_share=share)
    assert run.granted["ann"].optimizer == "muon"


@pytest.mark.parametrize("download_bps", [0.0, -5.0, 1e300])
def test_claimed_download_speed_changes_nothing_but_the_plan_when_it_is_nonsense(download_bps: float) -> None:
    run = start("ann", "bob", exchange={"codec": "auto"})
    run.contribute("ann", "bob")
    for name in ("ann", "bob"):
        run.send(ev.StateReported(peer=name, round=1, digest=digest_after(1), download_bps=download_bps))
    assert run.state.round is not None
