"""One round: opened with frozen membership and deadline, filled with contributions, closed by a manifest or void."""

from itertools import islice

from coordinator.core import leases
from coordinator.core.effects import (
    CheckPayload,
    CloseRound,
    Credit,
    Effect,
    GrantLease,
    JudgeContribution,
    VoidRound,
)
from coordinator.core.events import ContributionCommitted, PayloadChecked
from coordinator.core.state import Candidate, LeaseRecord, LeaseStatus, PeerStatus, Phase, Round, State
from protocol.aggregation import Vote, cap_weights, get_rule


def open_round(state: State, base_digest: str, now_s: float) -> list[Effect]:
    """Lease work to the workers that hold `base_digest`, of which there must be one. What the gone carried is free."""
    for peer in state.peers.values():
        if peer.status is PeerStatus.GONE and peer.carried:
            leases.release_carried(state.pool, peer)
    holders = sorted(peer for peer, digest in state.reports.items() if digest == base_digest)
    expected_s, plan = leases.plan_leases(state, [peer for peer in holders if state.peers[peer].role == "worker"])
    spec = state.spec
    num_units = sum(plan.values())
    round_ = Round(
        index=state.rounds_merged,
        base_digest=base_digest,
        opened_s=now_s,
        deadline_s=now_s + expected_s * spec.round.deadline_factor + spec.round.exchange_s,
        expected_s=expected_s,
        tokens_before=state.tokens_credited,
        leased_tokens=num_units * spec.shard_tokens,
        leases={},
        unsettled=len(plan),
    )
    units = iter(leases.take_units(state.pool, num_units))
    for lease_id, (peer_id, shards) in enumerate(plan.items(), state.next_lease_id):
        round_.leases[peer_id] = LeaseRecord(
            lease_id=lease_id,
            peer=peer_id,
            units=list(islice(units, shards)),
            inner_steps=shards * spec.data.shard_steps,
            granted_s=now_s,
        )
    state.next_lease_id += len(plan)
    state.round = round_
    state.phase = Phase.TRAIN
    return [grant_lease(round_, lease, now_s) for lease in round_.leases.values()]


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
    )


def commit_contribution(state: State, event: ContributionCommitted, now_s: float) -> list[Effect]:
    """Take a header into the open round, or refuse it with a reason. The payload is looked at next.

    Shards that are neither of the lease nor carried by the peer earn nothing.
    """
    round_ = state.round
    lease = round_.leases.get(event.peer) if round_ else None
    if round_ is None or lease is None or lease.lease_id != event.lease_id:
        return _refuse(
            state, event, "late: the round of this lease is closed; the work counts with the next contribution"
        )
    if lease.candidate is not None and lease.candidate.contribution_hash == event.contribution_hash:
        return [check_payload(event.peer, lease.candidate)]  # the same header again, after a broken connection
    problem = _find_problem(state, round_, lease, event)
    if problem:
        return _refuse(state, event, problem)
    peer = state.peers[event.peer]
    done = set(event.units)
    lease.candidate = Candidate(
        contribution_hash=event.contribution_hash,
        payload_hash=event.payload_hash,
        payload_bytes=event.payload_bytes,
        codec=event.codec,
        lease_units=[unit for unit in lease.units if unit in done],
        carried_units=[unit for unit in peer.carried if unit in done],
        mean_loss=event.mean_loss,
        pieces_hash=event.pieces_hash,
    )
    leases.set_status(round_, lease, LeaseStatus.COMMITTED)
    peer.carried = [unit for unit in peer.carried if unit not in done]
    leases.release_carried(state.pool, peer)
    # From its shards, not from the header's inner_steps: a speed is never taken from what a peer says of itself.
    leases.observe_speed(peer, len(lease.candidate.lease_units) * state.spec.data.shard_steps, now_s - lease.granted_s)
    return [check_payload(event.peer, lease.candidate)]


def check_payload(peer: str, candidate: Candidate) -> CheckPayload:
    """The effect that has a contribution's payload looked at."""
    return CheckPayload(
        peer=peer,
        payload_hash=candidate.payload_hash,
        payload_bytes=candidate.payload_bytes,
        codec=candidate.codec,
        pieces_hash=candidate.pieces_hash,
    )


def _find_problem(state: State, round_: Round, lease: LeaseRecord, event: ContributionCommitted) -> str:
    """Why this contribution cannot fulfil the lease; empty when it can."""
    if lease.status is not LeaseStatus.OPEN:
        return f"the lease is {lease.status.value} already"
    if event.base_digest != round_.base_digest:
        return "trained from another state than the lease names"
    if len(event.units) > 2 * leases.MAX_UNITS:
        return f"names {len(event.units)} shards; at most {2 * leases.MAX_UNITS} can count"
    if len(set(event.units)) != len(event.units):
        return "names a shard twice"
    if set(lease.units).isdisjoint(event.units):
        return "none of the lease's shards was finished"
    if event.tokens != len(event.units) * state.spec.shard_tokens:
        return "the tokens are not those of its shards"
    return ""


