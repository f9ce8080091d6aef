"""What happened lately, as far as the core's state does not keep it: heartbeats, losses, refusals, void rounds.

Stands between the engine and the sessions, sees every committed event on its way, and passes all of it on. What it
notes is for people who look at the run; nothing is decided by it, and it starts empty with each coordinator.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.engine import Committed
from coordinator.sessions import PeerSession, Sessions
from protocol.wire import coordinator_pb2 as pb

LOOK_EVERY_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Pulse:
    """The last heartbeat of a connected peer; times are monotonic."""

    heartbeat: pb.Heartbeat
    heard_s: float
    moved_s: float  # when its steps, bytes or activity last changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A peer's session ended without goodbye."""

    unix_s: float
    held_lease: bool
    silent_s: float  # since its last heartbeat, when the session ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A refused contribution or a state that differs, with the peer; or a void round, without."""

    kind: str  # refused, resync or void
    unix_s: float
    round: int
    peer: str
    reason: str
    count: int = 1  # void rounds in a row


class Witness:
    """Implements the engine's Carrier around the sessions."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._pulses: dict[str, _Pulse] = {}
        self._losses: dict[str, Loss] = {}
        self._troubles: dict[str, Trouble] = {}  # the last of each kind
        self._holding: set[str] = set()  # peers with a lease to which nothing was committed yet
        self._round = 0

    def carry_out(self, committed: Committed) -> None:
        self._note_event(committed.event)
        for effect in committed.effects:
            self._note_effect(effect)
        self._sessions.carry_out(committed)

    async def keep_looking(self) -> None:
        """Until cancelled: when heartbeats came, to about a second."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """Compare each session's heartbeat with the last one seen."""
        now = time.monotonic()
        for session in self._sessions.connected():
            pulse = self._pulses.get(session.peer)
            if pulse is None:
                self._pulses[session.peer] = _Pulse(heartbeat=session.heartbeat, heard_s=now, moved_s=now)
            elif pulse.heartbeat is not session.heartbeat:  # each one that comes is a new object
                if _progress(pulse.heartbeat) != _progress(session.heartbeat):
                    pulse.moved_s = now
                pulse.heartbeat, pulse.heard_s = session.heartbeat, now

    def describe_connected(self) -> dict[str, dict[str, object]]:
        """`describe_peer` of everybody who is connected."""
        return {session.peer: self.describe_peer(session.peer, session) for session in self._sessions.connected()}

    def silent_s(self, peer: str) -> float | None:
        """Seconds since a peer's last heartbeat, as long as its session, or its end, is in memory."""
        pulse = self._pulses.get(peer)
        return round(time.monotonic() - pulse.heard_s, 1) if pulse else None

    def describe_peer(self, peer: str, session: PeerSession | None) -> dict[str, object]:
        """Plain facts for the status; ages in seconds, None for a peer that is not connected."""
        is_heard = session is not None and not session.waiting  # who waits for approval sends no heartbeats
        pulse = self._pulses.get(peer) if is_heard else None
        loss = self._losses.get(peer)
        now = time.monotonic()
        return {
            "connected": session is not None,
            "activity": session.heartbeat.activity if session else "",
            "bytes_sent": session.heartbeat.bytes_sent if session else 0,
            "inner_step": session.heartbeat.inner_step if session else 0,
            "compression_error": _checked_error(session.heartbeat.compression_error) if session else None,
            "heartbeat_age_s": round(now - pulse.heard_s, 1) if pulse else None,
            "unmoved_s": round(now - pulse.moved_s, 1) if pulse else None,
            "lost": asdict(loss) if loss else None,
        }

    def describe_troubles(self, names: Mapping[str, str]) -> list[dict[str, object]]:
        """The last of each kind, with the peers' names."""
        return [asdict(trouble) | {"name": names.get(trouble.peer, "")} for trouble in self._troubles.values()]

    def _note_event(self, event: ev.Event) -> None:
        match event:
            case ev.PeerJoined():
                self._losses.pop(event.peer, None)
                self._pulses.pop(event.peer, None)
            case ev.PeerLeft():
                self._note_leave(event.peer, said_goodbye=event.reason != ev.SESSION_ENDED)
            case ev.LeaseReturned() | ev.ContributionCommitted():
                self._holding.discard(event.peer)

    def _note_leave(self, peer: str, *, said_goodbye: bool) -> None:
        pulse = self._pulses.pop(peer, None)
        if not said_goodbye:
            silent_s = time.monotonic() - pulse.heard_s if pulse else 0.0
            held_lease = peer in self._holding
            self._losses[peer] = Loss(unix_s=time.time(), held_lease=held_lease, silent_s=round(silent_s, 1))
        self._holding.discard(peer)

    def _note_effect(self, effect: fx.Effect) -> None:
        match effect:
            case fx.GrantLease():
                self._round = effect.round
                self._holding.add(effect.peer)
            case fx.JudgeContribution(accepted=False):
                self._note_trouble("refused", effect.peer, effect.reason)
            case fx.RequestResync():
                self._note_trouble("resync", effect.peer, effect.reason)
            case fx.VoidRound():
                self._holding.clear()
                self._note_trouble("void", "", effect.reason)
            case fx.CloseRound():
                self._holding.clear()
                self._troubles.pop("void", None)

    def _note_trouble(self, kind: str, peer: str, reason: str) -> None:
        before = self._troubles.get(kind)
        self._troubles[kind] = Trouble(
            kind=kind,
            unix_s=time.time(),
            round=self._round,
            peer=peer,
            reason=reason,
            count=before.count + 1 if before else 1,
        )


_ABSENT: dict[str, object] = {
    "connected": False,
    "activity": "",
    "bytes_sent": 0,
    "inner_step": 0,
    "compression_error": None,
    "heartbeat_age_s": None,
    "unmoved_s": None,
    "lost": None,
}


def _checked_error(said: float) -> float | None:
    """What a peer says of its last payload; None before there is one, and for what no codec of ours comes to."""
    return round(said, 4) if 0.0 < said < 100.0 else None


def _progress(heartbeat: pb.Heartbeat) -> tuple[object, ...]:
    return heartbeat.activity, heartbeat.inner_step, heartbeat.bytes_sent, heartbeat.bytes_received
