"""The state machine: `handle(state, event, now_s) -> effects`, and when it wants to be woken next.

    waiting_for_peers -> warmup -> train -> merge -> train -> ... -> finished        (paused from any but finished)

`now_s` is the coordinator's own monotonic time; it never goes back, not even over a restart. The same events at the
same times give the same state and the same effects.
"""

from collections.abc import Callable, Collection
from itertools import islice
from typing import Any

from coordinator.core import contributions, groups, leases, peers, rounds
from coordinator.core import events as ev
from coordinator.core.effects import AnnouncePhase, CheckPayload, Effect, RecordEvaluation
from coordinator.core.state import LeaseStatus, Peer, PeerStatus, Phase, ShardPool, State
from protocol.run_spec import RunSpec


def create(spec: RunSpec, *, num_shards: int, num_parameters: int, initial_digest: str) -> State:
    """The state of a run of which only the initial parameters and the shards exist."""
    if num_shards < 1:
        raise ValueError("a run needs at least one shard")
    pool = ShardPool(num_shards=num_shards, seed=spec.seed)
    return State(spec=spec, num_parameters=num_parameters, pool=pool, checkpoint_digest=initial_digest)


def next_deadline(state: State) -> float | None:
    """When TimerFired should come at the latest, or None when only other events matter."""
    if state.round is not None:
        return state.round.deadline_s
    return None if state.phase in (Phase.PAUSED, Phase.FINISHED) else state.wait_until_s


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
    joined = [peer for peer in state.peers.values() if peer.status is not PeerStatus.GONE and peer.role == "worker"]
    here = [peer for peer in joined if not peer.waiting_for_approval]
    num_workers, num_paused = len(here), sum(bool(peer.pause_reason) for peer in here)
    but = f"; {num_paused} paused" if num_paused else ""
    num_waiting = len(joined) - num_workers
    but += f"; {num_waiting} for the operator to approve" if num_waiting else ""
    match state.phase:
        case Phase.WAITING_FOR_PEERS:
            return f"{num_workers} of {state.spec.round.min_peers} workers have joined{but}"
        case Phase.WARMUP:
            return f"{_count_holders(state)} of {state.spec.round.min_peers} workers hold the state{but}"
        case Phase.TRAIN if state.round is not None and state.round.groups:
            merged = sum(group.merged is not None for group in state.round.groups)
            return f"round {state.rounds_merged}: {merged} of {len(state.round.groups)} groups are merged"
        case Phase.TRAIN:
            return f"round {state.rounds_merged}: {len(state.round.leases) if state.round else 0} workers have leases"
        case Phase.MERGE:
            return f"{_count_holders(state)} of {num_workers} workers have merged round {state.rounds_merged - 1}"
        case Phase.PAUSED:
            return "paused by the operator"
        case Phase.FINISHED:
            return f"{state.tokens_credited} tokens in {state.rounds_merged} rounds"


def _count_holders(state: State) -> int:
    """Workers that hold some state after `rounds_merged` rounds."""
    return sum(state.peers[peer_id].role == "worker" for peer_id in state.reports)


def pending_checks(state: State) -> list[CheckPayload]:
    """The payloads that committed contributions of the open round, or its groups, still wait for."""
    round_ = state.round
    if round_ is None:
        return []
    checks = [
        contributions.check_payload(round_, lease.peer, lease.candidate)
        for lease in round_.leases.values()
        if lease.status is LeaseStatus.COMMITTED and lease.candidate is not None
    ]
    return checks + [check for group in round_.groups if (check := groups.check_payload(group)) is not None]


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
    wait_is_over = _end_wait(state, now_s)
    if state.phase is Phase.MERGE and not wait_is_over:
        return []
    effects: list[Effect] = []
    digest = peers.reference_digest(state) if wait_is_over and _has_enough(state, state.reports) else None
    if digest is not None:
        effects += peers.resync_others(state, digest)
        if _has_enough(state, state.reports):
            return effects + rounds.open_round(state, digest, now_s)
    state.phase = Phase.WARMUP if _has_enough(state, state.peers) else Phase.WAITING_FOR_PEERS
    return effects


