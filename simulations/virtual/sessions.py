"""Peers come and go: join, fetch the state, lose the connection, come back, stop (worker/daemon.py, follower.py)."""

from math import inf
from typing import TYPE_CHECKING

import numpy as np

from coordinator.core import events as ev
from protocol.exchange.fetch import CONCURRENCY
from protocol.replica import state_bytes_size
from simulations.virtual.peers import NEVER, VirtualPeer, World
from simulations.virtual.recorder import Recorder
from simulations.world import availability as av
from simulations.world.faults import FaultSpec
from simulations.world.links import UTC_OFFSET_HOURS

if TYPE_CHECKING:
    from simulations.virtual.coordinator import VirtualCoordinator

PREPARE_S = 6.0  # of a new worker process: imports, the model, one second of benchmark (worker/daemon.py)
HANDSHAKE_TRIPS = 3  # TCP, TLS, challenge and answer
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # as worker/daemon.py
MAX_STATE_SOURCES = 4  # as coordinator/sessions.py


class Sessions:
    """Everybody's processes and connections."""

    def __init__(self, world: World, coordinator: "VirtualCoordinator", recorder: Recorder) -> None:
        self._world = world
        self._coordinator = coordinator
        self._recorder = recorder
        self._kinds = [av.AVAILABILITY[spec.availability] for spec in world.scenario.population]
        self._dialable = np.flatnonzero(world.dialable[:-1])

    def open(self) -> None:
        """Put everybody's first session, and the faults, on the clock."""
        world = self._world
        needed = world.scenario.training_bytes(world.learner.num_parameters)
        for peer in world.peers:
            if world.population.memory_bytes[peer.index] < needed:
                self._recorder.too_small += 1
                continue
            planned = self._sessions_of(peer)
            if planned:
                for session in planned:
                    world.clock.at(session[0] * av.HOUR_S, self._start, peer)
                continue
            start_s = float(world.population.joins_s[peer.index])
            kind = self._kind(peer)
            hour = self._local_hour(peer, start_s)
            if world.rng.random() >= float(av.share_online(kind, hour)):
                start_s += av.draw_gap_s(kind, hour, world.rng)
            if start_s < world.scenario.hours * av.HOUR_S:
                world.clock.at(start_s + world.rng.random(), self._start, peer)
        for fault in world.scenario.fault:
            world.clock.at(fault.start_s, self._begin_fault, fault)
            world.clock.at(fault.end_s, self._end_fault, fault)

    def _kind(self, peer: VirtualPeer) -> av.AvailabilityClass:
        return self._kinds[int(self._world.population.kind[peer.index])]

    def _sessions_of(self, peer: VirtualPeer) -> tuple[tuple[float, ...], ...]:
        """Those that the scenario lists, in hours; none: they are drawn."""
        kind = int(self._world.population.kind[peer.index])
        return self._world.scenario.population[kind].measured.sessions_hours

    def _local_hour(self, peer: VirtualPeer, at_s: float) -> float:
        scenario = self._world.scenario
        region = scenario.population[self._world.population.kind[peer.index]].region
        return (scenario.start_hour_utc + at_s / av.HOUR_S + UTC_OFFSET_HOURS[region]) % 24.0

    # ---- a process

    def _start(self, peer: VirtualPeer) -> None:
        world = self._world
        peer.session += 1
        peer.sessions += 1
        peer.running = world.running[peer.index] = True
        peer.session_started_s, peer.retry_s = world.clock.now_s, FIRST_PAUSE_S
        peer.ends_s, abrupt = self._choose_end(peer)
        if peer.ends_s < inf:
            world.clock.at(peer.ends_s, self._stop, peer, peer.session, abrupt)
        world.clock.after(0.0, self._dial, peer, peer.session)

    def _choose_end(self, peer: VirtualPeer) -> tuple[float, bool]:
        """When the session that begins now will end, and whether without a goodbye."""
        planned = self._sessions_of(peer)
        if planned:
            end_hours = planned[peer.sessions - 1][1:]
            return (end_hours[0] * av.HOUR_S if end_hours else inf), False
        kind, rng = self._kind(peer), self._world.rng
        ends_s = self._world.clock.now_s + av.draw_session_s(kind, rng)
        return ends_s, bool(rng.random() < kind.abrupt)

    def _stop(self, peer: VirtualPeer, session: int, abrupt: bool) -> None:
        """The process ends: with a goodbye, or found out by its silence. What it kept in memory is gone."""
        if session != peer.session:
            return
        world = self._world
        now_s = world.clock.now_s
        world.stop_training(peer, now_s)
        if peer.connected:
            self._leave(peer, abrupt)
        peer.session += 1
        peer.running = peer.ready = world.running[peer.index] = world.ready[peer.index] = False
        peer.online_s += now_s - peer.session_started_s
        peer.held = peer.merging = NEVER
        peer.lease, peer.header, peer.named, peer.carried, peer.lead = None, None, (), (), ()
        world.learner.drop(peer.id)
        if self._sessions_of(peer):
            return  # the next one is on the clock already
        kind = self._kind(peer)
        if not av.leaves_for_good(kind, now_s - peer.session_started_s, world.rng):
            world.clock.after(av.draw_gap_s(kind, self._local_hour(peer, now_s), world.rng), self._start, peer)

    def _leave(self, peer: VirtualPeer, abrupt: bool) -> None:
        delay_s = self._world.spec.round.heartbeat_timeout_s if abrupt else self._world.latency_s[peer.index]
        if not abrupt and peer.lease is not None and peer.header is None:
            self._world.clock.after(delay_s, self._hand_back, peer, peer.lease.lease_id)
        self._world.clock.after(delay_s, self._note_gone, peer, peer.link)
        self._disconnect(peer)

    def _hand_back(self, peer: VirtualPeer, lease_id: int) -> None:
        if self._coordinator.up:
            self._coordinator.send(ev.LeaseReturned(peer=peer.id, lease_id=lease_id, reason="the worker stops"))

    def _note_gone(self, peer: VirtualPeer, link: int) -> None:
        """The coordinator's view of a connection ends, unless a newer one has replaced it."""
        if self._coordinator.up and link == peer.link:
            self._coordinator.send(ev.PeerLeft(peer=peer.id, reason="the session ended"))

    def _disconnect(self, peer: VirtualPeer) -> None:
        world = self._world
        world.network.cancel(peer.sync_flow)
        world.network.cancel(peer.push_flow)
        peer.connected = peer.ready = False
        world.connected[peer.index] = world.ready[peer.index] = world.sending[peer.index] = False

    # ---- a connection

    def _dial(self, peer: VirtualPeer, session: int) -> None:
        """Join, or try again after a pause that grows."""
        if session != peer.session or peer.connected:
            return
        world = self._world
        if not self._coordinator.up or world.cuts[peer.index]:
            world.clock.after(peer.retry_s * float(world.rng.uniform(0.5, 1.0)), self._dial, peer, session)
            peer.retry_s = min(2 * peer.retry_s, LONGEST_PAUSE_S)
            return
        peer.retry_s = FIRST_PAUSE_S
        peer.link += 1
        world.clock.after(2 * HANDSHAKE_TRIPS * world.latency_s[peer.index], self._join, peer, session, peer.link)

    def _join(self, peer: VirtualPeer, session: int, link: int) -> None:
        if session != peer.session or link != peer.link:
            return
        world, population = self._world, self._world.population
        if not self._coordinator.up or world.cuts[peer.index]:
            self._dial(peer, session)
            return
        kind = world.scenario.population[population.kind[peer.index]]
        peer.connected = world.connected[peer.index] = True
        self._coordinator.send(
            ev.PeerJoined(
                peer=peer.id,
                name=peer.id,
                device=kind.device,
                role="worker",
                token_id="workers",  # noqa: S106 - the name of an invite
                lease_id=peer.lease.lease_id if peer.lease else None,
            )
        )
        if peer.connected:
            is_new = peer.held == NEVER
            world.clock.after(world.start_s[peer.index] if is_new else 0.0, self._catch_up, peer, link)

    def refuse(self, peer: VirtualPeer) -> None:
        self._disconnect(peer)

    def resync(self, peer: VirtualPeer) -> None:
        """Its state is not the run's: fetch it again."""
        world = self._world
        world.stop_training(peer, world.clock.now_s)
        peer.ready = world.ready[peer.index] = False
        peer.held, peer.lease, peer.header = NEVER, None, None
        self._catch_up(peer, peer.link)

    # ---- the state

    def _catch_up(self, peer: VirtualPeer, link: int) -> None:
        """Fetch what is missing: the payloads since the peer's state, or a checkpoint and those since, if smaller."""
        if link != peer.link or not peer.connected:
            return
        state = self._coordinator.state
        target, total = state.rounds_merged, self._coordinator.total_bytes
        if peer.held == target:
            self._follow(peer, link)
            return
        has_momentum = state.spec.outer.momentum > 0.0 and state.checkpoint_round > 0
        size = state_bytes_size(state.num_parameters, has_momentum) + total[-1] - total[state.checkpoint_round]
        streams = 1  # a state is one blob, from one source
        if peer.held != NEVER and total[-1] - total[peer.held] < size:
            size, streams = total[-1] - total[peer.held], CONCURRENCY
        source = self._choose_source(peer)
        if source < self._world.coordinator:
            self._world.peers[source].sent_bytes += size
        else:
            self._recorder.coordinator_sent_bytes += size
        peer.received_bytes += size
        peer.sync_flow = self._world.network.start(
            source, peer.index, size, self._synced, peer, link, target, streams=streams
        )

    def _choose_source(self, peer: VirtualPeer) -> int:
        """A worker that can be dialled and has the state of the last checkpoint, else the coordinator.

        It has it since it held that state, or fetched it when it joined: the initial one too.
        """
        world, checkpoint = self._world, self._coordinator.state.checkpoint_round
        for _ in range(MAX_STATE_SOURCES if len(self._dialable) else 0):
            source = world.peers[int(self._dialable[world.rng.integers(len(self._dialable))])]
            if source.ready and source is not peer and source.held >= checkpoint and not world.cuts[source.index]:
                return source.index
        return world.coordinator

    def _synced(self, peer: VirtualPeer, link: int, rounds: int) -> None:
        if link != peer.link or not peer.connected:
            return
        peer.held = rounds
        if rounds < self._coordinator.state.rounds_merged:
            self._catch_up(peer, link)  # rounds were merged meanwhile
        else:
            self._follow(peer, link)

    def _follow(self, peer: VirtualPeer, link: int) -> None:
        """It holds the newest state: report it, and go on with a header that was not taken."""
        world = self._world
        peer.ready = world.ready[peer.index] = True
        peer.merging = peer.held
        if peer.lease is not None and peer.lease.round < self._coordinator.state.rounds_merged:
            peer.lease, peer.header = None, None
            world.stop_training(peer, world.clock.now_s)
        world.clock.after(
            world.latency_s[peer.index], self._coordinator.work.merging.report, peer, link, peer.held, 0.0
        )
        if peer.header is not None:
            world.clock.after(world.latency_s[peer.index], self._coordinator.work.deliver, peer, link)

    # ---- faults

    def lose_coordinator(self) -> None:
        """Its process died: every connection breaks at once."""
        for peer in self._world.peers:
            if peer.connected:
                self._lose_link(peer)

    def _lose_link(self, peer: VirtualPeer) -> None:
        self._disconnect(peer)
        self._world.clock.after(
            FIRST_PAUSE_S * float(self._world.rng.uniform(0.5, 1.0)), self._dial, peer, peer.session
        )

    def _begin_fault(self, fault: FaultSpec) -> None:
        world = self._world
        self._recorder.note_fault(fault)
        if fault.kind == "coordinator_outage":
            self._coordinator.go_down()
            return
        for peer in self._hit(fault):
            if fault.kind == "slow_links":
                world.network.scale(peer.index, fault.factor)
                continue
            world.cuts[peer.index] += 1
            if peer.connected:
                silent_s = world.spec.round.heartbeat_timeout_s
                world.clock.after(silent_s, self._note_gone, peer, peer.link)
                self._lose_link(peer)

    def _end_fault(self, fault: FaultSpec) -> None:
        if fault.kind == "coordinator_outage":
            self._coordinator.come_up()
            return
        for peer in self._hit(fault):
            if fault.kind == "slow_links":
                self._world.network.scale(peer.index, 1.0 / fault.factor)
            else:
                self._world.cuts[peer.index] -= 1

    def _hit(self, fault: FaultSpec) -> list[VirtualPeer]:
        specs = self._world.scenario.population
        hit = [fault.region in (None, spec.region) and fault.population in (None, spec.name) for spec in specs]
        return [peer for peer in self._world.peers if hit[self._world.population.kind[peer.index]]]
