"""The core under any order of events: workers and a validator that join, vanish, lie and repeat themselves.

Hypothesis drives `machine.handle`; tests/core_model.py has what must hold after every event.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import leases, machine
from coordinator.core.state import LeaseStatus, PeerStatus, Unit, dump_state
from protocol.signing import sha256_hex
from tests.core_model import CoreModel
from tests.core_run import TOKEN, CoreRun, digest_after

WORKERS = ("ann", "bob", "cid", "dot", "eve")
VALIDATOR = "val"
NAMES_LIST = [*WORKERS, VALIDATOR]
NAMES = st.sampled_from(NAMES_LIST)
FAULTS = ["nothing", "again", "lease", "base", "codec", "doubled", "tokens", "foreign", "many"]
PAUSES_S = st.sampled_from([0.0, 0.0, 0.0, 0.5, 0.5, 7.0, 10_000.0])
SPEEDS = st.sampled_from([0.0, 1e-300, 0.01, 1.0, 100.0, 1e308])


class Core(CoreModel):
    """Peers do what they like."""

    @initialize(
        min_peers=st.integers(1, 3),
        quorum_fraction=st.sampled_from([0.0, 0.5, 1.0]),
        shard_steps=st.sampled_from([1, 3]),
        num_shards=st.sampled_from([1, 5, 60]),
        tokens=st.sampled_from([200, 1_000, 1_000_000]),
        max_weight_fraction=st.sampled_from([1.0, 0.3]),
        max_contributors=st.sampled_from([32, 32, 2, 1]),
        overlap=st.booleans(),
        codec=st.sampled_from(["int2", "auto"]),
        group_size=st.sampled_from([0, 0, 1, 2]),
        butterfly=st.sampled_from([False, False, True]),
        approval=st.sampled_from([False, False, True]),
    )
    def begin(self, **drawn: Any) -> None:
        self.run = CoreRun(
            num_shards=drawn["num_shards"],
            data={"sequence_length": 8, "shard_steps": drawn["shard_steps"]},
            train={"tokens": drawn["tokens"], "batch_sequences": 1},
            round={"inner_steps": 4, **{key: drawn[key] for key in ("min_peers", "quorum_fraction")}},
            aggregation={"max_weight_fraction": drawn["max_weight_fraction"]},
            exchange={key: drawn[key] for key in ("max_contributors", "overlap", "group_size")}
            | ({"method": "butterfly"} if drawn["butterfly"] else {"codec": drawn["codec"]}),
        )
        self.open_books(NAMES_LIST)
        self.approval: bool = drawn["approval"]
        self.come_back(names=WORKERS, speed=1.0, right=1)

    # ---- what peers do

    @rule(name=NAMES, after_s=PAUSES_S, which=st.sampled_from(["none", "held", "held", "other"]))
    def join(self, name: str, after_s: float, which: str) -> None:
        held = self.run.granted.get(name)
        lease_id = {"none": None, "held": held.lease_id if held else None, "other": 77}[which]
        role = "validator" if name == VALIDATOR else "worker"
        known = self.run.state.peers.get(name)
        self.send(
            ev.PeerJoined(
                peer=name,
                name=name,
                device="",
                role=role,
                token_id=TOKEN,
                lease_id=lease_id,
                needs_approval=self.approval and role == "worker",
            ),
            after_s,
        )
        assert bool(self.run.find(fx.RefusePeer)) == bool(known and known.banned)
        assert bool(self.run.find(fx.HoldPeer)) == self.run.peer(name).waiting_for_approval
        if which == "none":
            self.trained[name] = []

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        self.send(ev.PeerLeft(peer=name, reason="gone"))

    @rule(name=NAMES, reason=st.sampled_from(["", "", "battery"]))
    def say_availability(self, name: str, reason: str) -> None:
        self.send(ev.AvailabilityReported(peer=name, pause_reason=reason))

    @rule(name=NAMES, speed=SPEEDS, shift=st.sampled_from([0, 0, 0, -1, 1, 2**60]), right=st.sampled_from([1, 1, 1, 0]))
    def report(self, name: str, speed: float, shift: int, right: int) -> None:
        round_ = max(0, self.run.state.rounds_merged + shift)
        digest = digest_after(round_) if right else sha256_hex(b"wrong")
        self.send(ev.StateReported(peer=name, round=round_, digest=digest, claimed_steps_per_s=speed))

    @rule(speed=SPEEDS, right=st.sampled_from([1, 1, 1, 1, 0]), names=st.sampled_from([WORKERS, WORKERS, (VALIDATOR,)]))
    def come_back(self, names: Sequence[str], speed: float, right: int) -> None:
        """Who is gone joins again, and all of `names` report one state."""
        for name in names:
            peer = self.run.state.peers.get(name)
            if peer is None or peer.status is PeerStatus.GONE:
                self.join(name=name, after_s=0.0, which="held")
            self.report(name=name, speed=speed, shift=0, right=right)

    def header(self, name: str, units: Sequence[Unit], **changes: Any) -> ev.ContributionCommitted:
        held = self.run.granted[name]
        content = sha256_hex(repr((name, held.lease_id, units, len(self.run.journal))).encode())
        fields: dict[str, Any] = {
            "lease_id": held.lease_id,
            "base_digest": held.base_digest,
            "tokens": len(units) * self.run.spec.shard_tokens,
            "codec": held.codec,
            **changes,
        }
        return ev.ContributionCommitted(
            peer=name,
            units=tuple(units),
            inner_steps=10**9,
            mean_loss=2.0,
            contribution_hash=content,
            payload_hash=sha256_hex(content.encode()),
            payload_bytes=10,
            **fields,
        )

    @precondition(lambda self: self.names_with(LeaseStatus.OPEN))
    @rule(data=st.data(), after_s=PAUSES_S, with_carried=st.booleans())
    def commit(self, data: st.DataObject, after_s: float, with_carried: bool) -> None:
        name = data.draw(st.sampled_from(self.names_with(LeaseStatus.OPEN)))
        done = data.draw(st.integers(1, len(self.run.granted[name].units)))
        self.send(self.header(name, self.units_of(name, done, with_carried=with_carried)), after_s)

    def units_of(self, name: str, done: int | None, *, with_carried: bool) -> list[Unit]:
        """The first `done` shards of a lease (None: all) and, as an honest peer does, what it trained on before."""
        units = list(self.run.granted[name].units[:done])
        return units + [unit for unit in self.trained[name] if with_carried and unit not in units]

    @precondition(lambda self: self.run.granted)
    @rule(data=st.data(), fault=st.sampled_from(FAULTS))
    def commit_wrongly(self, data: st.DataObject, fault: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.run.granted)))
        held = self.run.granted[name]
        foreign = sorted({unit for other in self.run.granted.values() for unit in other.units}.difference(held.units))
        tokens = (len(held.units) + 1) * self.run.spec.shard_tokens
        is_open = name in self.names_with(LeaseStatus.OPEN)
        header = {
            "again": lambda: self.header(name, [*held.units, *self.trained[name][:1]]),
            "nothing": lambda: self.header(name, foreign),
            "lease": lambda: self.header(name, held.units, lease_id=held.lease_id + 10**6),
            "base": lambda: self.header(name, held.units, base_digest=sha256_hex(b"other")),
            "codec": lambda: self.header(name, held.units, codec="float32"),
            "doubled": lambda: self.header(name, [*held.units, held.units[0]]),
            "tokens": lambda: self.header(name, held.units, tokens=tokens),
            "foreign": lambda: self.header(name, [*held.units, *foreign]),
            "many": lambda: self.header(name, [*held.units, *((9, i) for i in range(2 * leases.MAX_UNITS))]),
        }[fault]()
        self.send(header)
        if fault not in ("foreign", "again") or not is_open:
            assert not self.run.find(fx.CheckPayload)

    @precondition(lambda self: self.headers)
    @rule(data=st.data())
    def send_header_again(self, data: st.DataObject) -> None:
        self.send(self.headers[data.draw(st.sampled_from(sorted(self.headers)))])

    @precondition(lambda self: self.names_with(LeaseStatus.COMMITTED))
    @rule(data=st.data(), refused=st.sampled_from(["", "", "not a payload"]), norm=st.sampled_from([0.0, 1.0, 1e30]))
    def check(self, data: st.DataObject, refused: str, norm: float) -> None:
        name = data.draw(st.sampled_from(self.names_with(LeaseStatus.COMMITTED)))
        hash_ = self.headers[name].payload_hash
        self.send(ev.PayloadChecked(peer=name, payload_hash=hash_, norm=norm, upload_bps=2e6, refused_because=refused))

    @precondition(lambda self: self.headers)
    @rule(data=st.data(), known=st.booleans())
    def check_at_the_wrong_time(self, data: st.DataObject, known: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.headers)))
        hash_ = self.headers[name].payload_hash if known else sha256_hex(b"unknown")
        self.send(ev.PayloadChecked(peer=name, payload_hash=hash_, norm=1.0))

    @precondition(lambda self: self.names_with(LeaseStatus.OPEN))
    @rule(but=st.sampled_from(["", "", "", "ann", "cid"]), merge=st.booleans())
    def almost_all_contribute(self, but: str, merge: bool) -> None:
        for name in self.names_with(LeaseStatus.OPEN):
            if name != but:
                header = self.header(name, self.units_of(name, None, with_carried=True))
                self.send(header, after_s=1.0)
                self.send(ev.PayloadChecked(peer=name, payload_hash=header.payload_hash, norm=1.0))
        if merge:
            if self.names_with(LeaseStatus.OPEN):
                self.fire_timer(share=1.0, spare_s=0.0)
            self.come_back(names=WORKERS, speed=1.0, right=1)

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), what=st.sampled_from(["right", "right", "right", "wrong", "fails", "stale"]))
    def merge_group(self, data: st.DataObject, what: str) -> None:
        """A merger answers: with what the others come to, something else, a failure, or to an older order."""
        order = data.draw(st.sampled_from(list(self.orders.values())))
        content = sha256_hex(f"{order.round}:{order.group}:{order.attempt}".encode())
        merged = {"wrong": sha256_hex(order.peer.encode()), "fails": ""}.get(what, content)
        self.send(
            ev.GroupMerged(
                peer=order.peer,
                round=order.round,
                group=order.group,
                attempt=order.attempt - (what == "stale"),
                payload_hash=merged,
                payload_bytes=10,
                blamed=WORKERS[0] if what == "fails" else "",
            )
        )

    @precondition(lambda self: self.group_checks())
    @rule(data=st.data(), refused=st.sampled_from(["", "", "", "not a payload"]))
    def check_group(self, data: st.DataObject, refused: str) -> None:
        check = data.draw(st.sampled_from(self.group_checks()))
        self.send(
            ev.PayloadChecked(peer=check.peer, payload_hash=check.payload_hash, norm=1.0, refused_because=refused)
        )

    @precondition(lambda self: self.run.granted)
    @rule(data=st.data())
    def return_lease(self, data: st.DataObject) -> None:
        held = self.run.granted[data.draw(st.sampled_from(sorted(self.run.granted)))]
        shift = data.draw(st.sampled_from([0, 0, 1]))
        self.send(ev.LeaseReturned(peer=held.peer, lease_id=held.lease_id + shift, reason="full"))

    @rule(back=st.integers(0, 3), right=st.booleans(), checkpoint=st.booleans())
    def evaluate(self, back: int, right: bool, checkpoint: bool) -> None:
        round_ = max(0, self.run.state.rounds_merged + 1 - back)
        checkpoints = self.run.state.checkpoint_round
        self.send(
            ev.EvaluationReported(
                peer=VALIDATOR,
                round=round_,
                digest=digest_after(round_) if right else sha256_hex(b"wrong"),
                held_out_loss=2.0,
                checkpoint=checkpoint and right,
                report_hash=sha256_hex(b"report"),
            )
        )
        assert checkpoints <= self.run.state.checkpoint_round <= self.run.state.rounds_merged

    # ---- what the coordinator does

    @rule(share=st.sampled_from([0.1, 0.5, 0.9, 1.0, 3.0]), spare_s=PAUSES_S)
    def fire_timer(self, share: float, spare_s: float) -> None:
        """The shell's timer: on time, too early, too late, or when nothing waits for it."""
        deadline_s = machine.next_deadline(self.run.state)
        self.send(ev.TimerFired(), spare_s if deadline_s is None else share * (deadline_s - self.run.now_s))

    @rule(kind=st.sampled_from(["pause", "resume", "resume", "restart", "revoke", "issue", "snapshot", "snapshot"]))
    def operate(self, kind: str) -> None:
        match kind:
            case "pause" | "resume":
                self.send(ev.PauseRequested(paused=kind == "pause"))
            case "restart":
                self.send(ev.CoordinatorRestarted())
            case "revoke":
                self.send(ev.InviteRevoked(token_id="another"))
            case "issue":
                self.send(ev.InviteIssued(token_id="another", uses=1))
            case _:
                self.snapshot = (len(self.run.journal), dump_state(self.run.state))

    @rule(name=NAMES, kind=st.sampled_from(["ban", "unban", "unban", "approve", "approve", "approve"]))
    def judge_peer(self, name: str, kind: str) -> None:
        before = replace(self.run.peer(name)) if name in self.run.state.peers else None
        match kind:
            case "ban":
                round_, kept = self.run.state.round, name in self.names_with(LeaseStatus.ACCEPTED)
                self.send(ev.PeerBanned(peer=name, reason="noise"))
                assert bool(self.run.find(fx.DismissPeer)) == (before is not None and not before.banned)
                if kept and self.run.state.round is round_:
                    assert name in self.names_with(LeaseStatus.ACCEPTED, LeaseStatus.CLOSED)
            case "unban":
                self.send(ev.PeerUnbanned(peer=name))
            case _:
                self.send(ev.PeerApproved(peer=name))
                waited = before is not None and before.waiting_for_approval
                admitted = waited and before is not None and before.status is not PeerStatus.GONE
                assert bool(self.run.find(fx.AdmitPeer)) == admitted

    @rule(seconds=st.sampled_from([None, None, 1.0, 60.0, 3600.0]))
    def set_round_time(self, seconds: float | None) -> None:
        self.send(ev.RoundTimeSet(seconds=seconds))


@pytest.mark.timeout(300)
def test_core_holds_its_invariants_under_any_order_of_events() -> None:
    run_state_machine_as_test(Core, settings=settings(stateful_step_count=60))
