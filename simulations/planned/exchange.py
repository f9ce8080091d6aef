"""How a round's payloads reach a crowd: seconds and bytes.

Up to EXACT_PAIRS pairs of payload and receiver this is simulations.virtual.broadcast itself. Beyond, whoever stands
below the trees is not told apart any more: each place in a tree serves its share of them, and when they have a payload
is drawn from the places' own times. M payloads, R receivers, S servers (peers named for passing payloads on).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.sessions import MAX_PAYLOAD_PEERS
from protocol.exchange.fetch import CONCURRENCY
from protocol.exchange.order import FANOUT
from protocol.exchange.pieces import MAX_STREAMS
from simulations.planned.crowd import Crowd, Floats, Ints
from simulations.planned.site import Site
from simulations.virtual.broadcast import Fetch, plan_fetch

EXACT_PAIRS = 500_000
SAMPLED_PAIRS = 200_000
BISECTIONS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    done_s: Floats  # (R,) when each has all payloads
    received_bytes: Floats  # (R,)
    coordinator_bytes: float  # that the coordinator sent


def fetch_all(
    site: Site,
    crowd: Crowd,
    *,
    makers: Ints,
    size: float,
    receivers: Ints,
    starts_s: Floats,
    closed_s: float,
    exact_pairs: int = EXACT_PAIRS,
    rng: np.random.Generator,
) -> Fetched:
    """Every receiver fetches the payloads, of `size` bytes each, that others made. Adds to what peers sent."""
    dialable = receivers[crowd.dialable[receivers]]
    seeds = dialable[crowd.seeds[dialable]]
    pool = seeds if len(seeds) else dialable
    servers = rng.choice(pool, min(MAX_PAYLOAD_PEERS, len(pool)), replace=False) if len(pool) else pool
    if len(makers) * len(receivers) <= exact_pairs:
        return _fetch_exactly(site, crowd, makers, size, receivers, starts_s, closed_s, servers, len(seeds) > 0, rng)
    arrived_s, coordinator_bytes = _flood(site, crowd, makers, size, servers, len(seeds) > 0, len(receivers), rng)
    own = np.isin(receivers, makers)
    received = size * (len(makers) - own.astype(np.float64))
    latency_s = crowd.latency_s[receivers].astype(np.float64)
    down_bps = np.minimum(crowd.down_bps[receivers], CONCURRENCY * crowd.stream_bps[receivers])
    ready_s = closed_s + arrived_s[rng.integers(len(arrived_s), size=len(receivers))] + latency_s
    done_s = np.maximum(np.maximum(ready_s, starts_s), starts_s + 8.0 * received / down_bps)
    done_s += -(-len(makers) // CONCURRENCY) * 4.0 * latency_s
    return Fetched(done_s=done_s, received_bytes=received, coordinator_bytes=coordinator_bytes)


def _fetch_exactly(
    site: Site,
    crowd: Crowd,
    makers: Ints,
    size: float,
    receivers: Ints,
    starts_s: Floats,
    closed_s: float,
    servers: Ints,
    servers_are_seeds: bool,
    rng: np.random.Generator,
) -> Fetched:
    nodes = np.unique(np.concatenate([receivers, servers, makers]))
    place = np.searchsorted(nodes, receivers)
    fetched = plan_fetch(
        Fetch(
            now_s=closed_s,
            makers=np.searchsorted(nodes, makers).tolist(),
            sizes=np.full(len(makers), size),
            receivers=place,
            starts_s=starts_s,
            servers=np.searchsorted(nodes, servers),
            servers_are_seeds=servers_are_seeds,
            up_bps=np.append(crowd.up_bps[nodes], site.up_bps).astype(np.float64),
            down_bps=np.append(crowd.down_bps[nodes], site.down_bps).astype(np.float64),
            latency_s=np.append(crowd.latency_s[nodes], site.latency_s).astype(np.float64),
            stream_bps=np.append(crowd.stream_bps[nodes], np.inf).astype(np.float64),
            dialable=np.append(crowd.dialable[nodes], True),
            coordinator=len(nodes),
        ),
        rng,
    )
    crowd.sent_bytes[nodes] += fetched.sent_bytes[:-1]
    return Fetched(
        done_s=fetched.done_s,
        received_bytes=fetched.received_bytes,
        coordinator_bytes=float(fetched.sent_bytes[-1]),
    )


def _flood(
    site: Site,
    crowd: Crowd,
    makers: Ints,
    size: float,
    servers: Ints,
    are_seeds: bool,
    num_receivers: int,
    rng: np.random.Generator,
) -> tuple[Floats, float]:
    """Seconds after the close at which some receivers have all payloads, and bytes that the coordinator sends.

    A tree is a row: column 0 is the root, column p the server in place p, in a ring that begins at random.
    """
    num_payloads, num_servers = len(makers), len(servers)
    ring = rng.permutation(num_servers)
    turns = rng.integers(max(num_servers, 1), size=num_payloads)
    trees = ring[(turns[:, None] + np.arange(num_servers)) % max(num_servers, 1)]  # (M, S): positions in `servers`
    guests = _share_guests(num_servers, num_receivers - num_servers, are_seeds)
    children = np.array(
        [sum(FANOUT * p + i <= num_servers for i in range(1, FANOUT + 1)) for p in range(num_servers + 1)]
    )
    copies: Floats = guests + children  # (S + 1,) of one payload, by place
    pairs = np.bincount(trees.ravel(), np.tile(copies[1:], num_payloads), num_servers).astype(np.float64)
    from_maker = crowd.dialable[makers]
    coordinator = size * copies[0] * float(np.count_nonzero(~from_maker))
    up_bps: Floats = crowd.up_bps[servers].astype(np.float64)
    load, coordinator = _relieve(size * pairs, pairs / num_payloads, up_bps, coordinator, site.up_bps)
    crowd.sent_bytes[servers] += load
    crowd.sent_bytes[makers] += size * copies[0] * from_maker
    root_s = np.where(from_maker, 8.0 * size * copies[0] / crowd.up_bps[makers], 8.0 * coordinator / site.up_bps)
    root_latency_s = np.where(from_maker, crowd.latency_s[makers], site.latency_s)
    drained_s = np.column_stack([root_s, (8.0 * load / up_bps)[trees]])  # (M, S + 1), by place
    latency_s = np.column_stack([root_latency_s, crowd.latency_s[servers][trees]]).astype(np.float64)
    at_s = np.zeros_like(drained_s)
    for place in range(1, num_servers + 1):
        above = (place - 1) // FANOUT
        at_s[:, place] = np.maximum(at_s[:, above], drained_s[:, above]) + latency_s[:, above] + latency_s[:, place]
    hosts = np.flatnonzero(guests)
    num_sampled = max(100, SAMPLED_PAIRS // num_payloads)
    drawn = hosts[rng.integers(len(hosts), size=(num_payloads, num_sampled))]
    leaves_s = np.maximum(at_s, drained_s) + latency_s
    return np.take_along_axis(leaves_s, drawn, axis=1).max(axis=0), coordinator


def _share_guests(num_servers: int, num_guests: int, are_seeds: bool) -> Floats:
    """(S + 1,) receivers that ask each place of a tree for its payload; see protocol.exchange.order."""
    guests = np.zeros(num_servers + 1)
    if num_servers == 0:
        guests[0] = num_guests
        return guests
    first = 1 if are_seeds else (num_servers + 1) // FANOUT
    guests[first:] = num_guests / (num_servers + 1 - first)
    return guests


def _relieve(
    load: Floats, streams: Floats, up_bps: Floats, coordinator: float, coordinator_bps: float
) -> tuple[Floats, float]:
    """What is too much for servers with too many streams comes from the coordinator, such that they end together."""
    busy: NDArray[np.bool_] = CONCURRENCY * streams > MAX_STREAMS
    if not busy.any():
        return load, coordinator
    low, high = 0.0, float(np.max(8.0 * load[busy] / up_bps[busy]))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        overflow = np.maximum(load[busy] - up_bps[busy] * middle / 8.0, 0.0).sum()
        low, high = (low, middle) if 8.0 * (coordinator + overflow) <= coordinator_bps * middle else (middle, high)
    relieved = load.copy()
    relieved[busy] = np.minimum(load[busy], up_bps[busy] * high / 8.0)
    return relieved, float(coordinator + load.sum() - relieved.sum())
