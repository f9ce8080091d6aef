"""Some rounds in a row of a crowd that hardly changes meanwhile, or a single one.

The first round's training and merging stand for all of them; who contributes to each, and by when, is told apart.
"""

from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from coordinator.core.leases import MAX_UNITS
from coordinator.core.state import MAX_EXCHANGE_S, allow_exchange_s
from protocol.policy import ExchangePlan
from simulations.planned import playing
from simulations.planned.books import Books, Sampled
from simulations.planned.crowd import Bools, Crowd, Floats, Habits, Ints
from simulations.planned.faults import Faults
from simulations.planned.grouping import Grouped, merge_groups
from simulations.planned.leasing import Training, count_ahead, count_done, plan_round, queue_by_turn, train
from simulations.planned.playing import Merged, Played
from simulations.planned.site import Site

PAUSE_S = 60.0  # where nobody is left to open the next round


@dataclass(slots=True, kw_only=True)
class World:
    """What all blocks of a run share."""

    site: Site
    habits: Habits
    crowd: Crowd
    books: Books
    faults: Faults
    rng: np.random.Generator
    end_s: float
    round_s: float = 0.0  # of the last round
    late_rounds: int = 0  # as in coordinator.core.state


@dataclass(slots=True, kw_only=True)
class _Block:
    plan: ExchangePlan
    training: Training
    ahead: Floats  # (L,) shards trained ahead in its first round
    steady: Bools  # (L,) who takes part in all rounds: has merged when the next one opens
    played: list[Played] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)  # whether each was merged
    left_undone: float = 0.0  # of the last round, when the scenario's time is over before it is
    grouped: Grouped | None = None  # of the first round
    merged: Merged | None = None
    merge_sent_bytes: float = 0.0  # by all peers, in the first round's merge


