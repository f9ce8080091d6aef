"""Contributions to the open round: committed by their header, accepted or refused once the payload was looked at."""

from coordinator.core import groups, leases
from coordinator.core.effects import CheckPayload, Effect, JudgeContribution
from coordinator.core.events import ContributionCommitted, PayloadChecked
from coordinator.core.state import Candidate, LeaseRecord, LeaseStatus, Round, State
from protocol.run_spec import BUTTERFLY


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
        return [_look_at(state, round_, lease, lease.candidate)]  # the same header again, after a broken connection
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
    return [_look_at(state, round_, lease, lease.candidate)]


def _look_at(state: State, round_: Round, lease: LeaseRecord, candidate: Candidate) -> Effect:
    """Have the payload looked at. The butterfly's is never shown: the header alone is accepted."""
    if state.spec.exchange.method != BUTTERFLY:
        return check_payload(round_, lease.peer, candidate)
    leases.set_status(round_, lease, LeaseStatus.ACCEPTED)
    _free_unfinished(state, lease, candidate)
    return JudgeContribution(peer=lease.peer, payload_hash=candidate.payload_hash, accepted=True, reason="")


def _free_unfinished(state: State, lease: LeaseRecord, candidate: Candidate) -> None:
    finished = set(candidate.lease_units)
    state.pool.returned.extend(unit for unit in lease.units if unit not in finished)
    lease.units = candidate.lease_units


def check_payload(round_: Round, peer: str, candidate: Candidate) -> CheckPayload:
    """The effect that has a contribution's payload looked at."""
    return CheckPayload(
        peer=peer,
        payload_hash=candidate.payload_hash,
        payload_bytes=candidate.payload_bytes,
        codec=round_.plan.codec,
        codec_options=round_.plan.options,
        pieces_hash=candidate.pieces_hash,
    )


def _find_problem(state: State, round_: Round, lease: LeaseRecord, event: ContributionCommitted) -> str:
    """Why this contribution cannot fulfil the lease; empty when it can."""
    if lease.status is LeaseStatus.ASIDE:
        return "it is another peer's turn; the work counts with the next contribution"
    if lease.status is not LeaseStatus.OPEN:
        return f"the lease is {lease.status.value} already"
    if event.base_digest != round_.base_digest:
        return "trained from another state than the lease names"
    if event.codec != round_.plan.codec:
        return f"encoded as {event.codec}; this round's codec is {round_.plan.codec}"
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
    if round_ is not None and round_.groups:
        return groups.record_check(round_, event)
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
        leases.observe_upload(state.peers[event.peer], event.upload_bps)
        lease.candidate.norm = event.norm
        _free_unfinished(state, lease, lease.candidate)
    return [
        JudgeContribution(
            peer=event.peer,
            payload_hash=event.payload_hash,
            accepted=not event.refused_because,
            reason=event.refused_because,
        )
    ]
