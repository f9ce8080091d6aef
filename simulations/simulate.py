"""Running a scenario from the command line's point of view: the learner that it asks for, progress, files, report."""

import time
from collections.abc import Callable
from pathlib import Path

from simulations.learner import Learner
from simulations.report import write_report
from simulations.results import SUMMARY, Results, collect, write_results
from simulations.scenario import Scenario
from simulations.time_learner import TimeLearner
from simulations.virtual_run import VirtualRun
from simulations.world.population import name_attackers

SNAPSHOT_EVERY_S = 30.0  # of real time, and at most a tenth of it goes into snapshots
OnProgress = Callable[[float, int], None]


def make_learner(scenario: Scenario) -> tuple[Learner, int]:
    """What the scenario's fidelity trains with, and how many shards there are."""
    if scenario.fidelity == "time":
        return TimeLearner(scenario.model.parameters, name_attackers(scenario.population)), scenario.num_shards
    from simulations.learning import make_learner as make_tensor_learner

    return make_tensor_learner(scenario)


def simulate(scenario: Scenario, folder: Path, *, resume: bool, on_progress: OnProgress | None = None) -> Results:
    """Run a scenario to its end and write its folder. Raises ConfigError as `VirtualRun.resume`."""
    if scenario.fidelity == "plan":
        from simulations.plan import plan

        return plan(scenario, folder, on_progress)
    started_s = time.monotonic()
    run = VirtualRun.resume(scenario, folder) if resume else _start(scenario, folder)
    snapshots = _Snapshots(run)

    def note(now_s: float, rounds: int) -> None:
        snapshots.save_if_due()
        if on_progress is not None:
            on_progress(now_s, rounds)

    run.run(note)
    run.finish()
    results = collect(run, time.monotonic() - started_s)
    write_results(results, folder)
    write_report(results, folder)
    return results


def _start(scenario: Scenario, folder: Path) -> VirtualRun:
    learner, num_shards = make_learner(scenario)
    (folder / SUMMARY).unlink(missing_ok=True)
    return VirtualRun(scenario, learner, num_shards, folder)


class _Snapshots:
    """Real time decides when one is taken, which changes nothing in the run."""

    def __init__(self, run: VirtualRun) -> None:
        self._run = run
        self._due_s = time.monotonic() + SNAPSHOT_EVERY_S

    def save_if_due(self) -> None:
        if time.monotonic() < self._due_s:
            return
        started_s = time.monotonic()
        self._run.save()
        took_s = time.monotonic() - started_s
        self._due_s = time.monotonic() + max(SNAPSHOT_EVERY_S, 10 * took_s)
