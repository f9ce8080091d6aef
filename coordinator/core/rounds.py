"""One round: opened with frozen membership and deadline, filled with contributions, closed by a manifest or void."""

from dataclasses import replace
from itertools import islice

from coordinator.core import groups, leases
from coordinator.core.credits import count_tokens, find_accepted, weigh
from coordinator.core.effects import (
    AnnouncePlan,
    CloseRound,
    Credit,
    Effect,
    GrantLease,
    JudgeContribution,
    VoidRound,
)
from coordinator.core.planning import choose_contributors, plan_round
from coordinator.core.state import MAX_EXCHANGE_S, LeaseRecord, LeaseStatus, PeerStatus, Phase, Round, State

# With overlap: shards to go on with while a round is exchanged, over those of the lease. What is not needed goes back.
AHEAD_FACTOR = 2


def open_round(state: State, base_digest: str, now_s: float) -> list[Effect]:
    """Lease work to the workers that hold `base_digest` and are not paused, of which there must be one.

    What the gone carried is free.
    """
    for peer in state.peers.values():
        if peer.status is PeerStatus.GONE and peer.carried:
            leases.release_carried(state.pool, peer)
    holders = sorted(peer for peer, digest in state.reports.items() if digest == base_digest)
    workers = [peer for peer in holders if state.peers[peer].role == "worker" and not state.peers[peer].pause_reason]
    plan = plan_round(state, workers)
    expected_s, shards = leases.plan_leases(state, workers, plan.inner_steps)
    contributors = choose_contributors(state, shards)
    spec = state.spec
    num_units = sum(shards.values())
    round_ = Round(
        index=state.rounds_merged,
        base_digest=base_digest,
        opened_s=now_s,
        deadline_s=now_s + expected_s * spec.round.deadline_factor + state.exchange_s,
        expected_s=expected_s,
        tokens_before=state.tokens_credited,
        leased_tokens=num_units * spec.shard_tokens,
        due_tokens=sum(shards[peer] for peer in contributors) * spec.shard_tokens,
        plan=plan,
        leases={},
        unsettled=len(contributors),
    )
    ahead = _count_ahead(state, num_units)
    units = iter(leases.take_units(state.pool, num_units + sum(shards.values()) * ahead))
    for lease_id, (peer_id, count) in enumerate(shards.items(), state.next_lease_id):
        round_.leases[peer_id] = LeaseRecord(
            lease_id=lease_id,
            peer=peer_id,
            units=list(islice(units, count)),
            ahead=list(islice(units, count * ahead)),
            inner_steps=count * spec.data.shard_steps,
            granted_s=now_s,
            status=LeaseStatus.OPEN if peer_id in contributors else LeaseStatus.ASIDE,
        )
        if peer_id in contributors:
            state.peers[peer_id].last_turn = round_.index
    state.next_lease_id += len(shards)
    state.round = round_
    state.phase = Phase.TRAIN
    return [*_announce(state, round_), *(grant_lease(round_, lease, now_s) for lease in round_.leases.values())]


def _count_ahead(state: State, num_units: int) -> int:
    """How many times its lease a peer may train on, while the round is exchanged: nothing in the run's last round."""
    is_last = state.tokens_credited + num_units * state.spec.shard_tokens >= state.spec.train.tokens
    return AHEAD_FACTOR if state.spec.exchange.overlap and not is_last else 0


def _announce(state: State, round_: Round) -> list[Effect]:
    before, state.plan = state.plan, round_.plan
    if before and replace(before, reason="", round_s=None) == replace(round_.plan, reason="", round_s=None):
        return []
    return [AnnouncePlan(round=round_.index, reason=round_.plan.reason)]


def grant_lease(round_: Round, lease: LeaseRecord, now_s: float) -> GrantLease:
    """The effect that hands a lease to its peer."""
    return GrantLease(
        peer=lease.peer,
        lease_id=lease.lease_id,
        round=round_.index,
        base_digest=round_.base_digest,
        units=tuple(lease.units),
        deadline_in_s=round_.deadline_s - now_s,
        tokens_before=round_.tokens_before,
        round_tokens=round_.leased_tokens,
        codec=round_.plan.codec,
        codec_options=round_.plan.options,
        contribute=lease.status is not LeaseStatus.ASIDE,
        ahead=tuple(lease.ahead),
        learning_rate=round_.plan.learning_rate,
        optimizer=round_.plan.optimizer,
    )


def close_if_due(state: State, now_s: float) -> list[Effect]:
    """Close the open round when every lease is settled, or when its deadline has passed."""
    round_ = state.round
    if round_ is None:
        return []
    if round_.groups:
        return _close_groups(state, round_, now_s) if groups.are_settled(round_) or now_s >= round_.deadline_s else []
    if round_.unsettled == 0:
        if now_s <= round_.deadline_s - state.exchange_s / 2.0:
            state.late_rounds = max(0, state.late_rounds - 1)  # half the time for the exchange would have done
        return _settle(state, round_, "every lease is settled", now_s)
    if now_s < round_.deadline_s:
        return []
    for lease in round_.leases.values():
        if lease.status is LeaseStatus.OPEN:
            peer = state.peers[lease.peer]
            leases.observe_speed(peer, lease.inner_steps, 2.0 * (now_s - lease.granted_s))
    is_late = any(lease.status is LeaseStatus.COMMITTED for lease in round_.leases.values())
    effects = _carry_unsettled(state, round_, "late: the payload had not arrived when the round closed")
    effects += _settle(state, round_, "deadline", now_s)
    if is_late and state.phase is Phase.WAITING_FOR_PEERS and state.exchange_s < MAX_EXCHANGE_S:  # void
        state.late_rounds += 1
    return effects


