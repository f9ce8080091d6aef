"""Fidelity `plan` beside fidelity `time`, and its parts beside what they stand for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations.plan import plan_run
from simulations.planned.crowd import advance, describe_habits, draw_crowd
from simulations.planned.exchange import fetch_all
from simulations.planned.leasing import train
from simulations.planned.site import describe_site
from simulations.results import Results, collect
from simulations.scenario import Scenario, parse_scenario
from simulations.time_learner import TimeLearner
from simulations.virtual_run import VirtualRun
from simulations.world.availability import AVAILABILITY, draw_gap_s, draw_session_s, share_online

HOME: dict[str, Any] = {
    "name": "laptops",
    "count": 150,
    "device": "laptop",
    "link": "fixed",
    "availability": "always",
}


def make_scenario(populations: list[dict[str, Any]], hours: float = 6.0, **exchange: Any) -> Scenario:
    return parse_scenario(
        {
            "name": "test",
            "hours": hours,
            "seed": 3,
            "model": {"parameters": 10_000_000},
            "run": {
                "train": {"tokens": 10**12},
                "data": {"sequence_length": 256, "shard_steps": 1},
                "round": {"inner_steps": 50, "min_peers": 8, "exchange_s": 60.0, "merge_timeout_s": 120.0},
                "exchange": {"max_contributors": 16, "codec": "sparse", **exchange},
            },
            "population": populations,
        },
        where="test",
    )


def run_in_time(scenario: Scenario, folder: Path) -> Results:
    run = VirtualRun(scenario, TimeLearner(scenario.model.parameters), scenario.num_shards, folder)
    run.run()
    run.finish()
    return collect(run, 0.0)


SETTINGS: dict[str, Any] = {
    "turns": make_scenario([HOME]),
    "more bytes": make_scenario([{**HOME, "link": "fiber"}], codec="int2"),
    "overlap": make_scenario([HOME], overlap=True),
    "seeds": make_scenario(
        [
            {**HOME, "count": 140},
            {**HOME, "name": "seeds", "count": 10, "link": "datacenter", "seed": True},
        ]
    ),
    "groups": make_scenario([{**HOME, "link": "fiber"}], codec="int2", group_size=4),
    "slow links": make_scenario([{**HOME, "count": 20, "measured": {"up_bps": 50e3}}], hours=8.0, codec="int2"),
    "all-reduce": make_scenario([{**HOME, "count": 12, "link": "campus"}], method="butterfly", codec="float16"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_plan_agrees_with_time(setting: str, tmp_path: Path) -> None:
    scenario = SETTINGS[setting]
    timed, planned = run_in_time(scenario, tmp_path).summary, plan_run(scenario).summary
    assert set(planned) == set(timed)
    for figure in ("round_s", "rounds", "tokens", "payload_bytes", "coordinator_received_bytes"):
        assert planned[figure] == pytest.approx(timed[figure], rel=0.05), figure


def test_plan_agrees_with_time_on_average_when_peers_come_and_go(tmp_path: Path) -> None:
    """Who is online, and for how long, is drawn by each fidelity for itself: single runs differ by more."""
    scenario = make_scenario([{**HOME, "count": 600, "availability": "volunteer"}], hours=4.0)
    seeds = [scenario.model_copy(update={"seed": seed}) for seed in (3, 4, 5, 6)]
    timed = [run_in_time(one, tmp_path / str(one.seed)).summary for one in seeds]
    planned = [plan_run(one).summary for one in seeds]
    for figure in ("round_s", "tokens", "payload_bytes", "peers_online"):
        means = [np.mean([summary[figure] for summary in summaries]) for summaries in (planned, timed)]
        assert means[0] == pytest.approx(means[1], rel=0.05), figure


def test_same_seed_gives_the_same_plan() -> None:
    scenario = make_scenario([{**HOME, "availability": "evenings"}], hours=2.0)
    assert plan_run(scenario).rounds == plan_run(scenario).rounds


def test_blocks_of_rounds_come_to_what_single_rounds_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = make_scenario([{**HOME, "count": 4000, "availability": "volunteer"}], codec="sparse")
    single = plan_run(scenario).summary
    monkeypatch.setattr("simulations.plan.BLOCKS_S", ((10**9, 900.0),))
    blocks = plan_run(scenario).summary
    for figure in ("round_s", "rounds", "tokens", "trained_tokens", "peers_online", "utilisation"):
        assert blocks[figure] == pytest.approx(single[figure], rel=0.05), figure


def test_sessions_are_those_that_one_peer_after_the_other_draws() -> None:
    scenario = make_scenario([{**HOME, "count": 20_000, "availability": "evenings"}])
    habits, rng = describe_habits(scenario), np.random.default_rng(0)
    crowd, kind = draw_crowd(scenario, habits, rng), AVAILABILITY["evenings"]
    moments_s = 3600.0 * np.array([2.0, 8.0, 14.0, 24.0])
    singly = np.zeros(len(moments_s))
    for _ in range(2000):
        at_s, hour = 0.0, float(habits.hour_at_start[0])
        if rng.random() >= float(share_online(kind, hour)):
            at_s += draw_gap_s(kind, hour, rng)
        while at_s < moments_s[-1]:
            length_s = draw_session_s(kind, rng)
            singly += (at_s <= moments_s) & (moments_s < at_s + length_s)
            at_s += length_s
            at_s += draw_gap_s(kind, (hour + at_s / 3600.0) % 24.0, rng)
    for moment_s, share in zip(moments_s.tolist(), singly / 2000, strict=True):
        advance(crowd, habits, moment_s, rng)
        assert crowd.online.mean() == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("num_seeds", [0, 5])
def test_flooding_a_crowd_takes_what_the_exact_broadcast_takes(num_seeds: int) -> None:
    populations = [{**HOME, "count": 3000}]
    if num_seeds:
        populations.append({**HOME, "name": "seeds", "count": num_seeds, "link": "datacenter", "seed": True})
    scenario = make_scenario(populations)
    site, rng = describe_site(scenario), np.random.default_rng(0)
    results = []
    for exact_pairs in (10**9, 0):
        crowd = draw_crowd(scenario, describe_habits(scenario), np.random.default_rng(1))
        everybody = np.arange(crowd.count)
        fetched = [
            fetch_all(
                site,
                crowd,
                makers=everybody[:16],
                size=3e5,
                receivers=everybody,
                starts_s=np.full(crowd.count, 10.0),
                closed_s=10.0,
                exact_pairs=exact_pairs,
                rng=rng,
            )
            for _ in range(20)
        ]
        results.append(
            (
                np.mean([np.median(one.done_s) for one in fetched]) - 10.0,
                np.mean([one.coordinator_bytes for one in fetched]),
                np.mean([one.received_bytes.mean() for one in fetched]),
                crowd.sent_bytes.sum(),
            )
        )
    assert results[1] == pytest.approx(results[0], rel=0.1)


def test_leases_end_together_and_the_last_round_takes_what_is_left() -> None:
    scenario = make_scenario([HOME])
    site, rng = describe_site(scenario), np.random.default_rng(0)
    crowd = draw_crowd(scenario, describe_habits(scenario), rng)
    everybody = np.arange(crowd.count)
    training = train(site, crowd, everybody, 50, 1e12, rng)
    assert np.median(training.finish_s) == pytest.approx(training.expected_s, rel=0.1)
    left = 37 * scenario.spec.shard_tokens
    assert train(site, crowd, everybody, 50, left, rng).units.sum() == 37


def test_a_partition_keeps_its_peers_out_and_they_come_back() -> None:
    here, there = {**HOME, "count": 50}, {**HOME, "name": "there", "count": 50, "region": "asia"}
    fault = {"kind": "partition", "at_hours": 1.0, "minutes": 60.0, "region": "asia"}
    scenario = make_scenario([here, there], hours=3.0).model_dump()
    scenario["fault"] = [fault]
    rounds = plan_run(parse_scenario(scenario, where="test")).rounds
    cut = [row["leased_peers"] for row in rounds if 3800 < row["opened_s"] < 7000]
    after = [row["leased_peers"] for row in rounds if row["opened_s"] > 8000]
    assert max(cut) == 50
    assert min(after) > 90


def test_auto_follows_what_was_measured() -> None:
    rows = plan_run(make_scenario([HOME], codec="auto", share=0.1)).rounds
    assert rows[0]["plan"].endswith("no link was measured yet")
    assert rows[-1]["codec"] == "sparse"
