"""Leases, turns and training of a whole crowd, as coordinator.core.leases sizes them. H: peers that hold the state."""

from dataclasses import dataclass
from math import ceil

import numpy as np

from coordinator.core.leases import MAX_EXPECTED_S, MAX_LEASE_FACTOR, MAX_UNITS, RETRY_GROWTH
from coordinator.core.rounds import AHEAD_FACTOR
from coordinator.core.state import allow_exchange_s
from protocol.policy import ExchangePlan, Links, plan_exchange
from protocol.run_spec import AUTO
from simulations.planned.crowd import Crowd, Floats, Ints
from simulations.planned.site import Site
from simulations.virtual.work import TOKEN_BYTES

ROUNDING = 1e-6  # of a shard: one that ends with the time is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What each leased peer does in a round. Seconds since it opened; L: leases."""

    peers: Ints  # (L,)
    units: Floats  # (L,) shards leased
    expected_s: float
    deadline_s: float
    start_s: Floats  # (L,) when it has its shards
    unit_s: Floats  # (L,) a shard
    done: Floats  # (L,) shards that it finishes, if its session lasts
    finish_s: Floats
    shard_bytes: float  # that the coordinator sends for it


def plan_round(site: Site, crowd: Crowd, holders: Ints, tokens: float) -> ExchangePlan:
    """As coordinator.core.planning: from the medians of what was measured. tokens: of the whole run until now."""
    exchange, inner_steps = site.spec.exchange, site.spec.round.inner_steps
    links = Links(step_s=1.0, upload_bps=None, download_bps=None)
    if exchange.codec == AUTO or inner_steps == AUTO:
        observed = crowd.observed[holders]
        speeds = crowd.steps_per_s[holders[observed] if observed.any() else holders]
        links = Links(
            step_s=1.0 / max(float(np.median(speeds)), 1e-6),
            upload_bps=_median_measured(crowd.upload_bps[holders]),
            download_bps=_median_measured(crowd.download_bps[holders]),
        )
    return plan_exchange(
        num_parameters=site.num_parameters,
        contributors=min(len(holders), exchange.max_contributors),
        links=links,
        share=exchange.share,
        codec=exchange.codec,
        options=exchange.codec_options,
        inner_steps=None if inner_steps == AUTO else inner_steps,
        progress=tokens / site.spec.train.tokens,
        run_steps=site.spec.train.tokens / (site.spec.step_tokens * len(holders)),
        overlap=exchange.overlap,
    )


def _median_measured(bps: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> float | None:
    measured = bps[bps > 0.0]
    return float(np.median(measured)) if len(measured) else None


def train(
    site: Site,
    crowd: Crowd,
    holders: Ints,
    inner_steps: int,
    tokens_left: float,
    rng: np.random.Generator,
    late_rounds: int = 0,
) -> Training:
    """Lease shards to the holders, and say what they come to. late_rounds: as in coordinator.core.state."""
    spec = site.spec
    expected_s, peers, units = _size_leases(site, crowd, holders, inner_steps, tokens_left)
    sizes = units * (spec.shard_tokens * TOKEN_BYTES)
    shard_bytes = float(sizes.sum())
    latency_s = crowd.latency_s[peers].astype(np.float64)
    down_s = 8.0 * sizes / crowd.down_bps[peers]
    start_s = 3.0 * latency_s + np.maximum(down_s, 8.0 * shard_bytes / site.up_bps)
    jitter = np.exp(crowd.jitter[peers] * rng.standard_normal(len(peers), np.float32))
    unit_s = (crowd.step_s[peers] * spec.data.shard_steps * jitter).astype(np.float64)
    limit_s = np.maximum(latency_s + expected_s * spec.round.deadline_factor, start_s)
    done = count_done(limit_s - start_s, unit_s, units)
    return Training(
        peers=peers,
        units=units,
        expected_s=expected_s,
        deadline_s=expected_s * spec.round.deadline_factor + allow_exchange_s(spec.round.exchange_s, late_rounds),
        start_s=start_s,
        unit_s=unit_s,
        done=done,
        finish_s=np.where(done == units, start_s + units * unit_s, limit_s),
        shard_bytes=shard_bytes,
    )


def count_done(seconds: Floats, unit_s: Floats, units: Floats) -> Floats:
    """Whole shards of a lease that are done in so many seconds."""
    return np.floor(np.clip(seconds / unit_s + ROUNDING, 0.0, units))


def _size_leases(
    site: Site, crowd: Crowd, holders: Ints, inner_steps: int, tokens_left: float
) -> tuple[float, Ints, Floats]:
    """Compute time to aim for, who gets a lease, and how many shards; see coordinator.core.leases.plan_leases."""
    spec = site.spec
    shard_steps = spec.data.shard_steps
    steps = max(inner_steps, shard_steps)
    speeds = np.maximum(crowd.steps_per_s[holders], steps / MAX_EXPECTED_S).astype(np.float64)
    observed = crowd.observed[holders]
    expected_s = steps / float(np.median(speeds[observed] if observed.any() else speeds))
    too_slow = shard_steps / speeds > expected_s * spec.round.deadline_factor
    if too_slow.any():
        crowd.steps_per_s[holders[too_slow]] = speeds[too_slow] * RETRY_GROWTH
        holders, speeds = holders[~too_slow], speeds[~too_slow]
    most = min(ceil(inner_steps * MAX_LEASE_FACTOR / shard_steps), MAX_UNITS)
    units = np.clip(np.rint(speeds * expected_s / shard_steps), 1.0, most)
    remaining, total = ceil(tokens_left / spec.shard_tokens), float(units.sum())
    if total > remaining:  # the last round
        order = np.argsort(-units, kind="stable")
        fitted = np.ceil(units[order] * (remaining / total))
        fitted = np.minimum(fitted, np.maximum(remaining - (np.cumsum(fitted) - fitted), 0.0))
        kept = fitted > 0.0
        holders, units = holders[order[kept]], fitted[kept]
    return expected_s, holders, units


def queue_by_turn(crowd: Crowd, peers: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Positions in `peers` of the next `count` contributors: last turn longest ago first, among equals by lot."""
    if count >= len(peers):
        return np.argsort(crowd.last_turn[peers] + rng.random(len(peers)))
    key = crowd.last_turn[peers] + rng.random(len(peers))
    first = np.argpartition(key, count)[:count]
    return first[np.argsort(key[first])]


def count_ahead(site: Site, crowd: Crowd, training: Training, now_s: float) -> Floats:
    """(L,) shards trained ahead: as many as the time since the peer's last lease was long enough for."""
    if not site.spec.exchange.overlap:
        return np.zeros(len(training.peers))
    since_s = crowd.busy_until_s[training.peers]
    idle_s = np.where(since_s > 0.0, np.maximum(now_s - since_s, 0.0), 0.0)
    ahead: Floats = np.minimum(AHEAD_FACTOR * training.units, np.floor(idle_s / training.unit_s))
    return ahead
