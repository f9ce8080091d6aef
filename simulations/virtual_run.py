"""A whole run under the virtual clock: builds its parts, and drives them until the run or the scenario's time ends.

The same scenario and seed give the same journal, byte for byte: no wall clock, no asyncio, no global randomness, no
order of sets. A snapshot holds everything, so what follows after `resume` is the same as without it.
"""

import gc
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coordinator.core import machine
from protocol.errors import ConfigError
from simulations.learner import Learner
from simulations.network import Network
from simulations.scenario import Scenario
from simulations.virtual.clock import Clock
from simulations.virtual.coordinator import VirtualCoordinator
from simulations.virtual.peers import VirtualPeer, World
from simulations.virtual.recorder import SAMPLES_A_ROW, Recorder
from simulations.virtual.sessions import PREPARE_S, Sessions
from simulations.virtual.work import Work
from simulations.world.links import LINKS, stream_bps
from simulations.world.population import draw_population, name_peers

NUM_ROWS = 120  # of the timeline
JOURNAL, SNAPSHOT = "trace.jsonl", "snapshot.pickle"
PROGRESS_EVENTS = 500
_RUN_STREAM = 2


class VirtualRun:
    """One run. `folder` takes the journal and the snapshots."""

    def __init__(self, scenario: Scenario, learner: Learner, num_shards: int, folder: Path) -> None:
        self.scenario = scenario
        self.folder = folder
        self.world = _build_world(scenario, learner)
        self.recorder = Recorder()
        state = machine.create(
            scenario.spec,
            num_shards=num_shards,
            num_parameters=learner.num_parameters,
            initial_digest=learner.digest,
        )
        self._end_s = scenario.hours * 3600.0
        folder.mkdir(parents=True, exist_ok=True)
        journal = (folder / JOURNAL).open("wb")
        self.coordinator = VirtualCoordinator(self.world, state, self.recorder, journal)
        self.sessions = Sessions(self.world, self.coordinator, self.recorder)
        self.coordinator.sessions = self.sessions
        self.coordinator.work = Work(self.world, self.coordinator, self.recorder)
        self.recorder.first_loss = learner.held_out_loss()
        self.coordinator.open()
        self.sessions.open()
        self._sample()

    def run(self, on_progress: Callable[[float, int], None] | None = None, until_s: float | None = None) -> None:
        """Go on until the run is finished, or to `until_s`.

        on_progress: (virtual seconds, rounds merged), now and then, between two events; it may save a snapshot.
        """
        gc.disable()  # millions of shards' names live long, and nothing here makes cycles
        try:
            self._drive(on_progress, until_s)
        finally:
            gc.enable()

    def _drive(self, on_progress: Callable[[float, int], None] | None, until_s: float | None) -> None:
        clock, coordinator = self.world.clock, self.coordinator
        end_s = self._end_s if until_s is None else min(until_s, self._end_s)
        events = 0
        while not coordinator.finished:
            due_s, deadline_s = clock.next_s, coordinator.deadline_s
            if min(due_s, deadline_s) > end_s:
                clock.now_s = end_s
                break
            if deadline_s <= due_s:
                clock.now_s = max(clock.now_s, deadline_s)
                coordinator.wake()
            else:
                clock.pop()
            events += 1
            if on_progress is not None and events % PROGRESS_EVENTS == 0:
                on_progress(clock.now_s, coordinator.state.rounds_merged)
        coordinator.journal.flush()
        if on_progress is not None:
            on_progress(clock.now_s, coordinator.state.rounds_merged)

    def _sample(self) -> None:
        self.recorder.sample(self.world)
        self.world.clock.after(self._end_s / (NUM_ROWS * SAMPLES_A_ROW), self._sample)

    def finish(self) -> None:
        """Close the books: sessions that still run count until now."""
        self.recorder.sample(self.world)
        self.recorder.end_row(self.world)
        now_s = self.world.clock.now_s
        for peer in self.world.peers:
            self.world.stop_training(peer, now_s)
            if peer.running:
                peer.online_s += now_s - peer.session_started_s
        self.coordinator.journal.close()
        (self.folder / SNAPSHOT).unlink(missing_ok=True)

    # ---- snapshots

    def save(self) -> None:
        """Write a snapshot; the journal up to it is on the disk first."""
        self.coordinator.journal.flush()
        temporary = self.folder / f"{SNAPSHOT}.tmp"
        temporary.write_bytes(pickle.dumps((self, self.coordinator.journal.tell()), protocol=5))
        temporary.replace(self.folder / SNAPSHOT)

    @staticmethod
    def resume(scenario: Scenario, folder: Path) -> "VirtualRun":
        """The run of the folder's last snapshot; its journal is cut to that moment.

        Raises ConfigError when there is no snapshot, or one of another scenario.
        """
        if not (folder / SNAPSHOT).is_file():
            raise ConfigError(f"{folder}: there is no snapshot to resume from; was it finished, or never begun?")
        data = (folder / SNAPSHOT).read_bytes()
        run, size = pickle.loads(data)  # noqa: S301 - our own file, of the user's own folder
        if not isinstance(run, VirtualRun) or run.scenario != scenario:
            raise ConfigError(f"{folder} was begun with another scenario or settings; start it again without --resume")
        run.folder = folder
        journal = (folder / JOURNAL).open("r+b")
        journal.truncate(size)
        journal.seek(size)
        run.coordinator.journal = journal
        return run


def _build_world(scenario: Scenario, learner: Learner) -> World:
    population = draw_population(scenario.population, scenario.coordinator.region, scenario.seed)
    count = population.count
    site = LINKS[scenario.coordinator.link]
    up_bps = np.append(population.up_bps, site.up_bps)
    down_bps = np.append(population.down_bps, site.down_bps)
    streams = np.append(population.stream_bps, stream_bps(site.latency_s, site.loss))
    clock = Clock()
    measured = [spec.measured for spec in scenario.population]
    step_s = scenario.flops_per_step(learner.num_parameters) / population.flops
    claims = np.array([each.claimed_steps_per_s or np.nan for each in measured])[population.kind]
    peers = [VirtualPeer(index=index, id=name) for index, name in enumerate(name_peers(count))]
    return World(
        scenario=scenario,
        spec=scenario.spec,
        clock=clock,
        network=Network(clock, up_bps, down_bps, streams),
        learner=learner,
        population=population,
        rng=np.random.Generator(np.random.PCG64((scenario.seed, _RUN_STREAM))),
        peers=peers,
        by_id={peer.id: peer for peer in peers},
        step_s=step_s,
        latency_s=np.append(population.latency_s, site.latency_s),
        stream_bps=streams,
        dialable=np.append(population.dialable, True),
        cuts=np.zeros(count, np.int64),
        train_from_s=np.zeros(count),
        train_until_s=np.zeros(count),
        merging_until_s=np.zeros(count),
        start_s=np.array([PREPARE_S if each.start_s is None else each.start_s for each in measured])[population.kind],
        lease_s=np.array([each.lease_s for each in measured])[population.kind],
        reveal_s=np.array([each.reveal_s for each in measured])[population.kind],
        merge_s=np.array([each.merge_s for each in measured])[population.kind],
        claimed_steps_per_s=np.where(np.isnan(claims), 1.0 / step_s, claims),
        running=np.zeros(count, bool),
        sending=np.zeros(count, bool),
        connected=np.zeros(count, bool),
        ready=np.zeros(count, bool),
    )
