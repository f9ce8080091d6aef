"""Peers: who may join, who holds which state, and which state is the run's.

Each function takes one event and returns its effects. A peer that is READY is either in `reports` (it holds the state
after `rounds_merged` rounds) or in `awaited` (it held the state before, and is merging).
"""

from collections import Counter

from coordinator.core import events as ev
from coordinator.core import groups, leases, rounds
from coordinator.core.effects import (
    AdmitPeer,
    DismissPeer,
    Effect,
    HoldPeer,
    JudgeContribution,
    RefusePeer,
    RequestResync,
)
from coordinator.core.state import InviteRecord, LeaseStatus, Peer, PeerStatus, State


def reference_digest(state: State) -> str | None:
    """The digest that counts as the run's state, or None while nobody has reported any.

    That of the checkpoint when it is of this very round (the initial state is one), else the validator's when it has
    reported, else that of most peers. A manifest that builds on another state could be applied by nobody.
    """
    if state.checkpoint_round == state.rounds_merged:
        return state.checkpoint_digest
    for peer_id, digest in sorted(state.reports.items()):
        if state.peers[peer_id].role == "validator":
            return digest
    tally = Counter(state.reports.values())
    return min(tally, key=lambda digest: (-tally[digest], digest)) if tally else None


def resync_others(state: State, digest: str) -> list[Effect]:
    """Have every peer that holds another state than the run's fetch it again."""
    apart = sorted(peer_id for peer_id, reported in state.reports.items() if reported != digest)
    return [_resync(state, peer_id, state.reports[peer_id], digest) for peer_id in apart]


def _resync(state: State, peer_id: str, held: str, digest: str) -> Effect:
    _drop_report(state, peer_id, PeerStatus.SYNCING)
    reason = f"digest {held[:12]} after {state.rounds_merged} rounds; the run's is {digest[:12]}"
    return RequestResync(peer=peer_id, reason=reason)


def _drop_report(state: State, peer_id: str, status: PeerStatus) -> None:
    state.peers[peer_id].status = status
    state.reports.pop(peer_id, None)
    state.awaited.pop(peer_id, None)


# ---- one function an event


def issue_invite(state: State, event: ev.InviteIssued, _: float) -> list[Effect]:
    state.invites[event.token_id] = InviteRecord(
        uses_left=event.uses,
        role=event.role,
        uses=event.uses,
        issued_unix_s=event.issued_unix_s,
        expires_unix_s=event.expires_unix_s,
    )
    return []


def revoke_invite(state: State, event: ev.InviteRevoked, _: float) -> list[Effect]:
    """Nobody new joins with it. Those who did may come back: a broken connection must not shut them out."""
    if event.token_id in state.invites:
        state.invites[event.token_id].revoked = True
    return []


def join(state: State, event: ev.PeerJoined, now_s: float) -> list[Effect]:
    """Let a peer in, or refuse it. It holds no state until it reports one."""
    known = state.peers.get(event.peer)
    if known is not None and known.banned:
        return [_refuse(event.peer, "banned", _describe_ban(known))]
    if known is None or known.token_id != event.token_id:
        invite = state.invites.get(event.token_id)
        if invite is None or invite.revoked:
            return [_refuse(event.peer, "invite_revoked", "this invite was revoked; ask for a new one")]
        if invite.uses_left < 1:
            return [_refuse(event.peer, "invite_used_up", "this invite is used up; ask for a new one")]
        invite.uses_left -= 1
    if known is None:
        known = state.peers[event.peer] = Peer(
            name=event.name,
            device=event.device,
            role=event.role,
            token_id=event.token_id,
            joined_unix_s=event.unix_s,
            waiting_for_approval=event.needs_approval,
        )
    known.name, known.device, known.token_id, known.role = event.name, event.device, event.token_id, event.role
    known.software, known.pause_reason, known.state_round = event.software, "", -1
    _drop_report(state, event.peer, PeerStatus.SYNCING)
    if known.waiting_for_approval:
        return [HoldPeer(peer=event.peer, reason="waiting for the operator's approval")]
    _restore_lease(state, event)
    return groups.order_again(state, event.peer, now_s)


def _refuse(peer: str, code: str, reason: str) -> Effect:
    return RefusePeer(peer=peer, code=code, reason=reason)


def _restore_lease(state: State, event: ev.PeerJoined) -> None:
    """A peer that comes back in its round goes on with its lease; a lease that it does not know of goes back."""
    round_ = state.round
    lease = round_.leases.get(event.peer) if round_ else None
    if round_ is None or lease is None or lease.status not in (LeaseStatus.OPEN, LeaseStatus.AWAY, LeaseStatus.ASIDE):
        return
    if event.lease_id == lease.lease_id:
        if lease.status is LeaseStatus.ASIDE:
            return
        leases.set_status(round_, lease, LeaseStatus.OPEN)
    else:
        leases.close_lease(state.pool, round_, lease)