def _refuse(state: State, event: ContributionCommitted, reason: str) -> list[Effect]:
    if event.peer in state.peers:
        state.peers[event.peer].refused += 1
    return [JudgeContribution(peer=event.peer, payload_hash=event.payload_hash, accepted=False, reason=reason)]


def record_check(state: State, event: PayloadChecked) -> list[Effect]:
    """The payload was looked at: it will be merged, or it is refused and its shards go back."""
    round_ = state.round
    lease = round_.leases.get(event.peer) if round_ else None
    if round_ is None or lease is None or lease.candidate is None or lease.status is not LeaseStatus.COMMITTED:
        return []  # checked already, or its round is closed and the peer was told then
    if lease.candidate.payload_hash != event.payload_hash:
        return []
    if event.refused_because:
        leases.close_lease(state.pool, round_, lease)
        state.peers[event.peer].refused += 1
    else:
        leases.set_status(round_, lease, LeaseStatus.ACCEPTED)
        lease.candidate.norm = event.norm
        finished = set(lease.candidate.lease_units)
        state.pool.returned.extend(unit for unit in lease.units if unit not in finished)
        lease.units = lease.candidate.lease_units
    return [
        JudgeContribution(
            peer=event.peer,
            payload_hash=event.payload_hash,
            accepted=not event.refused_because,
            reason=event.refused_because,
        )
    ]


def close_if_due(state: State, now_s: float) -> list[Effect]:
    """Close the open round when every lease is settled, or when its deadline has passed."""
    round_ = state.round
    if round_ is None:
        return []
    if round_.unsettled == 0:
        return _close(state, round_, "every lease is settled", now_s)
    if now_s < round_.deadline_s:
        return []
    for lease in round_.leases.values():
        if lease.status is LeaseStatus.OPEN:
            peer = state.peers[lease.peer]
            leases.observe_speed(peer, lease.inner_steps, 2.0 * (now_s - lease.granted_s))
    effects = _carry_unsettled(state, round_, "late: the payload had not arrived when the round closed")
    return [*effects, *_close(state, round_, "deadline", now_s)]


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


def _close(state: State, round_: Round, because: str, now_s: float) -> list[Effect]:
    accepted = [lease for lease in round_.leases.values() if lease.status is LeaseStatus.ACCEPTED]
    tokens = sum(_tokens(state, lease) for lease in accepted)
    if not accepted:
        return void_round(state, round_, f"no contribution was accepted ({because})")
    if tokens < state.spec.round.quorum_fraction * round_.leased_tokens:
        return void_round(state, round_, f"the quorum was missed ({because})")
    _free_the_away(state, round_)
    credits_ = _weigh(state, accepted)
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
            leased_peers=len(round_.leases),
            closed_because=because,
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


def _tokens(state: State, lease: LeaseRecord) -> int:
    units = lease.candidate.lease_units + lease.candidate.carried_units if lease.candidate else []
    return len(units) * state.spec.shard_tokens


def _weigh(state: State, accepted: list[LeaseRecord]) -> list[Credit]:
    """Weights from verified tokens, capped; clip factors by the run's rule. Canonical order: by payload hash."""
    rule = state.spec.aggregation
    candidates = sorted(
        ((lease, lease.candidate) for lease in accepted if lease.candidate),
        key=lambda pair: (pair[1].payload_hash, pair[0].peer),
    )
    weights = cap_weights([float(_tokens(state, lease)) for lease, _ in candidates], rule.max_weight_fraction)
    votes = [Vote(weight=w, norm=c.norm) for w, (_, c) in zip(weights, candidates, strict=True)]
    clips = get_rule(rule.rule)(votes, rule.clip_factor)
    return [
        Credit(
            peer=lease.peer,
            name=state.peers[lease.peer].name,
            lease_id=lease.lease_id,
            units=(*candidate.lease_units, *candidate.carried_units),
            tokens=_tokens(state, lease),
            contribution_hash=candidate.contribution_hash,
            payload_hash=candidate.payload_hash,
            payload_bytes=candidate.payload_bytes,
            codec=candidate.codec,
            mean_loss=candidate.mean_loss,
            norm=candidate.norm,
            weight=weight,
            clip=clip,
            pieces_hash=candidate.pieces_hash,
        )
        for (lease, candidate), weight, clip in zip(candidates, weights, clips, strict=True)
    ]