def _carry_unsettled(state: State, round_: Round, reason: str) -> list[Effect]:
    """The round ends without these leases: their peers keep the work, and are told when they had committed it."""
    effects: list[Effect] = []
    for lease in round_.leases.values():
        if lease.status is LeaseStatus.COMMITTED and lease.candidate is not None:
            hash_ = lease.candidate.payload_hash
            effects.append(JudgeContribution(peer=lease.peer, payload_hash=hash_, accepted=False, reason=reason))
        if lease.status in leases.UNSETTLED:
            leases.close_lease(state.pool, round_, lease, carry_to=state.peers[lease.peer])
    return effects


def _settle(state: State, round_: Round, because: str, now_s: float) -> list[Effect]:
    """Nobody is waited for any more: close the round, or merge it in groups first."""
    accepted = find_accepted(round_)
    tokens = sum(count_tokens(state, lease) for lease in accepted)
    if not accepted:
        return void_round(state, round_, f"no contribution was accepted ({because})")
    if tokens < state.spec.round.quorum_fraction * round_.due_tokens:
        return void_round(state, round_, f"the quorum was missed ({because})")
    _free_the_away(state, round_)
    credits_ = weigh(state, accepted)
    if groups.are_needed(state, accepted):
        orders = groups.begin(state, round_, credits_, because, now_s)
        return [*orders, *_close_groups(state, round_, now_s)] if groups.are_settled(round_) else orders
    return _close(state, round_, credits_, because, now_s)


def _close_groups(state: State, round_: Round, now_s: float) -> list[Effect]:
    """Close with the groups that are merged; the others' peers keep their work."""
    credits_ = weigh(state, find_accepted(round_))
    merged = {peer for group in round_.groups if group.merged is not None for peer in group.peers}
    if not merged:
        return void_round(state, round_, "no group could be merged")
    for credit in credits_:
        if credit.peer not in merged:
            leases.close_lease(state.pool, round_, round_.leases[credit.peer], carry_to=state.peers[credit.peer])
    credits_ = [credit for credit in credits_ if credit.peer in merged]
    return _close(state, round_, credits_, round_.because, now_s)


def _close(state: State, round_: Round, credits_: list[Credit], because: str, now_s: float) -> list[Effect]:
    _carry_on(state, round_)
    tokens = sum(credit.tokens for credit in credits_)
    for credit in credits_:
        peer = state.peers[credit.peer]
        peer.credited_tokens += credit.tokens
        peer.credited_shards += len(credit.units)
        peer.accepted += 1
    state.tokens_credited += tokens
    state.rounds_merged += 1
    state.round = None
    state.phase = Phase.MERGE
    state.awaited = dict.fromkeys(state.reports)
    state.reports = {}
    state.wait_until_s = now_s + state.spec.round.merge_timeout_s
    return [
        CloseRound(
            round=round_.index,
            base_digest=round_.base_digest,
            credits=tuple(credits_),
            divisor=sum(credit.weight for credit in credits_),
            groups=groups.describe(round_, credits_),
            leased_peers=len(round_.leases),
            closed_because=because,
            inner_steps=round_.plan.inner_steps,
            plan=round_.plan.reason,
            learning_rate=round_.plan.learning_rate,
            tokens_after=state.tokens_credited,
            opened_s=round_.opened_s,
        )
    ]


def void_round(state: State, round_: Round, reason: str) -> list[Effect]:
    """End the open round without a manifest. The state stays, and so does the work, with the peers that did it.

    Rounds that are void at once, because every peer hands its lease back, do not follow each other without a pause.
    """
    effects = _carry_unsettled(state, round_, f"the round is void: {reason}")
    _free_the_away(state, round_)
    for lease in round_.leases.values():
        leases.close_lease(state.pool, round_, lease, carry_to=state.peers[lease.peer])
    state.round = None
    state.phase = Phase.WAITING_FOR_PEERS
    state.wait_until_s = round_.opened_s + state.spec.round.exchange_s
    return [*effects, VoidRound(round=round_.index, reason=reason)]


def _free_the_away(state: State, round_: Round) -> None:
    for lease in round_.leases.values():
        if lease.status is LeaseStatus.AWAY:
            leases.close_lease(state.pool, round_, lease)


def _carry_on(state: State, round_: Round) -> None:
    """What was trained without being contributed stays with its peer: of those whose turn it was not, and ahead."""
    for lease in round_.leases.values():
        if lease.status is LeaseStatus.ASIDE:
            leases.close_lease(state.pool, round_, lease, carry_to=state.peers[lease.peer])
        elif lease.status is LeaseStatus.ACCEPTED:
            leases.carry(state.pool, state.peers[lease.peer], lease.ahead)
            lease.ahead = []
