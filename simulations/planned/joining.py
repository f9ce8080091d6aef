"""Peers whose session began: they dial, prepare, and fetch the state, as simulations.virtual.sessions has it.

A peer fetches from one that can be dialled, drawn by lot; where it finds none, from the coordinator. All that are sent
at the same time by one uplink end when it has sent them all. Rounds that are merged meanwhile are fetched after it.
"""

import numpy as np

from simulations.planned.crowd import NEVER_S, Crowd, Floats, Ints
from simulations.planned.site import Site
from simulations.virtual.sessions import HANDSHAKE_TRIPS, MAX_STATE_SOURCES, PREPARE_S

TRIPS = 2 * HANDSHAKE_TRIPS + 1


class Joining:
    """What uplinks have still to send to those who join. Nodes are peers; the last one is the coordinator."""

    def __init__(self, site: Site, crowd: Crowd) -> None:
        self.coordinator_sent_bytes = 0.0
        self._site = site
        self._crowd = crowd
        self._backlog_s = np.zeros(crowd.count + 1, np.float32)

    def admit(
        self,
        new: Ints,
        *,
        size: float,
        period_s: float,
        round_bytes: float,
        round_s: float,
        has_sources: bool,
        rng: np.random.Generator,
    ) -> None:
        """Set when these peers, whose sessions began within the last `period_s`, hold the state and have said so.

        size: bytes of the state and of what it lacks; round_bytes: of a round's payloads.
        """
        self._backlog_s = np.maximum(self._backlog_s - np.float32(period_s), np.float32(0.0))
        if not len(new):
            return
        crowd = self._crowd
        source = self._choose_sources(new, has_sources, rng)
        up_bps, stream_bps = self._site.up_bps * np.ones(len(new)), np.full(len(new), np.inf)
        by_peer = source < crowd.count
        up_bps[by_peer] = crowd.up_bps[source[by_peer]]
        stream_bps[by_peer] = crowd.stream_bps[source[by_peer]]
        np.add.at(self._backlog_s, source, (8.0 * size / up_bps).astype(np.float32))
        np.add.at(crowd.sent_bytes, source[by_peer], np.float32(size))
        self.coordinator_sent_bytes += size * float(np.count_nonzero(~by_peer))
        crowd.received_bytes[new] += size
        own_bps = np.minimum(np.minimum(up_bps, stream_bps), np.minimum(crowd.down_bps[new], crowd.stream_bps[new]))
        # Those that began earlier in the period have less before them; half of it is theirs on average.
        fetch_s = np.maximum(8.0 * size / own_bps, self._backlog_s[source] - period_s / 2)
        fetch_s = _catch_up(fetch_s, round_bytes / size * fetch_s / round_s if round_s else np.zeros(len(new)))
        crowd.synced_s[new] = crowd.started_s[new] + TRIPS * crowd.latency_s[new] + PREPARE_S + fetch_s
        crowd.report_s[new] = crowd.synced_s[new] + crowd.latency_s[new]

    def _choose_sources(self, new: Ints, has_sources: bool, rng: np.random.Generator) -> Ints:
        """Who sends each of them the state. Whoever can be dialled is asked, some of them in vain."""
        crowd = self._crowd
        source = np.full(len(new), crowd.count)
        able = crowd.online & crowd.dialable & np.isfinite(crowd.synced_s)
        able[new] = False
        sources = np.flatnonzero(able)
        if has_sources and len(sources):
            share = len(sources) / np.count_nonzero(crowd.dialable)
            found = rng.random(len(new)) >= (1.0 - share) ** MAX_STATE_SOURCES
            source[found] = sources[rng.integers(len(sources), size=int(found.sum()))]
        return source


def _catch_up(fetch_s: Floats, growth: Floats) -> Floats:
    """Seconds with what is merged meanwhile: `growth` seconds more for every second; from 1 on it has no end."""
    return np.where(growth < 1.0, fetch_s / np.maximum(1.0 - growth, 1e-9), NEVER_S)
