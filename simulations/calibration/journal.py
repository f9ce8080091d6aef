"""What a run's journal shows: who was here when, and how long each part of each round took.

The journal is replayed through the core, as the coordinator does after a restart, so everything that the core asked for
has its time too. A simulated run leaves the same journal, and is read by the same function.

Times are seconds of the coordinator's own clock from the run's start, which stands still while the coordinator is down.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import Phase, State

REJOIN_S = 30.0  # a connection that is back so soon was the same process: worker/daemon.py pauses no longer


@dataclass(slots=True, kw_only=True)
class SeenLease:
    """A lease and what became of it; header_s and checked_s are None when that was never seen."""

    lease_id: int
    round: int
    granted_s: float
    header_s: float | None = None
    checked_s: float | None = None
    inner_steps: int = 0
    payload_bytes: int = 0
    upload_bps: float = 0.0


@dataclass(slots=True, kw_only=True)
class SeenPeer:
    """One worker."""

    name: str
    device: str
    sessions: list[list[float]] = field(default_factory=list)  # [from, to], or [from] while it is here
    starts_s: list[float] = field(default_factory=list)  # from joining to holding a state
    leases: list[SeenLease] = field(default_factory=list)
    merges_s: list[float] = field(default_factory=list)  # from a round's close to holding the new state
    download_bps: list[float] = field(default_factory=list)  # as it reported
    claimed_steps_per_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class SeenRound:
    """A merged round; next_s: when the one after it was opened."""

    round: int
    opened_s: float
    closed_s: float
    next_s: float | None
    contributions: int
    payload_bytes: int
    codec: str
    inner_steps: int


@dataclass(slots=True, kw_only=True)
class Seen:
    """All of it. peers: workers by id, in the order in which the core deals out leases."""

    peers: dict[str, SeenPeer]
    rounds: list[SeenRound]
    num_void: int
    has_validator: bool
    finished: bool
    tokens: int
    ends_s: float  # of the last event


def read_journal(state: State, events: Iterable[tuple[float, ev.Event]]) -> Seen:
    """Replay (now_s, event) pairs through the core. state: that of the run before the first event; it is changed."""
    reader = _Reader(state)
    for now_s, event in events:
        reader.take(event, now_s)
    return Seen(
        peers=dict(sorted(reader.peers.items())),
        rounds=reader.rounds,
        num_void=reader.num_void,
        has_validator=any(peer.role == "validator" for peer in state.peers.values()),
        finished=state.phase is Phase.FINISHED,
        tokens=state.tokens_credited,
        ends_s=reader.now_s,
    )


class _Reader:
    def __init__(self, state: State) -> None:
        self.peers: dict[str, SeenPeer] = {}
        self.rounds: list[SeenRound] = []
        self.num_void = 0
        self.now_s = 0.0
        self._state = state
        self._preparing: dict[str, float] = {}  # peer -> when it joined
        self._merging: dict[str, float] = {}  # peer -> when the round closed
        self._open: dict[str, SeenLease] = {}  # peer -> its lease in the open round

    def take(self, event: ev.Event, now_s: float) -> None:
        self.now_s = now_s
        effects = machine.handle(self._state, event, now_s)
        match event:
            case ev.PeerJoined(role="worker"):
                if not any(isinstance(effect, fx.RefusePeer) for effect in effects):
                    self._join(event)
            case ev.PeerLeft():
                self._leave(event.peer)
            case ev.CoordinatorRestarted():
                for peer in self.peers:
                    self._leave(peer)
            case ev.StateReported():
                self._report(event)
            case ev.ContributionCommitted():
                self._commit(event, effects)
            case ev.PayloadChecked():
                self._check(event)
        self._take_effects(effects)

    def _join(self, event: ev.PeerJoined) -> None:
        peer = self.peers.setdefault(event.peer, SeenPeer(name=event.name, device=event.device))
        last = peer.sessions[-1] if peer.sessions else None
        if last is not None and len(last) == 1:
            return  # a new connection, before the old one was missed
        if last is not None and self.now_s - last[1] <= REJOIN_S:
            del last[1]
            return
        peer.sessions.append([self.now_s])
        self._preparing[event.peer] = self.now_s

    def _leave(self, peer_id: str) -> None:
        peer = self.peers.get(peer_id)
        if peer is not None and self._state.phase is not Phase.FINISHED and len(peer.sessions[-1]) == 1:
            peer.sessions[-1].append(self.now_s)  # whoever leaves a finished run might have stayed
        self._preparing.pop(peer_id, None)
        self._merging.pop(peer_id, None)

    def _report(self, event: ev.StateReported) -> None:
        peer = self.peers.get(event.peer)
        if peer is None:
            return
        peer.claimed_steps_per_s = peer.claimed_steps_per_s or event.claimed_steps_per_s
        if event.peer in self._preparing:
            peer.starts_s.append(self.now_s - self._preparing.pop(event.peer))
        elif event.round == self._state.rounds_merged and event.peer in self._merging:
            peer.merges_s.append(self.now_s - self._merging.pop(event.peer))
            if event.download_bps > 0.0:
                peer.download_bps.append(event.download_bps)

    def _commit(self, event: ev.ContributionCommitted, effects: list[fx.Effect]) -> None:
        lease = self._open.get(event.peer)
        taken = any(
            isinstance(effect, fx.CheckPayload) or (isinstance(effect, fx.JudgeContribution) and effect.accepted)
            for effect in effects
        )
        if lease is None or not taken or lease.lease_id != event.lease_id or lease.header_s is not None:
            return
        lease.header_s = self.now_s
        lease.inner_steps, lease.payload_bytes = event.inner_steps, event.payload_bytes

    def _check(self, event: ev.PayloadChecked) -> None:
        lease = self._open.get(event.peer)
        if lease is not None and lease.header_s is not None and lease.checked_s is None:
            lease.checked_s, lease.upload_bps = self.now_s, event.upload_bps

    def _take_effects(self, effects: list[fx.Effect]) -> None:
        for effect in effects:
            match effect:
                case fx.GrantLease():
                    lease = SeenLease(lease_id=effect.lease_id, round=effect.round, granted_s=self.now_s)
                    self._open[effect.peer] = lease
                    self.peers[effect.peer].leases.append(lease)
                    if self.rounds and self.rounds[-1].next_s is None:
                        self.rounds[-1].next_s = self.now_s
                case fx.CloseRound():
                    self._close(effect)
                case fx.VoidRound():
                    self.num_void += 1
                    self._open.clear()

    def _close(self, closed: fx.CloseRound) -> None:
        self._open.clear()
        self._merging = dict.fromkeys(self._state.awaited, self.now_s)
        self.rounds.append(
            SeenRound(
                round=closed.round,
                opened_s=closed.opened_s,
                closed_s=self.now_s,
                next_s=None,
                contributions=len(closed.credits),
                payload_bytes=sum(credit.payload_bytes for credit in closed.credits),
                codec=closed.credits[0].codec,
                inner_steps=closed.inner_steps,
            )
        )
