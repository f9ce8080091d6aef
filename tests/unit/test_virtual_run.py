"""A run under the virtual clock: the core's rules hold, nothing is lost or made up, the same seed gives the same."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import dump_state
from protocol.errors import ConfigError
from simulations.scenario import Scenario, load_scenario, parse_scenario
from simulations.simulate import make_learner, simulate
from simulations.virtual_run import JOURNAL, VirtualRun
from tests.core_run import outstanding


def scenario_of(*populations: dict[str, Any], hours: float = 0.2, **changes: Any) -> Scenario:
    table: dict[str, Any] = {
        "name": "small",
        "hours": hours,
        "model": {"parameters": 1_000_000},
        "run": {
            "train": {"tokens": 10**10},
            "data": {"sequence_length": 256, "shard_steps": 5},
            "round": {"inner_steps": 50, "exchange_s": 10.0},
            **changes.pop("run", {}),
        },
        "population": list(populations) or [{"name": "desktops", "count": 4, "device": "desktop", "link": "campus"}],
        **changes,
    }
    return parse_scenario(table, "small.toml")


def start(scenario: Scenario, folder: Path) -> VirtualRun:
    learner, num_shards = make_learner(scenario)
    return VirtualRun(scenario, learner, num_shards, folder)


def finish(scenario: Scenario, folder: Path) -> VirtualRun:
    run = start(scenario, folder)
    run.run()
    run.finish()
    return run


def read_journal(folder: Path) -> list[tuple[float, ev.Event]]:
    rows = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    return [(row["now_s"], ev.load_event(json.dumps(row["event"]).encode())) for row in rows]


def test_run_goes_on_when_links_are_too_slow_for_the_first_rounds(tmp_path: Path) -> None:
    """A payload takes half a minute, rounds begin with ten seconds for it: nothing is known before one has come."""
    slow = {"up_bps": 70e3, "down_bps": 10e6}
    desktops = {"name": "desktops", "count": 2, "device": "desktop", "link": "campus", "measured": slow}
    rounds = {"round": {"inner_steps": "auto", "exchange_s": 10.0}, "exchange": {"codec": "auto"}}
    run = finish(scenario_of(desktops, hours=1.0, run=rounds), tmp_path)
    assert len(run.recorder.rounds) > 10
    assert run.coordinator.state.late_rounds < 5


def test_two_peers_train_round_after_round(tmp_path: Path) -> None:
    scenario = scenario_of({"name": "desktops", "count": 2, "device": "desktop", "link": "campus"})
    run = finish(scenario, tmp_path)
    rounds = run.recorder.rounds
    assert len(rounds) > 10
    assert [row["round"] for row in rounds] == list(range(len(rounds)))
    assert all(row["contributions"] == 2 for row in rounds[1:])
    assert all(row["opened_s"] < row["trained_s"] <= row["closed_s"] for row in rounds)
    assert all(before["merged_s"] == after["opened_s"] for before, after in pairwise(rounds))


def test_the_trace_is_a_journal_that_the_core_replays(tmp_path: Path) -> None:
    scenario = scenario_of(fault=[{"kind": "coordinator_outage", "at_hours": 0.05, "minutes": 1.0}])
    run = finish(scenario, tmp_path)
    learner, num_shards = make_learner(scenario)
    state = machine.create(
        scenario.spec,
        num_shards=num_shards,
        num_parameters=learner.num_parameters,
        initial_digest=learner.digest,
    )
    for now_s, event in read_journal(tmp_path):
        machine.handle(state, event, now_s)
    assert dump_state(state) == dump_state(run.coordinator.state)


def test_what_is_credited_was_trained_and_every_shard_is_in_one_place(tmp_path: Path) -> None:
    scenario = load_scenario("mixed-home", ["hours=0.5"])
    run = finish(scenario, tmp_path)
    state, spec = run.coordinator.state, scenario.spec
    credited = sum(peer.credited_tokens for peer in state.peers.values())
    trained = sum(peer.trained_units for peer in run.world.peers) * spec.shard_tokens
    assert 0 < credited == state.tokens_credited == sum(row["tokens"] for row in run.recorder.rounds)
    assert credited <= trained
    held = outstanding(state)
    assert len(set(held)) == len(held)
    taken = state.pool.pass_index * state.pool.num_shards + state.pool.cursor
    assert taken == len(held) + credited // spec.shard_tokens


def test_bytes_sent_are_bytes_received(tmp_path: Path) -> None:
    run = finish(scenario_of(), tmp_path)
    peers, recorder = run.world.peers, run.recorder
    pushed = recorder.coordinator_received_bytes
    shards = sum(row["tokens"] for row in recorder.rounds) * 1.1
    sent = sum(peer.sent_bytes for peer in peers) + recorder.coordinator_sent_bytes
    received = sum(peer.received_bytes for peer in peers) + pushed
    assert sent - received == pytest.approx(shards, rel=0.2)  # leases are counted where they are served, and when
    assert pushed == pytest.approx(sum(row["payload_bytes"] for row in recorder.rounds), rel=0.1)


def test_leases_go_on_after_an_outage(tmp_path: Path) -> None:
    fault = {"kind": "coordinator_outage", "at_hours": 0.05, "minutes": 3.0}
    rounds = {"round": {"inner_steps": 50, "exchange_s": 60.0}}  # peers dial again after half a minute at the latest
    run = finish(scenario_of(fault=[fault], run=rounds), tmp_path)
    down, back = 0.05 * 3600.0, 0.05 * 3600.0 + 180.0
    assert not [row for row in run.recorder.rounds if down < row["closed_s"] < back]
    across = [row for row in run.recorder.rounds if row["opened_s"] < down and row["closed_s"] > back]
    assert across
    assert across[0]["contributions"] == 4
    assert any(row["opened_s"] > back for row in run.recorder.rounds)


def test_a_partition_leaves_the_others_working(tmp_path: Path) -> None:
    here = {"name": "here", "count": 3, "device": "desktop", "link": "campus"}
    there = {**here, "name": "there", "region": "america"}
    fault = {"kind": "partition", "region": "america", "at_hours": 0.05, "minutes": 6.0}
    run = finish(scenario_of(here, there, fault=[fault]), tmp_path)
    cut = [row for row in run.recorder.rounds if row["opened_s"] > 0.06 * 3600 and row["closed_s"] < 0.14 * 3600]
    assert cut
    assert {row["leased_peers"] for row in cut} == {3}
    assert run.recorder.rounds[-1]["leased_peers"] == 6


def test_peers_without_the_memory_never_join(tmp_path: Path) -> None:
    small = {"name": "phones", "count": 3, "device": "phone", "link": "campus"}
    large = {"name": "servers", "count": 2, "device": "server-gpu", "link": "campus"}
    run = finish(scenario_of(small, large, model={"parameters": 1_000_000_000}), tmp_path)
    assert run.recorder.too_small == 3
    assert len([peer for peer in run.coordinator.state.peers.values() if peer.role == "worker"]) == 2


def test_copies_earn_nothing_and_scaled_payloads_are_clipped(tmp_path: Path) -> None:
    honest = {"name": "honest", "count": 6, "device": "desktop", "link": "campus", "speed_spread": 0.05}
    copier = {**honest, "name": "copier", "count": 1, "attack": "copies", "throttle": 0.8}
    scaler = {**honest, "name": "scaler", "count": 1, "attack": "scaled"}
    run = finish(scenario_of(honest, copier, scaler), tmp_path)
    assert run.recorder.copies_refused > 0
    assert all(row["clipped"] == 1 for row in run.recorder.rounds if row["contributions"] >= 6)


@pytest.mark.parametrize("method", [{"group_size": 4}, {"method": "butterfly", "group_size": 4}])
def test_rounds_are_merged_in_groups(tmp_path: Path, method: dict[str, Any]) -> None:
    peers = {"name": "desktops", "count": 8, "device": "desktop", "link": "campus"}
    run = finish(scenario_of(peers, run={"exchange": method}), tmp_path)
    full = [row for row in run.recorder.rounds if row["contributions"] == 8]
    assert full
    assert all(row["groups"] == 2 for row in full)


def test_with_overlap_more_is_trained(tmp_path: Path) -> None:
    peers = {"name": "desktops", "count": 6, "device": "desktop", "link": "dsl"}
    without = finish(scenario_of(peers), tmp_path / "without")
    with_it = finish(scenario_of(peers, run={"exchange": {"overlap": True}}), tmp_path / "with")
    assert with_it.coordinator.state.tokens_credited > without.coordinator.state.tokens_credited


def test_a_resumed_run_has_the_same_trace(tmp_path: Path) -> None:
    scenario = load_scenario("phones-at-night", ["hours=1", "population.phones.count=80", "run.round.min_peers=5"])
    whole = finish(scenario, tmp_path / "whole")
    first = start(scenario, tmp_path / "broken")
    first.run(until_s=1500.0)
    first.save()
    first.run(until_s=2500.0)  # what was written after the snapshot does not count
    first.coordinator.journal.close()
    resumed = VirtualRun.resume(scenario, tmp_path / "broken")
    resumed.run()
    resumed.finish()
    assert (tmp_path / "broken" / JOURNAL).read_bytes() == (tmp_path / "whole" / JOURNAL).read_bytes()
    assert resumed.recorder.rounds == whole.recorder.rounds
    assert resumed.recorder.samples == whole.recorder.samples


def test_resuming_needs_a_snapshot_of_the_same_scenario(tmp_path: Path) -> None:
    scenario = scenario_of()
    with pytest.raises(ConfigError, match="no snapshot to resume from"):
        simulate(scenario, tmp_path, resume=True)
    run = start(scenario, tmp_path)
    run.run(until_s=100.0)
    run.save()
    run.coordinator.journal.close()
    with pytest.raises(ConfigError, match="another scenario"):
        simulate(scenario_of(seed=9), tmp_path, resume=True)
    simulate(scenario, tmp_path, resume=True)
    with pytest.raises(ConfigError, match="no snapshot to resume from"):
        simulate(scenario, tmp_path, resume=True)


def test_everything_is_written(tmp_path: Path) -> None:
    results = simulate(scenario_of(), tmp_path, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.parquet",
        "peers.parquet",
        "timeline.parquet",
        "summary.json",
        "report.html",
        JOURNAL,
    }
    html = (tmp_path / "report.html").read_text()
    assert "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert results.summary["rounds"] == len(results.rounds)
