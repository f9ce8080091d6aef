"""What peers do in a round: train a lease, send the header, reveal the payload; then simulations.virtual.merging.

As worker/lease_work.py and worker/contributor.py do it, in virtual time. When a lease is granted it is known how many
of its shards its peer finishes, and when; what breaks in later (a process that ends, a round that closes) is seen by
its number of session, link or lease.
"""

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coordinator.core import events as ev
from coordinator.core.effects import CheckPayload, CloseRound, GrantLease
from protocol.signing import sha256_hex
from simulations.learner import Work as Task
from simulations.virtual.group_work import GroupWork
from simulations.virtual.merging import DECODE_GAIN as DECODE_GAIN
from simulations.virtual.merging import DECODE_GAIN_DENSE as DECODE_GAIN_DENSE
from simulations.virtual.merging import Merging
from simulations.virtual.peers import VirtualPeer, World
from simulations.virtual.recorder import Recorder

if TYPE_CHECKING:
    from simulations.virtual.coordinator import VirtualCoordinator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_CARRIED = 4096  # shards, as worker/contributor.py
TOKEN_BYTES = 1.1  # of a leased shard on the wire


class Work:
    """Everybody's part in the open round."""

    def __init__(self, world: World, coordinator: "VirtualCoordinator", recorder: Recorder) -> None:
        self.groups = GroupWork(world, coordinator)
        self.merging = Merging(world, coordinator, recorder)
        self._world = world
        self._coordinator = coordinator
        self._recorder = recorder

    # ---- training

    def take_leases(self, grants: Sequence[GrantLease]) -> list[Task]:
        """Leases were granted, all at once: who trains how much of it, and when it is done."""
        world, now_s = self._world, self._world.clock.now_s
        spec = world.spec
        peers = [world.by_id[grant.peer] for grant in grants]
        index = np.array([peer.index for peer in peers])
        num_units = np.array([len(grant.units) for grant in grants])
        arrival_s = now_s + world.latency_s[index]
        start_s = arrival_s + self._fetch_shards(index, num_units)
        jitter = np.exp(world.population.jitter[index] * world.rng.standard_normal(len(grants)))
        unit_s = world.step_s[index] * spec.data.shard_steps * jitter
        limit_s = arrival_s + grants[0].deadline_in_s - spec.round.exchange_s
        done = np.clip((limit_s - start_s) / unit_s, 0.0, num_units).astype(np.int64)
        finish_s = np.where(done == num_units, start_s + num_units * unit_s, np.maximum(limit_s, start_s))
        contributes = np.array([grant.contribute for grant in grants])
        last_s = float(finish_s[contributes].max()) if contributes.any() else now_s
        self._recorder.trained_s = last_s
        until_s = np.where(contributes, finish_s, np.maximum(np.minimum(finish_s, last_s), start_s))
        done = np.where(contributes, done, np.clip((until_s - start_s) / unit_s, 0.0, done).astype(np.int64))
        world.train_from_s[index] = start_s
        world.train_until_s[index] = until_s
        encode_s = 4.0 * world.learner.num_parameters / world.population.codec_bps[index] + world.lease_s[index]
        tasks = []
        for peer, grant, num, end_s, encoded_s, each_s in zip(
            peers, grants, done.tolist(), until_s.tolist(), (finish_s + encode_s).tolist(), unit_s.tolist(), strict=True
        ):
            tasks.append(self._take_lease(peer, grant, num, end_s, encoded_s, each_s))
        return tasks

    def _fetch_shards(self, index: Ints, num_units: Ints) -> Floats:
        """Seconds until each has its shards: the coordinator's uplink carries them all at once."""
        world = self._world
        size = num_units * (world.spec.shard_tokens * TOKEN_BYTES)
        _, down_bps = world.network.bandwidth(index)
        up_bps, _ = world.network.bandwidth(np.array([world.coordinator]))
        total = float(size.sum())
        self._recorder.coordinator_sent_bytes += total
        transfer_s: Floats = np.maximum(8.0 * size / down_bps, 8.0 * total / float(up_bps[0]))
        return 2.0 * world.latency_s[index] + transfer_s

    def _take_lease(
        self, peer: VirtualPeer, grant: GrantLease, num: int, end_s: float, encoded_s: float, each_s: float
    ) -> Task:
        world = self._world
        self._keep_unlisted(peer)
        if not peer.ready:  # the connection has just broken: nobody gets it
            return Task(grant=grant, num_units=0)
        gap_s = max(0.0, world.clock.now_s - peer.idle_since_s) if peer.idle_since_s else 0.0
        ahead = min(len(grant.ahead), int(gap_s / each_s))  # as long as the last exchange and merge took
        units = tuple(dict.fromkeys((*grant.units[:num], *peer.lead, *peer.carried)))  # as worker.contributor
        peer.lease, peer.header, peer.num_done = grant, None, num
        peer.lead = grant.ahead[:ahead]
        peer.idle_since_s = end_s
        peer.compute_s += end_s - world.train_from_s[peer.index] + ahead * each_s
        if peer.ends_s >= end_s:
            peer.trained_units += num + ahead
        world.train_until_s[peer.index] = end_s + ahead * each_s
        if grant.contribute and num:
            peer.named = units
            world.clock.at(encoded_s, self._encode, peer, peer.session, grant.lease_id)
        else:
            peer.carried = units[:MAX_CARRIED]
            if grant.contribute:
                world.clock.at(end_s + world.latency_s[peer.index], self._return, peer, peer.session, grant.lease_id)
        in_time = peer.ends_s >= end_s  # else its process ends first, and what it did is lost
        return Task(grant=grant, num_units=num if in_time else 0, num_ahead=ahead if in_time else 0)

    def _keep_unlisted(self, peer: VirtualPeer) -> None:
        if peer.named and peer.header is not None:
            peer.carried = peer.named[:MAX_CARRIED]
        peer.named = ()

    def _return(self, peer: VirtualPeer, session: int, lease_id: int) -> None:
        if session == peer.session and peer.connected and self._coordinator.up:
            reason = "no shard was finished in time"
            self._coordinator.send(ev.LeaseReturned(peer=peer.id, lease_id=lease_id, reason=reason))

    # ---- the contribution

    def _encode(self, peer: VirtualPeer, session: int, lease_id: int) -> None:
        """The payload is encoded and its header signed: on its way, or kept until there is a connection."""
        if session != peer.session or peer.lease is None or peer.lease.lease_id != lease_id:
            return
        spec, sent = self._world.spec, self._world.learner.contribute(peer.id)
        peer.norm = sent.norm
        peer.header = ev.ContributionCommitted(
            peer=peer.id,
            lease_id=lease_id,
            base_digest=peer.lease.base_digest,
            units=peer.named,
            inner_steps=peer.num_done * spec.data.shard_steps,
            tokens=len(peer.named) * spec.shard_tokens,
            mean_loss=sent.mean_loss if isfinite(sent.mean_loss) else 0.0,
            codec=peer.lease.codec,
            contribution_hash=sha256_hex(f"{lease_id}:{peer.id}:{sent.payload_hash}".encode()),
            payload_hash=sent.payload_hash,
            payload_bytes=sent.payload_bytes,
        )
        self._world.clock.after(self._world.latency_s[peer.index], self.deliver, peer, peer.link)

    def deliver(self, peer: VirtualPeer, link: int) -> None:
        """The header reaches the coordinator, unless the connection broke; then it is sent again over the next."""
        if link == peer.link and peer.connected and peer.header is not None and self._coordinator.up:
            self._world.sending[peer.index] = True
            self._coordinator.take_header(peer, peer.header)

    def take_verdict(self, peer: VirtualPeer) -> None:
        """Refused: nothing more to send in this round."""
        self._world.sending[peer.index] = False

    def reveal(self, peer: VirtualPeer, check: CheckPayload) -> None:
        """The coordinator wants the payload."""
        delay_s = self._world.latency_s[peer.index] + self._world.reveal_s[peer.index]
        self._world.clock.after(delay_s, self._push, peer, peer.link, check.payload_hash, check.payload_bytes)

    def _push(self, peer: VirtualPeer, link: int, payload_hash: str, size: int) -> None:
        if link != peer.link or not peer.connected:
            return
        world = self._world
        peer.push_flow = world.network.start(
            peer.index, world.coordinator, size, self._pushed, peer, link, payload_hash, size, world.clock.now_s
        )

    def _pushed(self, peer: VirtualPeer, link: int, payload_hash: str, size: int, started_s: float) -> None:
        if link != peer.link or not peer.connected:
            return
        self._world.sending[peer.index] = False
        peer.sent_bytes += size
        self._recorder.coordinator_received_bytes += size
        seconds = max(self._world.clock.now_s - started_s, 1e-6)
        self._coordinator.take_payload(payload_hash, peer.norm, 8.0 * size / seconds)

    # ---- the merge

    def take_manifest(self, closed: CloseRound) -> None:
        """A round closed: leases end, what was listed is settled, and everybody who holds the state merges."""
        world, now_s = self._world, self._world.clock.now_s
        for credit in closed.credits:
            peer = world.by_id[credit.peer]
            if peer.header is not None and peer.header.payload_hash == credit.payload_hash:
                peer.named, peer.carried, peer.header = (), (), None
        receivers = []
        for peer in world.peers:
            if peer.lease is not None and peer.connected:
                self._end_lease(peer, now_s)
            if peer.ready and peer.merging == closed.round:
                receivers.append(peer)
        if receivers:
            self.merging.begin(closed, receivers)

    def _end_lease(self, peer: VirtualPeer, now_s: float) -> None:
        peer.lease = None
        if not peer.lead:
            self._world.stop_training(peer, now_s)
        self._world.network.cancel(peer.push_flow)
        self._world.sending[peer.index] = False
