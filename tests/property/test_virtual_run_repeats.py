"""The same scenario and seed give the same trace, whatever the hash seed, and after --resume at any moment."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.scenario import Scenario, load_scenario, parse_scenario
from simulations.simulate import make_learner
from simulations.virtual_run import JOURNAL, VirtualRun

SCENARIO = ("mixed-home", "--set", "hours=0.3", "--set", "run.round.min_peers=5")

populations = st.fixed_dictionaries(
    {
        "count": st.integers(1, 12),
        "device": st.sampled_from(["phone", "laptop", "gaming-gpu"]),
        "link": st.sampled_from(["mobile", "dsl", "campus"]),
        "availability": st.sampled_from(["always", "volunteer", "charging-at-night"]),
        "region": st.sampled_from(["europe", "america"]),
        "seed": st.booleans(),
    }
)
faults = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["coordinator_outage", "partition", "slow_links"]),
        "at_hours": st.floats(0.0, 0.3),
        "minutes": st.floats(0.1, 10.0),
    }
)
exchanges = st.sampled_from([{}, {"overlap": True}, {"group_size": 3}, {"codec": "auto"}, {"max_contributors": 2}])


def trace_of(run: VirtualRun) -> str:
    return hashlib.sha256((run.folder / JOURNAL).read_bytes()).hexdigest()


def make(scenario: Scenario, folder: Path) -> VirtualRun:
    learner, num_shards = make_learner(scenario)
    return VirtualRun(scenario, learner, num_shards, folder)


@settings(max_examples=25)
@given(
    drawn=st.lists(populations, min_size=1, max_size=3),
    fault=st.lists(faults, max_size=1),
    exchange=exchanges,
    seed=st.integers(0, 1000),
    broken_at=st.floats(0.0, 1.0),
)
def test_a_run_repeats_itself_also_when_it_is_resumed(
    drawn: list[dict[str, object]],
    fault: list[dict[str, object]],
    exchange: dict[str, object],
    seed: int,
    broken_at: float,
) -> None:
    table = {
        "name": "drawn",
        "hours": 0.4,
        "seed": seed,
        "model": {"parameters": 2_000_000},
        "run": {"round": {"exchange_s": 15.0}, "data": {"shard_steps": 4}, "exchange": exchange},
        "population": [{**population, "name": f"p{index}"} for index, population in enumerate(drawn)],
        "fault": fault,
    }
    scenario = parse_scenario(table, "drawn.toml")
    with TemporaryDirectory() as folder:
        once = make(scenario, Path(folder) / "once")
        once.run()
        once.finish()
        broken = make(scenario, Path(folder) / "broken")
        broken.run(until_s=broken_at * 0.4 * 3600.0)
        broken.save()
        broken.coordinator.journal.close()
        resumed = VirtualRun.resume(scenario, Path(folder) / "broken")
        resumed.run()
        resumed.finish()
        assert trace_of(resumed) == trace_of(once)
        assert resumed.recorder.rounds == once.recorder.rounds


def test_the_trace_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    traces = set()
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        command = [sys.executable, "-m", "manyhands", "simulate", *SCENARIO, "--out", str(folder), "--json"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(command, check=True, env=environment, capture_output=True, cwd=Path(__file__).parents[2])
        traces.add(hashlib.sha256((folder / JOURNAL).read_bytes()).hexdigest())
    assert len(traces) == 1
    assert load_scenario("mixed-home").seed == 4
