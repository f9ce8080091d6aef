"""Fidelity `plan`: a run by its rounds, vectorised over peers, up to ten million of them.

Nothing here has events: what each peer does in a round follows from arrays. Where a crowd is so large that it hardly
changes from one round to the next, one round's training and merging stand for all those of some minutes. Checked
against fidelity `time` in tests/unit/test_plan.py.

Not modelled: attackers, digests that differ, validators, peers that come back within the round that they left.
"""

import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path

import numpy as np

from simulations.planned.block import World, play_block
from simulations.planned.books import Books, collect
from simulations.planned.crowd import advance, describe_habits, draw_crowd
from simulations.planned.faults import Faults
from simulations.planned.joining import Joining
from simulations.planned.playing import when_enough
from simulations.planned.site import describe_site
from simulations.report import write_report
from simulations.results import Results, write_results
from simulations.scenario import Scenario

# Up to so many peers every round is played by itself; then the rounds of so many seconds together.
BLOCKS_S = ((20_000, 0.0), (200_000, 300.0), (10**9, 1200.0))
SINGLE_ROUNDS = 5  # in the beginning, when everybody is just arriving
LONGEST_WAIT_S = 60.0
_STREAM = 3
OnProgress = Callable[[float, int], None]


def plan(scenario: Scenario, folder: Path, on_progress: OnProgress | None = None) -> Results:
    """Plan a scenario to its end and write its folder. on_progress: (virtual seconds, rounds merged)."""
    results = plan_run(scenario, on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    write_results(results, folder)
    write_report(results, folder)
    return results


def plan_run(scenario: Scenario, on_progress: OnProgress | None = None) -> Results:
    """The results alone."""
    started_s = time.monotonic()
    run = _Plan(scenario)
    while run.goes_on:
        run.step()
        if on_progress is not None:
            on_progress(run.now_s, len(run.world.books.rounds))
    return run.finish(started_s)


class _Plan:
    """A run from its first session to its end."""

    def __init__(self, scenario: Scenario) -> None:
        rng = np.random.Generator(np.random.PCG64((scenario.seed, _STREAM)))
        habits, site = describe_habits(scenario), describe_site(scenario)
        self.now_s = 0.0
        self.world = World(
            site=site,
            habits=habits,
            crowd=draw_crowd(scenario, habits, rng),
            books=Books(scenario=scenario, site=site, num_peers=scenario.num_peers),
            faults=Faults(scenario),
            rng=rng,
            end_s=scenario.hours * 3600.0,
        )
        self._scenario = scenario
        self._joining = Joining(site, self.world.crowd)
        self._refreshed_s = 0.0
        self._block_s = next(seconds for count, seconds in BLOCKS_S if scenario.num_peers <= count)

    @property
    def is_finished(self) -> bool:
        return self.world.books.tokens >= self.world.site.spec.train.tokens

    @property
    def goes_on(self) -> bool:
        return self.now_s < self.world.end_s and not self.is_finished

    def step(self) -> None:
        """A block of rounds, or waiting for enough peers."""
        self._refresh()
        crowd = self.world.crowd
        holders = np.flatnonzero(crowd.online & (crowd.report_s <= self.now_s))
        if len(holders) >= self.world.site.spec.round.min_peers:
            self.now_s = play_block(self.world, holders, self.now_s, self._count_rounds())
        else:
            self._wait()

    def finish(self, started_s: float) -> Results:
        """Close the books: sessions that still run count until now."""
        crowd, books = self.world.crowd, self.world.books
        self.now_s = min(self.now_s, self.world.end_s)
        crowd.online_s[crowd.online] += np.maximum(self.now_s - crowd.started_s[crowd.online], 0.0)
        wall_s = time.monotonic() - started_s
        return collect(books, crowd, now_s=self.now_s, finished=self.is_finished, wall_s=wall_s, rng=self.world.rng)

    def _refresh(self) -> None:
        """Sessions, faults and joining up to now."""
        world, books = self.world, self.world.books
        new = advance(world.crowd, world.habits, self.now_s, world.rng)
        merged, every = len(books.rounds), world.site.spec.checkpoint.every_rounds
        checkpoint = merged // every * every if self._scenario.validator else 0
        sent_bytes = self._joining.coordinator_sent_bytes
        self._joining.admit(
            new,
            size=world.site.state_bytes(checkpoint) + sum(books.merged_bytes[checkpoint:]),
            period_s=self.now_s - self._refreshed_s,
            round_bytes=books.merged_bytes[-1] if merged else 0.0,
            round_s=world.round_s,
            has_sources=merged > 0,
            rng=world.rng,
        )
        books.coordinator_sent_bytes += self._joining.coordinator_sent_bytes - sent_bytes
        world.faults.apply(world.crowd, self.now_s)
        self._refreshed_s = self.now_s

    def _wait(self) -> None:
        """Too few hold the state: on to the moment when enough do, or when somebody comes."""
        world = self.world
        enough_s = when_enough(world.site, world.crowd, self.now_s)
        coming_s = float(world.crowd.toggles_s.min(initial=world.end_s))
        later_s = min(max(coming_s, self.now_s) + 1.0, self.now_s + LONGEST_WAIT_S)
        until_s = min(enough_s if isfinite(enough_s) else later_s, world.end_s)
        world.books.sample(world.crowd, until_s, from_s=self.now_s, what=None)
        self.now_s = until_s

    def _count_rounds(self) -> int:
        """How many rounds the crowd may stay as it is."""
        world = self.world
        if len(world.books.rounds) < SINGLE_ROUNDS or not world.round_s:
            return 1
        block_s = min(self._block_s, world.faults.next_s - self.now_s, world.end_s - self.now_s)
        return max(1, int(block_s / world.round_s))