def play_block(world: World, holders: Ints, now_s: float, rounds: int) -> float:
    """Play up to so many rounds from now on. Returns when the next one may open."""
    site, crowd = world.site, world.crowd
    plan = plan_round(site, crowd, holders, world.books.tokens)
    tokens_left = site.spec.train.tokens - world.books.tokens
    training = train(site, crowd, holders, plan.inner_steps, tokens_left, world.rng, world.late_rounds)
    if not len(training.peers):
        return now_s + PAUSE_S
    block = _Block(
        plan=plan,
        training=training,
        ahead=count_ahead(site, crowd, training, now_s),
        steady=np.ones(len(training.peers), np.bool_),
    )
    count = min(len(training.peers), site.spec.exchange.max_contributors)
    queue = _Queue(queue_by_turn(crowd, training.peers, rounds * count * 3 // 2 + 64, world.rng))
    opened_s = now_s
    while len(block.played) < rounds and opened_s < world.end_s and world.books.tokens < site.spec.train.tokens:
        chosen = queue.take(count, block.steady & (crowd.toggles_s[training.peers] > opened_s))
        if not len(chosen):
            break
        opened_s = _play_round(world, block, chosen, opened_s)
        if not block.counts[-1]:
            break
    if block.played:
        _settle(world, block, now_s)
    what: Sampled | None = None
    if block.grouped is not None and block.merged is not None:
        what = (training, block.ahead, block.played[0], block.grouped, block.merged)
    world.books.sample(crowd, min(opened_s, world.end_s), from_s=now_s, what=what)
    return max(opened_s, now_s + 1.0)


def _play_round(world: World, block: _Block, chosen: Ints, opened_s: float) -> float:
    """One round with these contributors. Returns when the next one opens."""
    site, crowd, books, training = world.site, world.crowd, world.books, block.training
    peers = training.peers[chosen]
    crowd.last_turn[peers] = len(books.rounds)
    carried = np.minimum(crowd.carried[peers] + len(block.played) * training.done[chosen], MAX_UNITS)
    round_ = playing.contribute(site, crowd, world.habits, training, block.plan, chosen, carried, opened_s, world.rng)
    playing.observe(crowd, training, round_, site.spec.data.shard_steps)
    books.coordinator_sent_bytes += training.shard_bytes
    books.coordinator_received_bytes += float(round_.pushed_bytes.sum())
    closed_s = opened_s + round_.closes_s
    allowed_s = allow_exchange_s(site.spec.round.exchange_s, world.late_rounds)
    if round_.closes_s <= training.deadline_s - allowed_s / 2.0:
        world.late_rounds = max(0, world.late_rounds - 1)
    if not playing.is_void(site, round_):
        grouped = merge_groups(site, crowd, peers[round_.accepted], block.plan, world.rng)
        round_ = playing.leave_out(round_, training, grouped.left_out)
        closed_s += grouped.seconds
    closed_s += world.faults.delay_s(opened_s, closed_s)
    is_over = closed_s > world.end_s
    block.played.append(round_)
    block.counts.append(not is_over and not playing.is_void(site, round_))
    if is_over:
        block.left_undone = (closed_s - world.end_s) / (closed_s - opened_s)
        return world.end_s
    if not block.counts[-1]:
        books.voids += 1
        is_late = round_.because == "deadline" and bool((round_.committed & ~round_.accepted).any())
        world.late_rounds += is_late and allowed_s < MAX_EXCHANGE_S
        return max(closed_s, opened_s + site.spec.round.exchange_s)
    books.note_round(round_, block.plan, grouped, opened_s=opened_s, closed_s=closed_s, leased=len(training.peers))
    opens_s = _merge(world, block, grouped, closed_s)
    books.rounds[-1]["merged_s"] = opens_s if opens_s <= world.end_s else None
    world.round_s = opens_s - opened_s
    return opens_s


def _merge(world: World, block: _Block, grouped: Grouped, closed_s: float) -> float:
    """Everybody merges; returns when the next round opens. Later rounds of a block are merged like its first."""
    crowd = world.crowd
    if block.merged is None:
        sent_bytes = float(crowd.sent_bytes.sum(dtype=np.float64))
        block.grouped = grouped
        block.merged = playing.merge(world.site, crowd, world.habits, grouped, closed_s, world.rng)
        block.merge_sent_bytes = float(crowd.sent_bytes.sum(dtype=np.float64)) - sent_bytes
        block.steady = crowd.report_s[block.training.peers] <= block.merged.opens_s
    else:  # by other servers than the first, so what these send is spread over all
        receivers = block.merged.receivers
        crowd.report_s[receivers] = closed_s + block.merged.took_s
        crowd.received_bytes[receivers] += block.merged.received_bytes
        able = receivers[crowd.dialable[receivers]]
        crowd.sent_bytes[able] += np.float32(block.merge_sent_bytes / max(1, len(able)))
    world.books.coordinator_sent_bytes += block.merged.coordinator_bytes
    gap_s = block.merged.opens_s - block.merged.closed_s
    return closed_s + (gap_s if isfinite(gap_s) else PAUSE_S)


def _settle(world: World, block: _Block, opened_s: float) -> None:
    """Book what the rounds came to for each peer."""
    crowd, training, played = world.crowd, block.training, block.played
    peers = training.peers
    repeats = 1.0 + (len(played) - 1.0) * block.steady - block.left_undone
    until_s = np.minimum(training.finish_s, played[0].trained_s)
    done = count_done(until_s - training.start_s, training.unit_s, training.done)
    done[played[0].contributors] = training.done[played[0].contributors]
    each = done + block.ahead
    lasts_s = np.maximum(crowd.toggles_s[peers] - opened_s, 0.0)
    busy_s = np.minimum(done * training.unit_s, np.maximum(lasts_s - training.start_s, 0.0))
    crowd.compute_s[peers] += repeats * (busy_s + block.ahead * training.unit_s)
    crowd.trained_shards[peers] += np.where(lasts_s >= until_s, repeats * each, 0.0)
    crowd.busy_until_s[peers] = opened_s + sum(round_.closes_s for round_ in played[:-1]) + until_s
    crowd.carried[peers] = np.minimum(crowd.carried[peers] + repeats * each, MAX_UNITS)
    for row, (round_, counts) in enumerate(zip(played, block.counts, strict=True)):
        crowd.sent_bytes[peers[round_.contributors]] += round_.pushed_bytes
        if counts:
            positions = round_.contributors[round_.accepted]
            who = peers[positions]
            later = np.maximum(repeats[positions] - 1.0 - row, 0.0)
            crowd.carried[who] = np.minimum(later * done[positions] + block.ahead[positions], MAX_UNITS)
            crowd.credited_shards[who] += round_.shards[round_.accepted]
            crowd.accepted[who] += 1


class _Queue:
    """Positions in the order of their turns, again and again."""

    def __init__(self, order: Ints) -> None:
        self._order = order
        self._start = 0

    def take(self, count: int, able: Bools) -> Ints:
        """The next `count` of them that are able."""
        turned = np.roll(self._order, -self._start) if self._start else self._order
        found = np.flatnonzero(able[turned])[:count]
        if len(found):
            self._start = (self._start + int(found[-1]) + 1) % len(self._order)
        chosen: Ints = turned[found]
        return chosen
