"""Everybody merges a manifest: fetches its payloads, decodes them into a sum, reports (worker/follower.py)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coordinator.core import events as ev
from coordinator.core.effects import CloseRound
from coordinator.sessions import MAX_PAYLOAD_PEERS
from simulations.virtual.broadcast import Fetch, Fetched, plan_fetch
from simulations.virtual.peers import VirtualPeer, World
from simulations.virtual.recorder import Recorder

if TYPE_CHECKING:
    from simulations.virtual.coordinator import VirtualCoordinator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# How much faster payloads are decoded into a sum than encoded (benchmarks/codecs.py).
DECODE_GAIN = {"sparse": 20.0}
DECODE_GAIN_DENSE = 3.0


class Merging:
    """The merges after a round's close."""

    def __init__(self, world: World, coordinator: "VirtualCoordinator", recorder: Recorder) -> None:
        self._world = world
        self._coordinator = coordinator
        self._recorder = recorder

    def begin(self, closed: CloseRound, receivers: Sequence[VirtualPeer]) -> None:
        """All of these hold the round's base, or are merging it: when each of them has the new state."""
        world = self._world
        index = np.array([peer.index for peer in receivers])
        starts_s = np.maximum(world.clock.now_s + world.latency_s[index], world.merging_until_s[index])
        fetched = plan_fetch(self._describe_fetch(closed, index, starts_s), world.rng)
        self._count_sent(fetched)
        payloads = closed.groups or closed.credits
        gain = DECODE_GAIN.get(payloads[0].codec, DECODE_GAIN_DENSE)
        float32_bytes = 4.0 * world.learner.num_parameters * len(payloads)
        done_s = fetched.done_s + float32_bytes / (gain * world.population.codec_bps[index]) + world.merge_s[index]
        world.merging_until_s[index] = done_s
        download_bps = 8.0 * fetched.received_bytes / np.maximum(fetched.done_s - starts_s, 1e-6)
        reports = zip(
            receivers,
            (done_s + world.latency_s[index]).tolist(),
            download_bps.tolist(),
            fetched.received_bytes.tolist(),
            strict=True,
        )
        for peer, at_s, bps, size in reports:
            peer.merging = closed.round + 1
            peer.received_bytes += size
            world.clock.at(at_s, self.report, peer, peer.link, closed.round + 1, bps)

    def _describe_fetch(self, closed: CloseRound, index: Ints, starts_s: Floats) -> Fetch:
        world = self._world
        servers, are_seeds = self._find_payload_peers(index)
        makers = [group.mergers[0] for group in closed.groups] or [credit.peer for credit in closed.credits]
        up_bps, down_bps = world.network.bandwidth(np.arange(len(world.latency_s)))
        return Fetch(
            now_s=world.clock.now_s,
            makers=[world.by_id[maker].index for maker in makers],
            sizes=np.array([payload.payload_bytes for payload in closed.groups or closed.credits], np.float64),
            receivers=index,
            starts_s=starts_s,
            servers=servers,
            servers_are_seeds=are_seeds,
            up_bps=up_bps,
            down_bps=down_bps,
            latency_s=world.latency_s,
            stream_bps=world.stream_bps,
            dialable=world.dialable,
            coordinator=world.coordinator,
        )

    def _find_payload_peers(self, index: Ints) -> tuple[Ints, bool]:
        """As coordinator/sessions.py: workers that can be dialled, seeds first. And whether these are seeds."""
        world = self._world
        dialable = index[world.dialable[index]]
        is_seed = world.population.seeds[dialable]
        pool = dialable[is_seed] if is_seed.any() else dialable
        return world.rng.choice(pool, min(MAX_PAYLOAD_PEERS, len(pool)), replace=False), bool(is_seed.any())

    def _count_sent(self, fetched: Fetched) -> None:
        for node in np.flatnonzero(fetched.sent_bytes[:-1]).tolist():
            self._world.peers[node].sent_bytes += float(fetched.sent_bytes[node])
        self._recorder.coordinator_sent_bytes += float(fetched.sent_bytes[-1])

    def report(self, peer: VirtualPeer, link: int, rounds: int, download_bps: float) -> None:
        """A peer's word that it holds a state reaches the coordinator."""
        if link != peer.link or not peer.ready or not self._coordinator.up:
            return
        peer.held = rounds
        self._coordinator.send(
            ev.StateReported(
                peer=peer.id,
                round=rounds,
                digest=self._coordinator.digests[rounds],
                claimed_steps_per_s=float(self._world.claimed_steps_per_s[peer.index]),
                download_bps=download_bps,
            )
        )
