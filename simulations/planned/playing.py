"""A round from its leases to the next one's opening: who contributes in time, what is credited, how long merging takes.

C: contributors of one round. Seconds count from the round's opening where nothing else is said.
"""

from dataclasses import dataclass, replace
from math import inf

import numpy as np

from protocol.policy import ExchangePlan
from protocol.run_spec import BUTTERFLY
from simulations.planned.crowd import Bools, Crowd, Floats, Habits, Ints
from simulations.planned.exchange import fetch_all
from simulations.planned.grouping import Grouped
from simulations.planned.leasing import Training
from simulations.planned.site import Site
from simulations.time_learner import payload_bytes
from simulations.virtual.coordinator import INSPECT_BPS
from simulations.virtual.merging import DECODE_GAIN, DECODE_GAIN_DENSE


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A round that closed; one without `accepted` is void."""

    contributors: Ints  # (C,) positions in the training's peers
    accepted: Bools  # (C,)
    pushed_bytes: Floats  # (C,) sent to the coordinator
    committed: Bools  # (C,) sent the header
    headers_s: Floats  # (C,)
    push_s: Floats  # (C,) that sending took
    closes_s: float
    trained_s: float  # when the last contributor was done computing
    shards: Floats  # (C,) that each names
    payload_bytes: int
    due_shards: float
    because: str


def contribute(
    site: Site,
    crowd: Crowd,
    habits: Habits,
    training: Training,
    plan: ExchangePlan,
    contributors: Ints,
    carried: Floats,
    opened_s: float,
    rng: np.random.Generator,
) -> Played:
    """The contributors' part. `carried`: (C,) shards that each has from before."""
    peers = training.peers[contributors]
    size = payload_bytes(plan.codec, plan.options, site.num_parameters)
    latency_s = crowd.latency_s[peers].astype(np.float64)
    done, finish_s = training.done[contributors], training.finish_s[contributors]
    headers_s = finish_s + site.float32_bytes / crowd.codec_bps[peers] + latency_s
    push_s: Floats = 8.0 * size / np.minimum(crowd.up_bps[peers], crowd.stream_bps[peers]).astype(np.float64)
    starts_s = headers_s + latency_s
    together_s = float(starts_s.min()) + 8.0 * size * len(peers) / site.down_bps
    pushed_s = np.maximum(starts_s + push_s, together_s if together_s > (starts_s + push_s).max() else 0.0)
    checked_s = pushed_s + site.float32_bytes / INSPECT_BPS
    pushes = 1.0
    if site.spec.exchange.method == BUTTERFLY:  # the header is all that the coordinator gets
        pushes, pushed_s, checked_s = 0.0, headers_s, headers_s
    ends_s = crowd.toggles_s[peers] - opened_s
    abrupt = rng.random(len(peers)) < habits.abrupt[crowd.kind[peers]]
    told_s = ends_s + np.where(abrupt, site.spec.round.heartbeat_timeout_s, latency_s)
    in_time = done > 0.0
    settled_s = np.where(in_time, checked_s, finish_s + latency_s)
    gone = ends_s < np.where(in_time, pushed_s, finish_s)
    # A peer that goes while it sends has committed: the round waits for it until the deadline.
    settled_s = np.where(gone, np.where(in_time & (ends_s >= headers_s), inf, told_s), settled_s)
    last_s = float(settled_s.max())
    closes_s = min(last_s, training.deadline_s)
    accepted = in_time & ~gone & (settled_s <= closes_s)
    shards = done + carried
    return Played(
        contributors=contributors,
        accepted=accepted,
        pushed_bytes=np.where(in_time & ~gone & (pushed_s <= closes_s), pushes * size, 0.0),
        committed=in_time & (ends_s >= headers_s) & (headers_s <= closes_s),
        headers_s=headers_s,
        push_s=push_s,
        closes_s=closes_s,
        trained_s=float(finish_s.max()),
        shards=shards,
        payload_bytes=size,
        due_shards=float(training.units[contributors].sum()),
        because="every lease is settled" if last_s <= training.deadline_s else "deadline",
    )


def is_void(site: Site, played: Played) -> bool:
    """As coordinator.core.rounds: nothing accepted, or less than the quorum."""
    credited = float(played.shards[played.accepted].sum())
    return credited == 0.0 or credited < site.spec.round.quorum_fraction * played.due_shards


def leave_out(played: Played, training: Training, peers: Ints) -> Played:
    """The round without the contributions of these peers."""
    if not len(peers):
        return played
    left = np.isin(training.peers[played.contributors], peers)
    return replace(played, accepted=played.accepted & ~left)


