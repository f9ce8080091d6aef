"""How much work a peer gets: by its observed speed, never by what it says of itself; and which shards."""

import pytest

from coordinator.core import leases
from coordinator.core.state import Phase, ShardPool
from tests.core_run import SHARD_TOKENS, CoreRun, outstanding


def start(claims: dict[str, float], tokens: int = 1_000_000, **round_: object) -> CoreRun:
    """A run whose first round is open; each worker claimed a speed in steps a second."""
    run = CoreRun(
        round={"inner_steps": 10, "min_peers": len(claims), **round_}, train={"tokens": tokens, "batch_sequences": 1}
    )
    run.join(*claims)
    for name, speed in claims.items():
        run.report(name, claimed_steps_per_s=speed)
    return run


def test_leases_are_proportionate_when_one_peer_is_faster() -> None:
    run = start({"phone": 1.0, "laptop": 2.0, "server": 8.0})
    assert run.num_leased() == {"phone": 5, "laptop": 10, "server": 40}


def test_leases_follow_observed_speed_when_claims_were_all_the_same() -> None:
    speeds = {"phone": 0.5, "laptop": 1.0, "server": 4.0}
    run = start(dict.fromkeys(speeds, 1.0))
    assert set(run.num_leased().values()) == {10}
    for _ in range(4):
        run.play_round(speeds)
    leased = run.num_leased()
    assert leased["laptop"] == 10
    assert leased["phone"] == pytest.approx(5, abs=1)
    assert leased["server"] == pytest.approx(40, abs=2)


def test_lease_shrinks_within_three_rounds_when_the_claim_was_a_hundredfold_lie() -> None:
    speeds = dict.fromkeys(["ann", "bob", "cid", "liar"], 1.0)
    run = start({**speeds, "liar": 100.0})
    leased = []
    for _ in range(3):
        leased.append(run.num_leased()["liar"])
        run.play_round(speeds)
    assert leased[0] == 640  # the claim sized it, up to 64 times the median peer's
    assert run.num_leased()["liar"] <= 11
    seconds_worked = run.now_s
    assert run.peer("liar").credited_shards <= speeds["liar"] * seconds_worked, "more credit than it can have earned"
    assert len(run.closed) == 3, "the lie cost the others a round"


def test_speed_is_not_raised_when_a_header_boasts_of_its_inner_steps() -> None:
    run = start({"ann": 1.0, "liar": 1.0})
    run.now_s += 10.0
    liar = run.commit("liar", inner_steps=10**6)
    run.check("liar", liar.payload_hash)
    assert run.peer("liar").steps_per_s == pytest.approx(1.0)


@pytest.mark.parametrize("claim", [1e308, 1e6, 1e-300, 0.0, -1.0])
def test_others_keep_their_leases_when_a_newcomer_claims_nonsense(claim: float) -> None:
    run = start({"ann": 1.0, "bob": 1.0})
    run.join("liar")
    run.report("liar", claimed_steps_per_s=claim)
    run.play_round({"ann": 1.0, "bob": 1.0, "liar": 1.0})
    leased = run.num_leased()
    assert leased["ann"] == leased["bob"] == 10
    assert leased.get("liar", 0) <= 640


@pytest.mark.parametrize("claim", [0.0, 1e-300])
def test_round_is_bounded_when_the_only_peer_claims_to_be_endlessly_slow(claim: float) -> None:
    run = start({"snail": claim})
    assert run.state.round is not None
    assert run.state.round.deadline_s <= 2 * leases.MAX_EXPECTED_S + 10.0


@pytest.mark.parametrize("claim", [0.01, 0.0])
def test_slow_peer_is_tried_again_when_it_was_too_slow_for_one_shard(claim: float) -> None:
    run = start({"ann": 1.0, "bob": 1.0, "snail": claim})
    tried_in_round = None
    for index in range(30):
        if "snail" in run.num_leased():
            tried_in_round = index
            break
        run.play_round({"ann": 1.0, "bob": 1.0})
        run.report("snail", claimed_steps_per_s=claim)
    assert tried_in_round is not None
    assert tried_in_round > 0


def test_slow_peers_lease_is_halved_when_it_misses_the_deadline() -> None:
    run = start({"ann": 1.0, "bob": 1.0, "sloth": 1.0}, exchange_s=0.001)
    run.contribute("ann", "bob")
    run.wait_for_deadline()
    assert run.peer("sloth").steps_per_s == pytest.approx(0.25, rel=0.01)  # half of: 10 steps in the 20 s allowed


def test_run_finishes_exactly_when_the_last_round_is_cut_to_fit() -> None:
    run = start({"ann": 1.0, "bob": 1.0, "cid": 1.0}, tokens=37 * SHARD_TOKENS - 3)
    speeds = dict.fromkeys(["ann", "bob", "cid"], 1.0)
    run.play_round(speeds)
    assert sum(run.num_leased().values()) == 7
    run.play_round(speeds)
    assert run.state.phase is Phase.FINISHED
    assert run.state.tokens_credited == 37 * SHARD_TOKENS


def test_lease_is_bounded_when_a_peer_would_finish_more_shards_than_a_document_can_name() -> None:
    run = start({"server": 1000.0}, inner_steps=100_000)
    assert run.num_leased() == {"server": leases.MAX_UNITS}


def test_peer_carries_the_newest_units_when_it_never_commits() -> None:
    run = start({"mute": 1.0}, inner_steps=3_000)
    for _ in range(3):
        last = run.granted["mute"].units
        run.wait_for_deadline()
    assert len(run.peer("mute").carried) == leases.MAX_UNITS
    assert set(last) <= set(run.peer("mute").carried)
    everywhere = outstanding(run.state)
    assert len(set(everywhere)) == len(everywhere)


@pytest.mark.parametrize("num_shards", [1, 2, 7, 64, 1000])
def test_each_pass_covers_every_shard_once_when_units_are_taken_in_odd_portions(num_shards: int) -> None:
    pool = ShardPool(num_shards=num_shards, seed=3)
    units = [unit for _ in range(num_shards) for unit in leases.take_units(pool, 3)]
    for pass_index in range(3):
        assert sorted(index for pass_, index in units if pass_ == pass_index) == list(range(num_shards))


def test_passes_differ_in_order_when_the_data_is_seen_again() -> None:
    pool = ShardPool(num_shards=50, seed=0)
    passes = [[index for _, index in leases.take_units(pool, 50)] for _ in range(4)]
    assert len({tuple(order) for order in passes}) == 4


def test_returned_units_come_first_when_leases_are_cut() -> None:
    pool = ShardPool(num_shards=50, seed=0, returned=[(7, 1), (7, 2), (7, 3)])
    assert leases.take_units(pool, 2) == [(7, 1), (7, 2)]
    assert leases.take_units(pool, 2)[0] == (7, 3)
