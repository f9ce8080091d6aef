"""Shards and leases: which units come next, how many a peer gets, where they go when a lease ends."""

import hashlib
from math import ceil, gcd
from statistics import median

from coordinator.core.state import LeaseRecord, LeaseStatus, Peer, Round, ShardPool, State, Unit

# A lease is at most so many times the steps of a peer of median speed: one very fast peer must not own a round.
MAX_LEASE_FACTOR = 64
# A peer whose lease was too slow for a round is tried again when its estimate has risen by this each round.
RETRY_GROWTH = 1.25
# Shards in one lease, and shards that one peer carries: a receipt that names both must stay a readable document.
MAX_UNITS = 4096
# Leases are never sized for more compute time: a peer that claims to be slower (or claims nothing) cannot hold a round.
MAX_EXPECTED_S = 3600.0
# Above any machine's speed; keeps sums and products of claims finite.
MAX_CLAIMED_STEPS_PER_S = 1e6
# What a round waits for.
UNSETTLED = (LeaseStatus.OPEN, LeaseStatus.COMMITTED)


def take_units(pool: ShardPool, count: int) -> list[Unit]:
    """The next `count` units; a new pass over the data begins when the current one is used up."""
    units = pool.returned[:count]
    del pool.returned[: len(units)]
    while len(units) < count:
        if pool.cursor == pool.num_shards:
            pool.pass_index += 1
            pool.cursor = 0
        take = min(count - len(units), pool.num_shards - pool.cursor)
        offset, stride = _walk(pool)
        positions = range(pool.cursor, pool.cursor + take)
        units += [(pool.pass_index, (offset + stride * position) % pool.num_shards) for position in positions]
        pool.cursor += take
    return units


def _walk(pool: ShardPool) -> tuple[int, int]:
    """Offset and stride of the pass: an affine walk over all shards, one for each seed and pass.

    The rows inside the shards were shuffled when they were cut.
    """
    n = pool.num_shards
    digest = hashlib.sha256(f"{pool.seed}:{pool.pass_index}".encode()).digest()
    stride = int.from_bytes(digest[:8], "big") % n or 1
    while gcd(stride, n) != 1:
        stride += 1
    return int.from_bytes(digest[8:16], "big") % n, stride


def plan_leases(state: State, peers: list[str], inner_steps: int) -> tuple[float, dict[str, int]]:
    """For peers that hold the state: the compute time to aim for in seconds, and how many shards each gets.

    Time is what a peer of median speed needs for `inner_steps`; a speed that was only claimed has no say in it
    where others were observed. Each peer gets the shards that it finishes in that time at its own speed. One that is
    too slow for a shard by the deadline gets none this time; the peers of median speed and above always get some.
    """
    spec = state.spec
    shard_steps = spec.data.shard_steps
    steps = max(inner_steps, shard_steps)
    speeds = {peer: max(state.peers[peer].steps_per_s, steps / MAX_EXPECTED_S) for peer in peers}
    expected_s = steps / median([speeds[peer] for peer in peers if state.peers[peer].observed] or speeds.values())
    most = min(ceil(inner_steps * MAX_LEASE_FACTOR / shard_steps), MAX_UNITS)
    plan: dict[str, int] = {}
    for peer, speed in speeds.items():
        if shard_steps / speed > expected_s * spec.round.deadline_factor:
            state.peers[peer].steps_per_s = speed * RETRY_GROWTH
            continue
        plan[peer] = min(max(1, round(speed * expected_s / shard_steps)), most)
    return expected_s, _fit_remaining(plan, ceil((spec.train.tokens - state.tokens_credited) / spec.shard_tokens))


def _fit_remaining(plan: dict[str, int], remaining: int) -> dict[str, int]:
    """Shrink the last round to exactly what is left of the run, in proportion; the slowest may get none."""
    total = sum(plan.values())
    if total <= remaining:
        return plan
    fitted: dict[str, int] = {}
    for peer, shards in sorted(plan.items(), key=lambda item: (-item[1], item[0])):
        share = ceil(shards * remaining / total)
        if share == 0:
            break
        fitted[peer] = share
        remaining -= share
        total -= shards
    return fitted


def set_status(round_: Round, lease: LeaseRecord, status: LeaseStatus) -> None:
    """Every change of a lease's status: the round counts those that it waits for."""
    round_.unsettled += (status in UNSETTLED) - (lease.status in UNSETTLED)
    lease.status = status


def close_lease(pool: ShardPool, round_: Round, lease: LeaseRecord, *, carry_to: Peer | None = None) -> None:
    """End a lease without credit. Its units go back to the pool, or stay with the peer that trained on them."""
    if lease.status is LeaseStatus.CLOSED:
        return
    set_status(round_, lease, LeaseStatus.CLOSED)
    candidate, lease.candidate = lease.candidate, None
    units = [*(candidate.carried_units if candidate else []), *lease.units, *lease.ahead]
    if carry_to is None:
        pool.returned.extend(units)
    else:
        carry(pool, carry_to, units)


def carry(pool: ShardPool, peer: Peer, units: list[Unit]) -> None:
    """Units that stay with a peer until its next contribution names them; beyond MAX_UNITS the oldest are freed."""
    kept = [*peer.carried, *units]
    pool.returned.extend(kept[:-MAX_UNITS])
    peer.carried = kept[-MAX_UNITS:]


def release_carried(pool: ShardPool, peer: Peer) -> None:
    """What a peer carried can be leased again."""
    pool.returned.extend(peer.carried)
    peer.carried = []


def observe_speed(peer: Peer, inner_steps: int, elapsed_s: float) -> None:
    """Fold one lease's speed, on the coordinator's clock, into the estimate; the first replaces what was claimed."""
    speed = inner_steps / max(elapsed_s, 1e-6)
    peer.steps_per_s = (peer.steps_per_s + speed) / 2 if peer.observed else speed
    peer.observed = True


def observe_upload(peer: Peer, upload_bps: float) -> None:
    """Fold the speed of one upload into the estimate. 0 says nothing."""
    if upload_bps > 0.0:
        peer.upload_bps = (peer.upload_bps + upload_bps) / 2 if peer.upload_bps else upload_bps
