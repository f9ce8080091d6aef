"""What must hold in the core, whatever events come: a model that keeps books from the effects and checks every event.

tests/property/test_core.py says which events come.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis.stateful import RuleBasedStateMachine, invariant

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import leases, machine
from coordinator.core.state import LeaseStatus, PeerStatus, Phase, Round, Unit, dump_state, load_state
from tests.core_run import CoreRun, outstanding


def frozen(round_: Round) -> dict[str, Any]:
    """What may not change while a round is open."""
    return {
        "index": round_.index,
        "base": round_.base_digest,
        "opened": round_.opened_s,
        "deadline": None if round_.groups else round_.deadline_s,
        "tokens_before": round_.tokens_before,
        "leased_tokens": round_.leased_tokens,
        "plan": round_.plan,
        "members": {name: lease.lease_id for name, lease in round_.leases.items()},
    }


class CoreModel(RuleBasedStateMachine):
    """Remembers what was leased, committed and credited. A subclass makes `run`, then opens the books."""

    run: CoreRun

    def open_books(self, peers: Sequence[str]) -> None:
        self.fresh = dump_state(self.run.fresh_state())
        self.trained: dict[str, list[Unit]] = {name: [] for name in peers}
        self.headers: dict[str, ev.ContributionCommitted] = {}  # the last of each peer that the core took
        self.unjudged: set[tuple[str, str]] = set()  # (peer, payload hash) that the core took and owes a verdict
        self.judged: set[tuple[str, str]] = set()
        self.committed: set[str] = set()  # payload hashes of contributions
        self.orders: dict[str, fx.OrderMerge] = {}  # the last of each peer
        self.lease_ids: set[int] = set()
        self.credited: list[Unit] = []
        self.snapshot: tuple[int, bytes] = (0, self.fresh)

    # ---- one event, and what must be true of its effects

    def send(self, event: ev.Event, after_s: float = 0.0) -> None:
        before = self.run.state.round
        before_frozen = frozen(before) if before else None
        self.run.send(ev.load_event(ev.dump_event(event)), after_s)
        if isinstance(event, ev.ContributionCommitted):
            self.committed.add(event.payload_hash)
            if self.run.find(fx.CheckPayload) or any(judged.accepted for judged in self.run.find(fx.JudgeContribution)):
                self.headers[event.peer] = event
        self.check_rounds(before, before_frozen)
        for effect in self.run.effects:
            self.take(effect)
        if not isinstance(event, ev.CoordinatorRestarted):
            self.check_phase_is_announced()

    def check_rounds(self, before: Round | None, before_frozen: dict[str, Any] | None) -> None:
        after = self.run.state.round
        ends = [effect for effect in self.run.effects if isinstance(effect, (fx.CloseRound, fx.VoidRound))]
        if before is not None and after is before:
            assert not ends
            if not before.groups:  # the deadline is then that of the groups
                assert frozen(before) == before_frozen
            assert self.run.now_s < before.deadline_s, "a round outlived its deadline"
        elif before is not None:
            assert [end.round for end in ends] == [before.index]
        else:
            assert not ends
        grants = {grant.peer: grant for grant in self.run.find(fx.GrantLease)}
        assert len({grant.lease_id for grant in grants.values()} - self.lease_ids) == len(grants)
        self.lease_ids |= {grant.lease_id for grant in grants.values()}
        if after is not None and after is not before:
            self.check_opening(after, grants)
        else:
            assert not grants

    def check_opening(self, round_: Round, grants: dict[str, fx.GrantLease]) -> None:
        state, spec = self.run.state, self.run.spec
        workers = [name for name in state.reports if state.peers[name].role == "worker"]
        holders = [name for name in workers if not state.peers[name].pause_reason]
        assert not state.paused
        assert len(holders) >= spec.round.min_peers
        assert set(state.reports.values()) == {round_.base_digest}
        assert set(grants) == set(round_.leases) <= set(holders)
        assert all(grant.units == tuple(round_.leases[name].units) for name, grant in grants.items())
        assert all(0 < len(grant.units) <= leases.MAX_UNITS for grant in grants.values())
        num_leased = sum(len(grant.units) for grant in grants.values())
        num_contributors = sum(grant.contribute for grant in grants.values())
        assert num_contributors == min(len(grants), spec.exchange.max_contributors) == round_.unsettled
        assert round_.leased_tokens == num_leased * spec.shard_tokens
        assert 0 <= (num_leased - 1) * spec.shard_tokens < spec.train.tokens - state.tokens_credited
        assert round_.deadline_s <= self.run.now_s + 100 * leases.MAX_EXPECTED_S

    def take(self, effect: fx.Effect) -> None:
        """Keep the books, from the effects alone."""
        match effect:
            case fx.GrantLease():
                self.trained[effect.peer] = [*self.trained[effect.peer], *effect.units, *effect.ahead][-50:]
            case fx.CheckPayload() if effect.payload_hash in self.committed:
                self.unjudged |= {(effect.peer, effect.payload_hash)} - self.judged
            case fx.OrderMerge():
                assert {credit.peer for credit in effect.contributions} >= {effect.peer}
                self.orders[effect.peer] = effect
            case fx.JudgeContribution():
                self.judged.add((effect.peer, effect.payload_hash))
                self.unjudged -= self.judged
            case fx.CloseRound():
                assert [(c.payload_hash, c.peer) for c in effect.credits] == sorted(
                    (c.payload_hash, c.peer) for c in effect.credits
                )
                for credit in effect.credits:
                    assert credit.tokens == len(credit.units) * self.run.spec.shard_tokens > 0
                    assert 0.0 < credit.weight <= credit.tokens
                    assert 0.0 < credit.clip <= 1.0
                    self.credited += credit.units
                assert effect.credits
                assert effect.divisor == sum(credit.weight for credit in effect.credits)
                if effect.groups:
                    grouped = sorted(peer for group in effect.groups for peer in group.peers)
                    assert grouped == sorted(credit.peer for credit in effect.credits)
                assert effect.tokens_after == len(self.credited) * self.run.spec.shard_tokens
            case _:
                pass

    def check_phase_is_announced(self) -> None:
        announced = self.run.find(fx.AnnouncePhase)
        assert len(announced) <= 1
        assert all(effect.phase is self.run.state.phase and effect.reason for effect in announced)

    # ---- what a rule may ask

    def names_with(self, *statuses: LeaseStatus) -> list[str]:
        """Peers whose lease of the open round has one of these statuses."""
        round_ = self.run.state.round
        return [name for name, lease in round_.leases.items() if lease.status in statuses] if round_ else []

    def group_checks(self) -> list[fx.CheckPayload]:
        """The merged groups' payloads that are awaited."""
        round_ = self.run.state.round
        return machine.pending_checks(self.run.state) if round_ and round_.groups else []

    # ---- what always holds

    @invariant()
    def every_unit_is_in_one_place(self) -> None:
        pool = self.run.state.pool
        everywhere = Counter([*outstanding(self.run.state), *self.credited])
        assert max(everywhere.values(), default=1) == 1, "a shard is in two places, or credited twice in its pass"
        ahead = leases.take_units(replace(pool, returned=[]), pool.num_shards - pool.cursor)
        issued = {(pass_, i) for pass_ in range(pool.pass_index + 1) for i in range(pool.num_shards)} - set(ahead)
        assert set(everywhere) == issued, "a shard was lost"

    @invariant()
    def credit_adds_up(self) -> None:
        state = self.run.state
        assert state.tokens_credited == len(self.credited) * self.run.spec.shard_tokens
        assert state.tokens_credited == sum(peer.credited_tokens for peer in state.peers.values())
        assert len(self.credited) == sum(peer.credited_shards for peer in state.peers.values())
        assert state.rounds_merged == len(self.run.closed)
        assert [closed.round for closed in self.run.closed] == list(range(state.rounds_merged))

    @invariant()
    def the_next_deadline_is_ahead(self) -> None:
        deadline_s = machine.next_deadline(self.run.state)
        assert deadline_s is None or deadline_s > self.run.now_s, "the shell would spin"

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """A run that could go on is either going on or has a deadline at which it will."""
        state = self.run.state
        reporting = (state.peers[name] for name in state.reports)
        holders = sum(peer.role == "worker" and not peer.pause_reason for peer in reporting)
        if state.round is None and not state.paused and holders >= self.run.spec.round.min_peers:
            assert state.phase is Phase.FINISHED or machine.next_deadline(state) is not None

    @invariant()
    def phases_and_statuses_agree(self) -> None:
        state = self.run.state
        assert (state.phase is Phase.TRAIN) == (state.round is not None)
        assert (state.phase is Phase.FINISHED) == (state.tokens_credited >= self.run.spec.train.tokens)
        assert not (state.phase is Phase.PAUSED and not state.paused)
        ready = {name for name, peer in state.peers.items() if peer.status is PeerStatus.READY}
        assert ready == {*state.reports, *state.awaited}
        assert not set(state.reports) & set(state.awaited)
        if state.round is not None:
            assert set(state.reports.values()) <= {state.round.base_digest}
            assert not state.awaited
            waiting = (LeaseStatus.OPEN, LeaseStatus.COMMITTED)
            unsettled = [lease for lease in state.round.leases.values() if lease.status in waiting]
            assert state.round.unsettled == len(unsettled)
            assert unsettled or not all(group.merged or group.failed for group in state.round.groups)

    @invariant()
    def who_is_banned_or_waits_has_no_part(self) -> None:
        state = self.run.state
        outside = {name for name, peer in state.peers.items() if peer.banned or peer.waiting_for_approval}
        assert not outside & {*state.reports, *state.awaited}
        assert not outside & set(self.names_with(LeaseStatus.OPEN, LeaseStatus.COMMITTED, LeaseStatus.ASIDE))
        banned = [peer for peer in state.peers.values() if peer.banned]
        assert all(peer.status is PeerStatus.GONE for peer in banned)

    @invariant()
    def what_is_committed_is_judged(self) -> None:
        if not self.group_checks():
            checks = {(check.peer, check.payload_hash) for check in machine.pending_checks(self.run.state)}
            assert checks == self.unjudged

    @invariant()
    def the_state_survives_being_written_down(self) -> None:
        assert load_state(dump_state(self.run.state)) == self.run.state

    def teardown(self) -> None:
        """The journal, from the beginning and from a snapshot, gives the same effects and the same state."""
        if not hasattr(self, "run"):
            return
        for start, snapshot in ((0, self.fresh), self.snapshot):
            state = load_state(snapshot)
            for (now_s, event), effects in list(zip(self.run.journal, self.run.trace, strict=True))[start:]:
                assert machine.handle(state, ev.load_event(event), now_s) == effects
            assert state == self.run.state
            assert dump_state(state) == dump_state(self.run.state)
