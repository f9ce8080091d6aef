"""The coordinator of a virtual run: the real core, and around it what service.py, sessions.py and payloads.py do.

Events reach the core as in the shell: peer input becomes an event, the event goes into the journal, then its effects
are carried out. The journal is the run's trace: `machine.handle` replays it. While the coordinator is down the run's
own clock stands still, as the engine's does.
"""

from typing import IO

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import Phase, State
from simulations.virtual.peers import VirtualPeer, World
from simulations.virtual.recorder import Recorder
from simulations.virtual.sessions import Sessions
from simulations.virtual.validator import Validator
from simulations.virtual.work import Work

WORKER_TOKEN = "workers"  # noqa: S105 - the name of an invite
VALIDATOR_TOKEN = "validator"  # noqa: S105
INSPECT_BPS = 1e9  # bytes of float32 a second of codec.inspect on a server's core


class VirtualCoordinator:
    """Owns the core's state."""

    def __init__(self, world: World, state: State, recorder: Recorder, journal: IO[bytes]) -> None:
        self.state = state
        self.up = True
        self.journal = journal
        self.journal_rows = 0
        self.digests = [world.learner.digest]  # by rounds merged
        self.total_bytes = [0.0]  # of the payloads to merge in rounds 0 to r-1
        self.sessions: Sessions
        self.work: Work
        self.validator = Validator(world, self)
        self._world = world
        self._recorder = recorder
        self._down_s = 0.0
        self._went_down_s = 0.0
        self._last_core_s = 0.0
        self._expected: dict[str, fx.CheckPayload] = {}
        self._revealed: dict[str, str] = {}  # payload -> the peer that revealed it

    def open(self) -> None:
        """Issue the invites, and start the validator."""
        self.send(ev.InviteIssued(token_id=WORKER_TOKEN, uses=len(self._world.peers)))
        if self._world.scenario.validator:
            self.send(ev.InviteIssued(token_id=VALIDATOR_TOKEN, uses=1))
            self.validator.start()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "journal": None}  # a file is opened again by whoever resumes

    # ---- the engine

    @property
    def deadline_s(self) -> float:
        """Virtual time at which the core wants to be woken; infinity when it does not."""
        deadline_s = machine.next_deadline(self.state) if self.up else None
        return float("inf") if deadline_s is None else deadline_s + self._down_s

    def wake(self) -> None:
        self.send(ev.TimerFired())

    def send(self, event: ev.Event) -> None:
        """Journal an event, let the core handle it, carry out the effects."""
        core_s = max(self._world.clock.now_s - self._down_s, self._last_core_s)
        deadline_s = machine.next_deadline(self.state)
        if isinstance(event, ev.TimerFired) and deadline_s is not None:
            core_s = max(core_s, deadline_s)
        self._last_core_s = core_s
        self.journal.write(b'{"now_s":%s,"event":%s}\n' % (repr(core_s).encode(), ev.dump_event(event)))
        self.journal_rows += 1
        self._carry_out(machine.handle(self.state, event, core_s))

    def go_down(self) -> None:
        """The process is killed: sessions end, and what was under way to it is lost."""
        self.up, self._went_down_s = False, self._world.clock.now_s
        self.sessions.lose_coordinator()

    def come_up(self) -> None:
        now_s = self._world.clock.now_s
        self.up = True
        self._down_s += now_s - self._went_down_s
        self.send(ev.CoordinatorRestarted())
        self._expected = {check.payload_hash: check for check in machine.pending_checks(self.state)}
        self.validator.start_again()

    # ---- peer input

    def take_header(self, peer: VirtualPeer, header: ev.ContributionCommitted) -> None:
        """As the service: bytes that were revealed before, or are due from another, count for nobody else."""
        check = self._expected.get(header.payload_hash)
        author = check.peer if check else self._revealed.get(header.payload_hash, peer.id)
        if author != peer.id or (check is None and header.payload_hash in self._revealed and not self._is_open(header)):
            self._recorder.copies_refused += 1
            self.work.take_verdict(peer)
            return
        self.send(header)

    def _is_open(self, header: ev.ContributionCommitted) -> bool:
        round_ = self.state.round
        lease = round_.leases.get(header.peer) if round_ else None
        return bool(lease and lease.candidate and lease.candidate.contribution_hash == header.contribution_hash)

    def take_payload(self, payload_hash: str, norm: float, upload_bps: float) -> None:
        """The payload is here: look inside, which takes a moment. One that nobody waits for is dropped."""
        check = self._expected.pop(payload_hash, None)
        if check is not None:
            self._revealed[payload_hash] = check.peer
            inspect_s = 4.0 * self._world.learner.num_parameters / INSPECT_BPS
            self._world.clock.after(inspect_s, self._checked, check, norm, upload_bps)

    def _checked(self, check: fx.CheckPayload, norm: float, upload_bps: float) -> None:
        if self.up:
            self.send(
                ev.PayloadChecked(peer=check.peer, payload_hash=check.payload_hash, norm=norm, upload_bps=upload_bps)
            )

    # ---- effects

    def _carry_out(self, effects: list[fx.Effect]) -> None:
        grants = [effect for effect in effects if isinstance(effect, fx.GrantLease)]
        orders = [effect for effect in effects if isinstance(effect, fx.OrderMerge)]
        for effect in effects:
            match effect:
                case fx.CheckPayload():
                    self._expect(effect)
                case fx.JudgeContribution():
                    self._recorder.note_verdict(effect)
                    if not effect.accepted and effect.peer in self._world.by_id:
                        self.work.take_verdict(self._world.by_id[effect.peer])
                case fx.CloseRound():
                    self._close(effect)
                case fx.VoidRound():
                    self._expected.clear()
                    self._recorder.note_void(effect, self._world.clock.now_s)
                case fx.RequestResync():
                    self.sessions.resync(self._world.by_id[effect.peer])
                case fx.AnnouncePhase():
                    self._recorder.note_phase(effect, self._world.clock.now_s)
                case fx.RefusePeer():
                    self.sessions.refuse(self._world.by_id[effect.peer])
        if grants and self.state.round is not None:
            self._recorder.open_round(self.state.round, self._world.clock.now_s)
            self._world.learner.open_round(self.work.take_leases(grants))
        for order in orders:
            self.work.groups.take_order(order)

    def _expect(self, check: fx.CheckPayload) -> None:
        peer = self._world.by_id[check.peer]
        if check.payload_hash in self._revealed:  # it came before the connection broke
            self._expected[check.payload_hash] = check
            self._world.clock.after(0.0, self.take_payload, check.payload_hash, peer.norm, 0.0)
            return
        self._expected[check.payload_hash] = check
        self.work.reveal(peer, check)

    def _close(self, closed: fx.CloseRound) -> None:
        self._expected.clear()
        learner = self._world.learner
        learner.close_round(closed)
        self.digests.append(learner.digest)
        payloads = closed.groups or closed.credits
        self.total_bytes.append(self.total_bytes[-1] + sum(payload.payload_bytes for payload in payloads))
        loss = self.validator.evaluate(closed.round + 1)
        self._recorder.close_round(closed, loss, self._world.clock.now_s)
        self.work.take_manifest(closed)
        self.validator.merge(closed.round + 1)

    @property
    def finished(self) -> bool:
        return self.state.phase is Phase.FINISHED
