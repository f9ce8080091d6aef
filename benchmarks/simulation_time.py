"""Fidelity `time`: how long one virtual hour of 5,000 peers takes on one core.

    python -m benchmarks.simulation_time [--quick] [--json FILE]

The scenario is `internet-scale` with everybody online for the whole hour, which is the most that it can be; beside it
the scenario as it comes. Everything that the command does is in it: world, run, trace, files and report. Medians over
the repetitions; --quick takes one.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.figures import Figure, parse_options, write_figures
from simulations.results import Results
from simulations.scenario import Scenario, load_scenario
from simulations.simulate import simulate

SCENARIO = "internet-scale"
REPETITIONS = 3


def measure(scenario: Scenario, repetitions: int) -> tuple[list[float], Results]:
    """Seconds of each repetition, and what the last one came to."""
    seconds = []
    for _ in range(repetitions):
        with TemporaryDirectory() as folder:
            started_s = time.perf_counter()
            results = simulate(scenario, Path(folder), resume=False)
            seconds.append(time.perf_counter() - started_s)
    return seconds, results


def main() -> None:
    options = parse_options("Seconds for 5,000 virtual peers, one virtual hour, fidelity `time`.")
    scenario = load_scenario(SCENARIO, ["fidelity=time", "hours=1"])
    if scenario.num_peers != 5000:
        raise SystemExit(f"{SCENARIO} has {scenario.num_peers} peers; 5,000 are meant")
    always = [f"population.{population.name}.availability=always" for population in scenario.population]
    online = load_scenario(SCENARIO, ["fidelity=time", "hours=1", *always])
    figures: dict[str, Figure] = {}
    for key, what, one in (
        ("time_5000", "all online", online),
        ("time_5000_as_it_comes", "coming and going", scenario),
    ):
        seconds, results = measure(one, 1 if options.quick else REPETITIONS)
        figures[f"{key}_s"] = statistics.median(seconds)
        figures[f"{key}_events"] = results.summary["events"]
        print(
            f"5,000 peers, {what}, one virtual hour: {statistics.median(seconds):.1f} s "
            f"({', '.join(f'{second:.1f}' for second in seconds)}); {results.summary['events']:,} events of the core, "
            f"{results.summary['rounds']} rounds, {results.summary['peers_online']:,.0f} peers online"
        )
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
