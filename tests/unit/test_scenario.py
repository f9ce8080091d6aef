"""Scenarios: those that come with manyhands load; a mistake is one line that names the place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import ConfigError
from simulations.scenario import list_scenarios, load_scenario, parse_scenario
from simulations.world.population import draw_population, name_attackers

PEERS = {"name": "laptops", "count": 4, "device": "laptop"}


def parse(**changes: Any) -> Any:
    return parse_scenario({"name": "small", "population": [PEERS], **changes}, "small.toml")


@pytest.mark.parametrize("path", list_scenarios(), ids=lambda path: path.stem)
@pytest.mark.parametrize("short", [False, True])
def test_scenarios_that_come_with_manyhands_load(path: Path, short: bool) -> None:
    scenario = load_scenario(path.stem, short=short)
    assert scenario.name == path.stem
    assert scenario.description
    assert scenario.spec.name == path.stem


def test_all_nine_scenarios_are_there() -> None:
    assert {path.stem for path in list_scenarios()} == {
        "campus-gpus",
        "coordinator-outage",
        "flash-crowd",
        "internet-scale",
        "laptops",
        "mixed-home",
        "phones-at-night",
        "ten-percent-byzantine",
        "two-continents",
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hour": 3}, "unknown key `hour`; did you mean `hours`?"),
        ({"population": []}, "population: there are no peers"),
        ({"population": [{**PEERS, "count": 0}]}, "population[0].count: Input should be greater than or equal to 1"),
        ({"population": [{**PEERS, "cout": 3}]}, "unknown key `population[0].cout`; did you mean `count`?"),
        ({"population": [{**PEERS, "device": "toaster"}]}, "population[0].device: 'toaster' is none of phone, laptop"),
        ({"population": [{**PEERS, "link": ["fiber"]}]}, "population[0].link: ['fiber'] is none of"),
        ({"population": [{**PEERS, "speed_spread": -1.0}]}, "population[0].speed_spread: "),
        ({"population": [{**PEERS, "attack": "noise", "attack_fraction": 1.5}]}, "population[0].attack_fraction: "),
        (
            {"population": [{**PEERS, "measured": {"flop": 1.0}}]},
            "`population[0].measured.flop`; did you mean `flops`?",
        ),
        ({"population": [{**PEERS, "measured": {"up_bps": 0.0}}]}, "population[0].measured.up_bps: "),
        (
            {"population": [{**PEERS, "measured": {"sessions_hours": [[0.0], [1.0]]}}]},
            "sessions_hours: write [[from, to]",
        ),
        (
            {"population": [{**PEERS, "measured": {"sessions_hours": [[2.0, 1.0]]}}]},
            "sessions_hours: write [[from, to]",
        ),
        (
            {"fidelity": "plan", "population": [{**PEERS, "measured": {"sessions_hours": [[0.0]]}}]},
            "population[0].measured.sessions_hours: fidelity plan has no place for it",
        ),
        ({"population": [PEERS, PEERS]}, "population: the name `laptops` is there twice"),
        ({"model": {"parameters": 0}}, "model.parameters: "),
        ({"hours": -1}, "hours: "),
        ({"run": {"round": {"inner_step": 3}}}, "[run]: unknown key `round.inner_step`; did you mean `inner_steps`?"),
        ({"run": {"exchange": {"codec": "in2"}}}, "unknown codec `in2`; did you mean `int2`?"),
        (
            {"fault": [{"kind": "partition", "at_hours": 0, "minutes": 1, "region": "asia"}]},
            "fault[0].region: no peers in `asia`",
        ),
        (
            {"fault": [{"kind": "partition", "at_hours": 0, "minutes": 1, "population": "laptop"}]},
            "fault[0].population: there is no `laptop`; did you mean `laptops`?",
        ),
        ({"fault": [{"kind": "coordinator_outage", "at_hours": 0, "minutes": 0}]}, "fault[0].minutes: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    message = str(caught.value)
    assert message.startswith("small.toml: ")
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("laptop", [], "there is no scenario `laptop`; did you mean `laptops`?"),
        ("nowhere.toml", [], "nowhere.toml: "),
        ("laptops", ["hours"], "write key=value"),
        ("laptops", ["name.first=3"], "`name` is a value, not a table"),
        ("laptops", ["population.phones.count=3"], "there is no entry `phones`"),
        ("laptops", ["population.0=3"], "name the entry and a key of it"),
        ("laptops", ["huors=3"], "unknown key `huors`; did you mean `hours`?"),
    ],
)
def test_a_bad_override_is_one_line(name: str, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_scenario(name, overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_tables_and_entries() -> None:
    overrides = ["hours=2", "run.exchange.codec=sign", "population.laptops.count=7", "population.0.device=desktop"]
    scenario = load_scenario("laptops", overrides)
    assert scenario.hours == 2.0
    assert scenario.spec.exchange.codec == "sign"
    assert (scenario.population[0].count, scenario.population[0].device) == (7, "desktop")


def test_scale_multiplies_the_counts() -> None:
    assert load_scenario("laptops", ["scale=0.1"]).num_peers == 20


def test_a_population_is_drawn_from_its_seed_alone() -> None:
    one = parse(population=[PEERS])
    two = parse(population=[PEERS, {**PEERS, "name": "more", "device": "phone"}])
    again = draw_population(one.population, "europe", 0)
    both = draw_population(two.population, "europe", 0)
    assert np.array_equal(again.flops, both.flops[:4])
    assert not np.array_equal(again.flops, draw_population(one.population, "europe", 1).flops)


def test_what_was_measured_replaces_what_is_drawn() -> None:
    measured = {"flops": 1e9, "jitter": 0.0, "up_bps": 2e6, "latency_s": 0.05, "dialable": 1.0}
    drawn = parse(population=[PEERS, {**PEERS, "name": "known", "measured": measured}])
    population = draw_population(drawn.population, "europe", 0)
    assert population.flops[4:].tolist() == [1e9] * 4
    assert population.up_bps[4:].tolist() == [2e6] * 4
    assert population.latency_s[4:].tolist() == [0.05] * 4
    assert population.dialable[4:].all()
    assert len(set(population.down_bps[4:].tolist())) == 4
    assert len(set(population.flops[:4].tolist())) == 4


def test_the_named_attackers_are_those_of_the_population() -> None:
    scenario = parse(population=[PEERS, {**PEERS, "name": "bad", "attack": "noise", "attack_fraction": 0.5}])
    assert name_attackers(scenario.population) == {"peer-4": "noise", "peer-5": "noise"}
    attackers = draw_population(scenario.population, "europe", 0).attackers
    assert np.flatnonzero(attackers).tolist() == [4, 5]
