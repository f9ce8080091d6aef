"""Merging in groups: what worker/group_merger.py does, in virtual time (two-level form and butterfly)."""

from typing import TYPE_CHECKING

import numpy as np

from coordinator.core import events as ev
from coordinator.core.effects import OrderMerge
from protocol.codecs import get_codec
from protocol.signing import sha256_hex
from simulations.virtual.peers import VirtualPeer, World

if TYPE_CHECKING:
    from simulations.virtual.coordinator import VirtualCoordinator


class GroupWork:
    """The merges of groups that were ordered."""

    def __init__(self, world: World, coordinator: "VirtualCoordinator") -> None:
        self._world = world
        self._coordinator = coordinator

    def take_order(self, order: OrderMerge) -> None:
        """A peer is to merge a group: alone from its payloads, or with the group's others."""
        world = self._world
        peer = world.by_id[order.peer]
        members = np.array([world.by_id[credit.peer].index for credit in order.contributions])
        own_latency_s = float(world.latency_s[peer.index])
        seconds = self._butterfly_s(members) if order.butterfly else self._gather_s(order, peer, members)
        links = tuple((world.peers[index], world.peers[index].link) for index in members)
        world.clock.after(seconds + 2 * own_latency_s, self._answer, order, peer, peer.link, links)

    def _gather_s(self, order: OrderMerge, peer: VirtualPeer, members: np.ndarray) -> float:
        """Fetch the group's payloads from their makers, all at once; decode them, encode the mean."""
        world = self._world
        others = members[members != peer.index]
        size = sum(credit.payload_bytes for credit in order.contributions if credit.peer != peer.id)
        up_bps, _ = world.network.bandwidth(others) if len(others) else (np.array([1e9]), None)
        _, down_bps = world.network.bandwidth(np.array([peer.index]))
        mergers = 2  # coordinator.core.groups.QUORUM of them fetch from each maker
        each = max(credit.payload_bytes for credit in order.contributions)
        transfer_s = max(8.0 * size / float(down_bps[0]), mergers * 8.0 * each / float(up_bps.min()))
        for index in others:
            world.peers[index].sent_bytes += each
        peer.received_bytes += size
        float32_bytes = 4.0 * world.learner.num_parameters * (len(members) + 1)
        return (
            transfer_s
            + 4 * float(world.latency_s.max())
            + float32_bytes / float(world.population.codec_bps[peer.index])
        )

    def _butterfly_s(self, members: np.ndarray) -> float:
        """All-reduce in equal parts: everybody sends and gets 2 (N-1)/N vectors; the slowest link holds all up."""
        world = self._world
        count = len(members)
        part = (
            2.0
            * (count - 1)
            / count
            * get_codec(world.spec.exchange.codec).payload_bytes_max(world.learner.num_parameters)
        )
        up_bps, down_bps = world.network.bandwidth(members)
        return 8.0 * part / float(min(up_bps.min(), down_bps.min())) + 4 * float(world.latency_s[members].max())

    def _answer(
        self, order: OrderMerge, peer: VirtualPeer, link: int, links: tuple[tuple[VirtualPeer, int], ...]
    ) -> None:
        """The merger says what it came to; a butterfly fails when one of the group has left."""
        if link != peer.link or not peer.connected or not self._coordinator.up:
            return
        gone = [other.id for other, before in links if other.link != before or not other.connected]
        failed = order.butterfly and bool(gone)
        facts = ",".join(credit.payload_hash for credit in order.contributions)
        size = get_codec(order.codec).payload_bytes_max(self._world.learner.num_parameters)
        self._coordinator.send(
            ev.GroupMerged(
                peer=peer.id,
                round=order.round,
                group=order.group,
                attempt=order.attempt,
                payload_hash="" if failed else sha256_hex(f"{order.round}:{order.group}:{facts}".encode()),
                payload_bytes=0 if failed else size,
                blamed=gone[0] if failed else "",
            )
        )