def observe(crowd: Crowd, training: Training, played: Played, shard_steps: int) -> None:
    """What the coordinator learns of the contributors' speeds and links, as coordinator.core.leases folds it in."""
    peers = training.peers[played.contributors]
    steps = training.done[played.contributors] * shard_steps
    elapsed_s = np.maximum(played.headers_s, 1e-6)
    waited_for = ~played.committed & (played.headers_s > played.closes_s) & (played.because == "deadline")
    speed = np.where(played.committed, steps / elapsed_s, 0.0)
    late = training.units[played.contributors] * shard_steps / (2.0 * played.closes_s)
    speed = np.where(waited_for, late, speed)
    told = played.committed | waited_for
    who, speed = peers[told], speed[told]
    crowd.steps_per_s[who] = np.where(crowd.observed[who], (crowd.steps_per_s[who] + speed) / 2, speed)
    crowd.observed[who] = True
    who = peers[played.accepted]
    bps = 8.0 * played.payload_bytes / np.maximum(played.push_s[played.accepted], 1e-6)
    known = crowd.upload_bps[who]
    crowd.upload_bps[who] = np.where(known > 0.0, (known + bps) / 2, bps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """receivers: (R,); seconds each took from the close to its report; when the next round opens."""

    receivers: Ints
    took_s: Floats
    received_bytes: Floats
    closed_s: float
    opens_s: float
    coordinator_bytes: float


def merge(
    site: Site,
    crowd: Crowd,
    habits: Habits,
    grouped: Grouped,
    closed_s: float,
    rng: np.random.Generator,
) -> Merged:
    """Everybody who follows fetches and merges; the round after opens when all awaited have, or time is up."""
    here = crowd.online & (crowd.toggles_s > closed_s)
    receivers = np.flatnonzero(here & (crowd.synced_s <= closed_s))
    latency_s = crowd.latency_s[receivers]
    reported_s = crowd.report_s[receivers]
    starts_s = np.maximum(closed_s + latency_s, reported_s - latency_s)
    fetched = fetch_all(
        site,
        crowd,
        makers=grouped.makers,
        size=grouped.size,
        receivers=receivers,
        starts_s=starts_s,
        closed_s=closed_s,
        rng=rng,
    )
    gain = DECODE_GAIN.get(grouped.codec, DECODE_GAIN_DENSE)
    decode_s = site.float32_bytes * len(grouped.makers) / (gain * crowd.codec_bps[receivers])
    crowd.received_bytes[receivers] += fetched.received_bytes
    crowd.download_bps[receivers] = 8.0 * fetched.received_bytes / np.maximum(fetched.done_s - starts_s, 1e-6)
    crowd.report_s[receivers] = fetched.done_s + decode_s + latency_s
    awaited = receivers[reported_s <= closed_s]
    opens_s = _next_opening(site, crowd, habits, awaited, closed_s, rng)
    return Merged(
        receivers=receivers,
        took_s=crowd.report_s[receivers] - closed_s,
        received_bytes=fetched.received_bytes,
        closed_s=closed_s,
        opens_s=opens_s,
        coordinator_bytes=fetched.coordinator_bytes,
    )


def _next_opening(
    site: Site, crowd: Crowd, habits: Habits, awaited: Ints, closed_s: float, rng: np.random.Generator
) -> float:
    spec = site.spec.round
    limit_s = closed_s + spec.merge_timeout_s
    until_s = crowd.report_s[awaited]
    if len(awaited) and float(until_s.max()) > closed_s:
        abrupt = rng.random(len(awaited)) < habits.abrupt[crowd.kind[awaited]]
        gone_s = crowd.toggles_s[awaited] + np.where(abrupt, spec.heartbeat_timeout_s, crowd.latency_s[awaited])
        limit_s = min(limit_s, float(np.minimum(until_s, gone_s).max()))
    return when_enough(site, crowd, limit_s)


def when_enough(site: Site, crowd: Crowd, not_before_s: float) -> float:
    """The earliest moment at which `min_peers` hold the newest state; infinity when it is not known of so many."""
    able = crowd.online & (crowd.toggles_s > crowd.report_s)
    reports_s = crowd.report_s[able]
    wanted = site.spec.round.min_peers
    if np.count_nonzero(reports_s <= not_before_s) >= wanted:
        return not_before_s
    if len(reports_s) < wanted:
        return inf
    return max(not_before_s, float(np.partition(reports_s, wanted - 1)[wanted - 1]))
