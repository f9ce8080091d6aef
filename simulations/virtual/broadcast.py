"""How a round's payloads reach everybody, in time and bytes, as protocol/exchange/order.py has them asked for.

All peers of a round begin at about the same moment, so this is one computation over arrays instead of a flow for each
pair. A node's uplink is divided among all that it has to send, so it is done with everybody when it has sent it all; a
peer has a payload no sooner than its parent in that payload's tree. Where more streams ask a node than it serves
(MAX_STREAMS), or each gets a trickle, what is too much for it comes from the coordinator, such that they end together.

What order.py draws by hash (the ring, the leaf below which a peer stands, the seed that it asks) is drawn here from the
run's generator: the same distribution. M payloads, R receivers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.exchange.fetch import CONCURRENCY
from protocol.exchange.order import FANOUT
from protocol.exchange.piece_index import PIECE_BYTES
from protocol.exchange.pieces import MAX_STREAMS
from protocol.exchange.source import PATIENCE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BISECTIONS = 40
TRICKLE_BPS = 8.0 * PIECE_BYTES / PATIENCE.stall_timeout_s  # a source that sends less is left for the next one


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Who fetches what from whom. Nodes are peers' indices; `coordinator` is the node after the last peer."""

    now_s: float
    makers: Sequence[int]  # (M,) the contributor of each payload
    sizes: Floats  # (M,) bytes
    receivers: Ints  # (R,)
    starts_s: Floats  # (R,) when each begins
    servers: Ints  # peers that pass payloads on: seeds only, or all that were named
    servers_are_seeds: bool
    up_bps: Floats  # by node
    down_bps: Floats
    latency_s: Floats  # one way, by node
    stream_bps: Floats
    dialable: NDArray[np.bool_]
    coordinator: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    done_s: Floats  # (R,) when each has all payloads
    sent_bytes: Floats  # by node
    received_bytes: Floats  # (R,)


def plan_fetch(fetch: Fetch, rng: np.random.Generator) -> Fetched:
    """When everybody has everything, and what each node sent for it."""
    num_nodes, num_payloads = len(fetch.up_bps), len(fetch.sizes)
    rank = rng.random(num_nodes)
    position = np.full(num_nodes, -1)
    position[fetch.receivers] = np.arange(len(fetch.receivers))
    trees = [_ring(maker, fetch.servers, rank) for maker in fetch.makers]
    places = [_choose_parents(fetch, tree, position, rng) for tree in trees]  # of each payload: (R,), -1: its maker
    parents = np.stack([_nodes(fetch, tree, place) for tree, place in zip(trees, places, strict=True)])  # (M, R)
    wanted = parents >= 0
    weights = np.where(wanted, fetch.sizes[:, None], 0.0)
    asked = np.maximum(parents, 0)
    load = np.bincount(asked.ravel(), weights.ravel(), num_nodes).astype(np.float64)
    pairs = np.bincount(asked.ravel(), wanted.ravel(), num_nodes)
    streams = CONCURRENCY * pairs / num_payloads
    busy = (streams > MAX_STREAMS) | (fetch.up_bps < streams * TRICKLE_BPS)
    load = _relieve(fetch, load, busy)
    drained_s = fetch.now_s + 8.0 * load / fetch.up_bps
    arrived_s = np.stack(
        [
            _arrivals(fetch, tree, place, parent, position, drained_s)
            for tree, place, parent in zip(trees, places, parents, strict=True)
        ]
    )
    received = weights.sum(axis=0)
    down_bps = np.minimum(fetch.down_bps[fetch.receivers], CONCURRENCY * fetch.stream_bps[fetch.receivers])
    rounds_trip_s = -(-num_payloads // CONCURRENCY) * 4.0 * fetch.latency_s[fetch.receivers]
    done_s = np.maximum(arrived_s.max(axis=0), fetch.starts_s + 8.0 * received / down_bps) + rounds_trip_s
    return Fetched(done_s=done_s, sent_bytes=load, received_bytes=received)


def _ring(maker: int, servers: Ints, rank: Floats) -> Ints:
    """The members of a payload's tree by place: place 0 is its maker."""
    members = np.unique(np.append(servers, maker))
    ring = members[np.argsort(rank[members], kind="stable")]
    start = int(np.flatnonzero(ring == maker)[0])
    return np.concatenate([ring[start:], ring[:start]])


def _choose_parents(fetch: Fetch, tree: Ints, position: Ints, rng: np.random.Generator) -> Ints:
    """int64 (R,): the place in the tree that each receiver asks; -1 for the maker."""
    count = len(fetch.receivers)
    size = len(tree)
    if fetch.servers_are_seeds:
        parent = rng.integers(1, size, count) if size > 1 else np.zeros(count, np.int64)
    else:
        first_leaf = size // FANOUT
        parent = rng.integers(first_leaf, size, count)
    inside = position[tree]
    own = np.flatnonzero(inside >= 0)
    parent[inside[own]] = (own - 1) // FANOUT
    return parent


def _nodes(fetch: Fetch, tree: Ints, places: Ints) -> Ints:
    """int64 (R,): the node that each receiver asks; the coordinator in the place of a maker that cannot be dialled."""
    nodes = tree.copy()
    if not fetch.dialable[tree[0]]:
        nodes[0] = fetch.coordinator
    return np.where(places < 0, -1, nodes[np.maximum(places, 0)])


def _relieve(fetch: Fetch, load: Floats, busy: NDArray[np.bool_]) -> Floats:
    """Move to the coordinator what nodes with too many streams cannot send by the time that it can."""
    busy = busy & (np.arange(len(load)) != fetch.coordinator)
    if not busy.any():
        return load
    up, coordinator_bps = fetch.up_bps[busy], fetch.up_bps[fetch.coordinator]
    own = load[fetch.coordinator]
    low, high = 0.0, float(np.max(8.0 * load[busy] / up))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        overflow = np.maximum(load[busy] - up * middle / 8.0, 0.0).sum()
        low, high = (low, middle) if 8.0 * (own + overflow) <= coordinator_bps * middle else (middle, high)
    relieved = load.copy()
    relieved[busy] = np.minimum(load[busy], up * high / 8.0)
    relieved[fetch.coordinator] += load[busy].sum() - relieved[busy].sum()
    return relieved


def _arrivals(fetch: Fetch, tree: Ints, places: Ints, parents: Ints, position: Ints, drained_s: Floats) -> Floats:
    """float64 (R,): when each receiver has this payload."""
    at_place = np.full(len(tree), fetch.now_s)
    starts = fetch.starts_s[np.maximum(position[tree], 0)]
    for place in range(1, len(tree)):
        above = (place - 1) // FANOUT
        source = tree[above] if above or fetch.dialable[tree[0]] else fetch.coordinator
        hop_s = fetch.latency_s[source] + fetch.latency_s[tree[place]]
        at_place[place] = max(at_place[above], drained_s[source], starts[place]) + hop_s
    hop_s = fetch.latency_s[np.maximum(parents, 0)] + fetch.latency_s[fetch.receivers]
    ready_s = np.maximum(at_place[np.maximum(places, 0)], drained_s[np.maximum(parents, 0)])
    arrived_s = np.maximum(ready_s, fetch.starts_s) + hop_s
    return np.where(places < 0, fetch.starts_s, arrived_s)
