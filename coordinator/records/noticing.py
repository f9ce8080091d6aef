"""What is worth an incident or a mark among a run's events and effects."""

from typing import TYPE_CHECKING, Any

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core.state import LeaseStatus, State
from coordinator.records.work import ASIDE, LATE, VOID

if TYPE_CHECKING:
    from coordinator.records.recorder import Noted, Recorder


def notice(recorder: "Recorder", state: State, noted: "Noted") -> None:
    """Begin and end incidents, and mark what is to be seen on the curves."""
    _notice_event(recorder, state, noted)
    for effect in noted.effects:
        _notice_effect(recorder, state, effect, noted)


def _notice_event(recorder: "Recorder", state: State, noted: "Noted") -> None:
    incidents, unix_s = recorder.incidents, noted.unix_s
    match noted.event:
        case ev.PeerJoined(peer=peer) if peer in state.peers and not _is_refused(noted):
            incidents.end(_lost_kind(state, peer), state, unix_s, peer, "it came back")
            recorder.mark("join", f"{_name(state, peer)} joined", peer)
        case ev.PeerLeft(peer=peer) if peer in state.peers:
            _notice_leave(recorder, state, noted.event, unix_s)
        case ev.StateReported(peer=peer) if peer in state.peers and not _resyncs(noted, peer):
            if state.reports.get(peer) == noted.event.digest:
                incidents.end("digest_mismatch", state, unix_s, peer, "it fetched the run's state")
        case ev.PeerBanned(peer=peer):
            recorder.mark("ban", f"{_name(state, peer)} was banned: {noted.event.reason}", peer)
            evidence = {"reason": noted.event.reason}
            action = "its session was closed and its lease went back; it cannot join again"
            incidents.begin("ban", state, unix_s, peer=peer, evidence=evidence, action=action)
        case ev.PeerUnbanned(peer=peer):
            recorder.mark("unban", f"{_name(state, peer)} may join again", peer)
            incidents.end("ban", state, unix_s, peer, "the operator let it join again")
        case ev.PauseRequested(paused=paused):
            recorder.mark("pause" if paused else "resume", f"{'paused' if paused else 'resumed'} by the operator")
        case ev.RoundTimeSet(seconds=seconds):
            words = "as the spec says" if seconds is None else f"{seconds:g} s"
            recorder.mark("operator", f"round time set by the operator: {words}")
        case ev.CoordinatorRestarted() if state.peers:
            _notice_restart(recorder, state, unix_s)


def _notice_leave(recorder: "Recorder", state: State, event: ev.PeerLeft, unix_s: float) -> None:
    peer = state.peers[event.peer]
    recorder.incidents.end("digest_mismatch", state, unix_s, event.peer, "it left")
    if event.reason != ev.SESSION_ENDED or peer.banned or peer.waiting_for_approval:
        recorder.mark("leave", f"{_name(state, event.peer)} left: {event.reason}", event.peer)
        return
    recorder.mark("lost", f"{_name(state, event.peer)} was lost", event.peer)
    lease = state.round.leases.get(event.peer) if state.round else None
    evidence: dict[str, Any] = {"reason": "its session ended without goodbye"}
    if lease is not None:
        evidence |= {"lease_id": lease.lease_id, "lease": lease.status.value, "shards": len(lease.units)}
    silent_s = recorder.read_silence(event.peer)
    if silent_s is not None:
        evidence["seconds_since_last_heartbeat"] = silent_s
    held = lease is not None and lease.status in (LeaseStatus.AWAY, LeaseStatus.COMMITTED)
    is_validator = peer.role == "validator"
    action = "the round goes on without it" if held else "none was needed: it held no lease"
    if is_validator:
        action = "its process is started again; nothing is evaluated meanwhile"
    kind = _lost_kind(state, event.peer)
    is_over = not held and not is_validator
    recorder.incidents.begin(kind, state, unix_s, peer=event.peer, evidence=evidence, action=action, is_over=is_over)


def _notice_restart(recorder: "Recorder", state: State, unix_s: float) -> None:
    recorder.mark("restart", "the coordinator was restarted")
    down_s = max(0.0, unix_s - recorder.last_event_unix_s)
    evidence = {
        "seconds_since_last_event": round(down_s, 1),
        "peers_known": len(state.peers),
        "open_leases": len(state.round.leases) if state.round else 0,
    }
    recorder.incidents.begin(
        "restart",
        state,
        unix_s,
        evidence=evidence,
        action="the journal was replayed; open leases go on",
        since_unix_s=unix_s - down_s,
        is_over=True,
    )


def _notice_effect(recorder: "Recorder", state: State, effect: fx.Effect, noted: "Noted") -> None:
    incidents, unix_s = recorder.incidents, noted.unix_s
    match effect:
        case fx.JudgeContribution(accepted=False) if not effect.reason.startswith((LATE, VOID, ASIDE)):
            evidence = {"reason": effect.reason, "payload_hash": effect.payload_hash}
            if isinstance(noted.event, ev.ContributionCommitted):
                evidence["contribution_hash"] = noted.event.contribution_hash
            action = "it is not merged and earns nothing; its shards go back to the pool"
            incidents.begin("refused", state, unix_s, peer=effect.peer, evidence=evidence, action=action, is_over=True)
        case fx.RequestResync():
            recorder.mark("resync", f"{_name(state, effect.peer)} fetches the state again", effect.peer)
            evidence = {"reason": effect.reason}
            action = "it was told to fetch the run's state again"
            incidents.begin("digest_mismatch", state, unix_s, peer=effect.peer, evidence=evidence, action=action)
        case fx.VoidRound():
            recorder.mark("void", f"round {effect.round} was void: {effect.reason}")
            action = "no manifest; the peers keep their work for the next round"
            incidents.begin("void_round", state, unix_s, evidence={"reason": effect.reason}, action=action)
            _end_losses(recorder, state, unix_s)
        case fx.CloseRound():
            incidents.end("void_round", state, unix_s)
            _end_losses(recorder, state, unix_s)
        case fx.AnnouncePlan():
            recorder.mark("codec", effect.reason)


def _end_losses(recorder: "Recorder", state: State, unix_s: float) -> None:
    """The round that lost workers held up is over; who is still away is missed by nobody."""
    for peer in recorder.incidents.lasting("lost_peer"):
        recorder.incidents.end("lost_peer", state, unix_s, peer, "the round closed without it; its lease went back")


def _is_refused(noted: "Noted") -> bool:
    return any(isinstance(effect, fx.RefusePeer | fx.HoldPeer) for effect in noted.effects)


def _resyncs(noted: "Noted", peer: str) -> bool:
    return any(isinstance(effect, fx.RequestResync) and effect.peer == peer for effect in noted.effects)


def _lost_kind(state: State, peer: str) -> str:
    return "validator_lost" if state.peers[peer].role == "validator" else "lost_peer"


def _name(state: State, peer: str) -> str:
    known = state.peers.get(peer)
    return (known.name if known else "") or peer[-8:]
