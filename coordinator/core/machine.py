"""The state machine: `handle(state, event, now_s) -> effects`, and when it wants to be woken next.

    waiting_for_peers -> warmup -> train -> merge -> train -> ... -> finished        (paused from any but finished)

`now_s` is the coordinator's own monotonic time; it never goes back, not even over a restart. The same events at the
same times give the same state and the same effects.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from coordinator.core import events as ev
from coordinator.core import leases, rounds
from coordinator.core.effects import AnnouncePhase, CheckPayload, Effect, RecordEvaluation, RefusePeer, RequestResync
from coordinator.core.state import (
    InviteRecord,
    LeaseStatus,
    Peer,
    PeerStatus,
    Phase,
    ShardPool,
    State,
)
from protocol.run_spec import RunSpec


def create(spec: RunSpec, *, num_shards: int, initial_digest: str) -> State:
    """The state of a run of which only the initial parameters and the shards exist."""
    if num_shards < 1:
        raise ValueError("a run needs at least one shard")
    pool = ShardPool(num_shards=num_shards, seed=spec.seed)
    return State(spec=spec, pool=pool, checkpoint_digest=initial_digest)


def next_deadline(state: State) -> float | None:
    """When TimerFired should come at the latest, or None when only other events matter."""
    if state.round is not None:
        return state.round.deadline_s
    if state.phase is Phase.MERGE:
        return state.merge_deadline_s
    return None


def handle(state: State, event: ev.Event, now_s: float) -> list[Effect]:
    """Change the state by one event and return what has to be done about it."""
    phase = state.phase
    effects: list[Effect] = list(_HANDLERS[type(event)](state, event, now_s))
    effects += rounds.close_if_due(state, now_s)
    effects += _advance(state, now_s)
    if state.phase is not phase:
        effects.append(AnnouncePhase(phase=state.phase, reason=describe_phase(state)))
    return effects


def describe_phase(state: State) -> str:
    """Why the run stands where it stands, in words."""
    live = [p for p in state.peers.values() if p.status is not PeerStatus.GONE and p.role == "worker"]
    ready = sum(p.status is PeerStatus.READY for p in live)
    match state.phase:
        case Phase.WAITING_FOR_PEERS:
            return f"{len(live)} of {state.spec.round.min_peers} workers have joined"
        case Phase.WARMUP:
            return f"{ready} of {state.spec.round.min_peers} workers hold the state"
        case Phase.TRAIN:
            return f"round {state.rounds_merged}: {len(state.round.leases) if state.round else 0} workers have leases"
        case Phase.MERGE:
            return f"{ready} of {len(live)} workers have merged round {state.rounds_merged - 1}"
        case Phase.PAUSED:
            return "paused by the operator"
        case Phase.FINISHED:
            return f"{state.tokens_credited} tokens in {state.rounds_merged} rounds"


def reference_digest(state: State) -> str | None:
    """The digest that counts as the run's: the validator's when it has reported, else that of most peers."""
    for peer_id, digest in sorted(state.reports.items()):
        if state.peers[peer_id].role == "validator":
            return digest
    tally = Counter(digest for _, digest in sorted(state.reports.items()))
    return min(tally, key=lambda digest: (-tally[digest], digest)) if tally else None


def pending_checks(state: State) -> list[CheckPayload]:
    """The payloads that committed contributions of the open round still wait for."""
    open_leases = state.round.leases.values() if state.round else ()
    return [
        rounds.check_payload(lease.peer, lease.candidate)
        for lease in open_leases
        if lease.status is LeaseStatus.COMMITTED and lease.candidate is not None
    ]


def _advance(state: State, now_s: float) -> list[Effect]:
    """Move to the phase that the state calls for; open a round when it can be opened."""
    if state.round is not None or state.phase is Phase.FINISHED:
        return []
    if state.tokens_credited >= state.spec.train.tokens:
        state.phase = Phase.FINISHED
        return []
    if state.paused:
        state.phase = Phase.PAUSED
        return []
    if state.phase is Phase.MERGE and not _merge_is_over(state, now_s):
        return []
    workers = [p for p in state.peers.values() if p.role == "worker" and p.status is not PeerStatus.GONE]
    ready = sum(p.status is PeerStatus.READY for p in workers)
    if ready >= state.spec.round.min_peers:
        return _open(state, now_s)
    joined = len(workers) >= state.spec.round.min_peers
    state.phase = Phase.WARMUP if joined else Phase.WAITING_FOR_PEERS
    return []


def _merge_is_over(state: State, now_s: float) -> bool:
    """Every worker that held the last state holds the new one, or has been waited for long enough."""
    behind = (
        peer
        for peer in state.peers.values()
        if peer.status is PeerStatus.READY and peer.role == "worker" and peer.state_round < state.rounds_merged
    )
    first = next(behind, None)
    if first is None:
        return True
    if state.merge_deadline_s is not None and now_s < state.merge_deadline_s:
        return False
    for peer in (first, *behind):
        peer.status = PeerStatus.SYNCING
    return True


def _open(state: State, now_s: float) -> list[Effect]:
    digest = reference_digest(state)
    if digest is None:
        return []
    effects: list[Effect] = [
        effect for peer_id in sorted(state.reports) for effect in _resync_if_apart(state, peer_id, digest)
    ]
    opened = rounds.open_round(state, digest, now_s)
    if not opened:
        state.phase = Phase.WARMUP
    return effects + opened


def _resync_if_apart(state: State, peer_id: str, digest: str) -> list[Effect]:
    if state.reports.get(peer_id, digest) == digest:
        return []
    mine = state.reports.pop(peer_id)
    state.peers[peer_id].status = PeerStatus.SYNCING
    reason = f"digest {mine[:12]} after round {state.rounds_merged - 1}; the run's is {digest[:12]}"
    return [RequestResync(peer=peer_id, reason=reason)]


# ---- one function an event


def _issue_invite(state: State, event: ev.InviteIssued, _: float) -> list[Effect]:
    state.invites[event.token_id] = InviteRecord(uses_left=event.uses)
    return []


def _revoke_invite(state: State, event: ev.InviteRevoked, _: float) -> list[Effect]:
    if event.token_id in state.invites:
        state.invites[event.token_id].revoked = True
    return []


def _join(state: State, event: ev.PeerJoined, now_s: float) -> list[Effect]:
    invite = state.invites.get(event.token_id)
    known = state.peers.get(event.peer)
    if invite is None or invite.revoked:
        return [_refuse(event.peer, "invite_revoked", "this invite was revoked; ask for a new one")]
    if known is None or known.token_id != event.token_id:
        if invite.uses_left < 1:
            return [_refuse(event.peer, "invite_used_up", "this invite is used up; ask for a new one")]
        invite.uses_left -= 1
    if known is None:
        known = state.peers[event.peer] = Peer(
            name=event.name, device=event.device, role=event.role, token_id=event.token_id
        )
    known.name, known.device, known.token_id, known.role = event.name, event.device, event.token_id, event.role
    known.status = PeerStatus.SYNCING
    known.state_round = -1
    state.reports.pop(event.peer, None)
    return _restore_lease(state, event, now_s)


def _refuse(peer: str, code: str, reason: str) -> Effect:
    return RefusePeer(peer=peer, code=code, reason=reason)


def _restore_lease(state: State, event: ev.PeerJoined, now_s: float) -> list[Effect]:
    """A peer that comes back in its round goes on with its lease; a lease that it does not know of goes back."""
    lease = state.round.leases.get(event.peer) if state.round else None
    if lease is None or state.round is None:
        return []
    if event.lease_id != lease.lease_id:
        if lease.status is LeaseStatus.OPEN:
            leases.close_lease(state.pool, lease)
    elif lease.status is LeaseStatus.CLOSED and set(lease.units) <= set(state.pool.returned):
        taken = set(lease.units)
        state.pool.returned = [unit for unit in state.pool.returned if unit not in taken]
        lease.status = LeaseStatus.OPEN
    return []


def _leave(state: State, event: ev.PeerLeft, _: float) -> list[Effect]:
    peer = state.peers.get(event.peer)
    if peer is None:
        return []
    peer.status = PeerStatus.GONE
    state.reports.pop(event.peer, None)
    leases.release_carried(state.pool, peer)
    lease = state.round.leases.get(event.peer) if state.round else None
    if lease is not None and lease.status is LeaseStatus.OPEN:
        leases.close_lease(state.pool, lease)
    return []


def _report_state(state: State, event: ev.StateReported, _: float) -> list[Effect]:
    peer = state.peers.get(event.peer)
    if peer is None or peer.status is PeerStatus.GONE:
        return []
    peer.state_round, peer.state_digest = event.round, event.digest
    if not peer.observed:
        peer.steps_per_s = max(event.claimed_steps_per_s, 0.0)
    if event.round != state.rounds_merged:
        return []
    if state.round is not None and event.digest != state.round.base_digest:
        peer.status = PeerStatus.SYNCING
        reason = f"digest {event.digest[:12]}; the run's is {state.round.base_digest[:12]}"
        return [RequestResync(peer=event.peer, reason=reason)]
    peer.status = PeerStatus.READY
    state.reports[event.peer] = event.digest
    return []


def _return_lease(state: State, event: ev.LeaseReturned, _: float) -> list[Effect]:
    lease = state.round.leases.get(event.peer) if state.round else None
    if lease is not None and lease.lease_id == event.lease_id and lease.status is LeaseStatus.OPEN:
        leases.close_lease(state.pool, lease)
    return []


def _commit(state: State, event: ev.ContributionCommitted, now_s: float) -> list[Effect]:
    return rounds.commit_contribution(state, event, now_s)


def _check(state: State, event: ev.PayloadChecked, _: float) -> list[Effect]:
    return rounds.record_check(state, event)


def _evaluate(state: State, event: ev.EvaluationReported, _: float) -> list[Effect]:
    peer = state.peers.get(event.peer)
    if peer is None or peer.role != "validator":
        return []
    if event.checkpoint and event.round >= state.checkpoint_round:
        state.checkpoint_round, state.checkpoint_digest = event.round, event.digest
    return [RecordEvaluation(report_hash=event.report_hash)]


def _pause(state: State, event: ev.PauseRequested, _: float) -> list[Effect]:
    state.paused = event.paused
    if not event.paused and state.phase is Phase.PAUSED:
        state.phase = Phase.WAITING_FOR_PEERS
    return []


def _restart(state: State, _: ev.CoordinatorRestarted, __: float) -> list[Effect]:
    for peer in state.peers.values():
        peer.status = PeerStatus.GONE
    state.reports = {}
    return []


def _wake(_: State, __: ev.TimerFired, ___: float) -> list[Effect]:
    return []


_HANDLERS: dict[type, Callable[[State, Any, float], list[Effect]]] = {
    ev.InviteIssued: _issue_invite,
    ev.InviteRevoked: _revoke_invite,
    ev.PeerJoined: _join,
    ev.PeerLeft: _leave,
    ev.StateReported: _report_state,
    ev.LeaseReturned: _return_lease,
    ev.ContributionCommitted: _commit,
    ev.PayloadChecked: _check,
    ev.EvaluationReported: _evaluate,
    ev.TimerFired: _wake,
    ev.PauseRequested: _pause,
    ev.CoordinatorRestarted: _restart,
}