def _has_enough(state: State, peer_ids: Collection[str]) -> bool:
    """Whether so many of these are workers that take leases that a round can open. Looks no further than it must."""
    wanted = state.spec.round.min_peers
    if len(peer_ids) < wanted:
        return False
    some = (state.peers[peer_id] for peer_id in peer_ids)
    here = (peer for peer in some if _takes_leases(peer))
    return sum(1 for _ in islice(here, wanted)) == wanted


def _takes_leases(peer: Peer) -> bool:
    if peer.waiting_for_approval or peer.pause_reason:
        return False
    return peer.role == "worker" and peer.status is not PeerStatus.GONE


def _end_wait(state: State, now_s: float) -> bool:
    """Whether the next round may open: everybody who held the last state holds the new one, or time is up."""
    if state.wait_until_s is None:
        return True
    if now_s < state.wait_until_s and (state.phase is not Phase.MERGE or _is_merging(state)):
        return False
    for peer_id in state.awaited:
        state.peers[peer_id].status = PeerStatus.SYNCING
    state.awaited = {}
    state.wait_until_s = None
    return True


def _is_merging(state: State) -> bool:
    """Whether a worker is awaited; or the validator, when the workers disagree about the new state."""
    if any(_takes_leases(state.peers[peer_id]) for peer_id in state.awaited):
        return True
    return bool(state.awaited) and len(set(state.reports.values())) > 1


# ---- one function an event; those about peers are in peers.py


def _return_lease(state: State, event: ev.LeaseReturned, _: float) -> list[Effect]:
    round_ = state.round
    lease = round_.leases.get(event.peer) if round_ else None
    if round_ is None or lease is None or lease.lease_id != event.lease_id:
        return []
    if lease.status in (LeaseStatus.OPEN, LeaseStatus.ASIDE):
        leases.close_lease(state.pool, round_, lease)
    return []


def _commit(state: State, event: ev.ContributionCommitted, now_s: float) -> list[Effect]:
    return contributions.commit_contribution(state, event, now_s)


def _check(state: State, event: ev.PayloadChecked, _: float) -> list[Effect]:
    return contributions.record_check(state, event)


def _record_group(state: State, event: ev.GroupMerged, now_s: float) -> list[Effect]:
    return groups.record_result(state, event, now_s)


def _evaluate(state: State, event: ev.EvaluationReported, _: float) -> list[Effect]:
    peer = state.peers.get(event.peer)
    if peer is None or peer.role != "validator":
        return []
    if event.checkpoint and state.checkpoint_round <= event.round <= state.rounds_merged:
        state.checkpoint_round, state.checkpoint_digest = event.round, event.digest
    return [RecordEvaluation(report_hash=event.report_hash)]


def _pause(state: State, event: ev.PauseRequested, _: float) -> list[Effect]:
    state.paused = event.paused
    if not event.paused and state.phase is Phase.PAUSED:
        state.phase = Phase.MERGE if state.wait_until_s is not None else Phase.WAITING_FOR_PEERS
    return []


def _set_round_time(state: State, event: ev.RoundTimeSet, _: float) -> list[Effect]:
    state.round_time_s = event.seconds
    return []


def _wake(_: State, __: ev.TimerFired, ___: float) -> list[Effect]:
    return []


_HANDLERS: dict[type, Callable[[State, Any, float], list[Effect]]] = {
    ev.InviteIssued: peers.issue_invite,
    ev.InviteRevoked: peers.revoke_invite,
    ev.PeerJoined: peers.join,
    ev.PeerLeft: peers.leave,
    ev.StateReported: peers.report_state,
    ev.AvailabilityReported: peers.report_availability,
    ev.LeaseReturned: _return_lease,
    ev.ContributionCommitted: _commit,
    ev.PayloadChecked: _check,
    ev.GroupMerged: _record_group,
    ev.EvaluationReported: _evaluate,
    ev.TimerFired: _wake,
    ev.PauseRequested: _pause,
    ev.PeerBanned: peers.ban,
    ev.PeerUnbanned: peers.unban,
    ev.PeerApproved: peers.approve,
    ev.RoundTimeSet: _set_round_time,
    ev.CoordinatorRestarted: peers.restart,
}