def leave(state: State, event: ev.PeerLeft, now_s: float) -> list[Effect]:
    """The round no longer waits for the peer. What it carried is its own until the next round opens without it."""
    if event.peer not in state.peers:
        return []
    state.peers[event.peer].pause_reason = ""
    _drop_report(state, event.peer, PeerStatus.GONE)
    lease = state.round.leases.get(event.peer) if state.round else None
    if state.round is not None and lease is not None and lease.status is LeaseStatus.OPEN:
        leases.set_status(state.round, lease, LeaseStatus.AWAY)
    return groups.leave(state, event.peer, now_s)


def ban(state: State, event: ev.PeerBanned, now_s: float) -> list[Effect]:
    """Nothing more is taken from the peer. What is merged or accepted stays; its other work can be leased again."""
    peer = state.peers.get(event.peer)
    if peer is None or peer.banned:
        return []
    peer.banned, peer.ban_reason, peer.waiting_for_approval = True, event.reason, False
    reason = _describe_ban(peer)
    effects = [DismissPeer(peer=event.peer, code="banned", reason=reason), *_take_lease_back(state, event.peer, reason)]
    leases.release_carried(state.pool, peer)
    return effects + leave(state, ev.PeerLeft(peer=event.peer, reason=reason), now_s)


def _describe_ban(peer: Peer) -> str:
    return "its operator banned it" + (f" ({peer.ban_reason})" if peer.ban_reason else "")


def _take_lease_back(state: State, peer: str, reason: str) -> list[Effect]:
    """Close a lease that is not accepted; a committed contribution is refused."""
    round_ = state.round
    lease = round_.leases.get(peer) if round_ else None
    if round_ is None or lease is None or lease.status is LeaseStatus.ACCEPTED:
        return []
    committed = lease.candidate
    leases.close_lease(state.pool, round_, lease)
    if committed is None:
        return []
    return [JudgeContribution(peer=peer, payload_hash=committed.payload_hash, accepted=False, reason=reason)]


def unban(state: State, event: ev.PeerUnbanned, _: float) -> list[Effect]:
    """The peer may join again."""
    if event.peer in state.peers:
        state.peers[event.peer].banned, state.peers[event.peer].ban_reason = False, ""
    return []


def approve(state: State, event: ev.PeerApproved, _: float) -> list[Effect]:
    """A peer that waits is let in, now or when it joins again."""
    peer = state.peers.get(event.peer)
    if peer is None or not peer.waiting_for_approval:
        return []
    peer.waiting_for_approval = False
    return [] if peer.status is PeerStatus.GONE else [AdmitPeer(peer=event.peer)]


def report_availability(state: State, event: ev.AvailabilityReported, _: float) -> list[Effect]:
    """A paused worker gets no leases, and no round waits for it to merge. What it holds it returns itself."""
    if event.peer in state.peers:
        state.peers[event.peer].pause_reason = event.pause_reason
    return []


def report_state(state: State, event: ev.StateReported, _: float) -> list[Effect]:
    """A peer says which state it holds. The validator's word can end a round that was opened on another state."""
    peer = state.peers.get(event.peer)
    if peer is None or peer.status is PeerStatus.GONE or peer.waiting_for_approval:
        return []
    if not peer.observed and peer.steps_per_s == 0.0:
        peer.steps_per_s = min(max(event.claimed_steps_per_s, 0.0), leases.MAX_CLAIMED_STEPS_PER_S)
    if event.download_bps > 0.0:
        peer.download_bps = event.download_bps
    if 0.0 < event.optimizer_share <= 1.0:
        peer.optimizer_share = event.optimizer_share
    if event.round > state.rounds_merged:
        _drop_report(state, event.peer, PeerStatus.SYNCING)
        reason = f"a state after {event.round} rounds; the run has merged {state.rounds_merged}"
        return [RequestResync(peer=event.peer, reason=reason)]
    peer.state_round = event.round
    if event.round < state.rounds_merged:
        if event.peer not in state.awaited:
            _drop_report(state, event.peer, PeerStatus.SYNCING)
        return []
    peer.status = PeerStatus.READY
    state.awaited.pop(event.peer, None)
    state.reports[event.peer] = event.digest
    round_ = state.round
    if round_ is None or event.digest == round_.base_digest:
        return []
    if peer.role == "validator" and reference_digest(state) == event.digest:
        return rounds.void_round(state, round_, "the validator holds another state than the workers")
    return [_resync(state, event.peer, event.digest, round_.base_digest)]


def restart(state: State, _: ev.CoordinatorRestarted, __: float) -> list[Effect]:
    """Every session is gone. Leases stay open: the peers come back and go on with them."""
    for peer in state.peers.values():
        peer.status = PeerStatus.GONE
    state.reports = {}
    state.awaited = {}
    return []
