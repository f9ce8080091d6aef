"""A run's core under a virtual clock: what the shell and honest workers would do, in as few words as tests need.

run = CoreRun(round={"min_peers": 2})
run.join("ann", "bob")
run.report("ann", "bob")          # both hold the state: a round opens
run.contribute("ann")             # header, and a payload that holds
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import LeaseRecord, LeaseStatus, Peer, State, Unit
from protocol.run_spec import RunSpec, parse_run_spec
from protocol.signing import sha256_hex

E = TypeVar("E")
TOKEN = "token"  # the id of the invite that everybody joins with
SHARD_TOKENS = 8


def small_spec(**sections: dict[str, Any]) -> RunSpec:
    """One shard is one inner step of 8 tokens; ten steps a round; the run is long unless told otherwise."""
    table: dict[str, dict[str, Any]] = {
        "data": {"sequence_length": 8, "shard_steps": 1},
        "train": {"tokens": 1_000_000, "batch_sequences": 1},
        "round": {"inner_steps": 10},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_run_spec(table)


def digest_after(rounds: int) -> str:
    """The digest of the right state after so many rounds, in these tests."""
    return sha256_hex(f"state {rounds}".encode())


class CoreRun:
    """One run's core with its journal. `effects` are those of the last event; `now_s` moves only when told to."""

    def __init__(self, *, num_shards: int = 100, **sections: dict[str, Any]) -> None:
        self.spec = small_spec(**sections)
        self.num_shards = num_shards
        self.state = self.fresh_state()
        self.now_s = 0.0
        self.effects: list[fx.Effect] = []
        self.journal: list[tuple[float, bytes]] = []
        self.trace: list[list[fx.Effect]] = []
        self.granted: dict[str, fx.GrantLease] = {}  # the last lease of each peer
        self.closed: list[fx.CloseRound] = []
        self.send(ev.InviteIssued(token_id=TOKEN, uses=1000))

    def fresh_state(self) -> State:
        return machine.create(
            self.spec, num_shards=self.num_shards, num_parameters=1_000_000, initial_digest=digest_after(0)
        )

    def send(self, event: ev.Event, after_s: float = 0.0) -> list[fx.Effect]:
        """Journal the event and let the core handle it, `after_s` seconds later."""
        self.now_s += after_s
        self.journal.append((self.now_s, ev.dump_event(event)))
        self.effects = machine.handle(self.state, event, self.now_s)
        self.trace.append(self.effects)
        for effect in self.effects:
            if isinstance(effect, fx.GrantLease):
                self.granted[effect.peer] = effect
            if isinstance(effect, fx.CloseRound):
                self.closed.append(effect)
        return self.effects

    def find(self, kind: type[E]) -> list[E]:
        """The last event's effects of one kind."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def peer(self, name: str) -> Peer:
        return self.state.peers[name]

    def lease(self, name: str) -> LeaseRecord:
        assert self.state.round is not None
        return self.state.round.leases[name]

    def num_leased(self) -> dict[str, int]:
        """Shards of each peer's lease in the open round."""
        leases = self.state.round.leases if self.state.round else {}
        return {name: len(lease.units) for name, lease in leases.items()}

    # ---- what peers do

    def start(self, *names: str) -> None:
        """Workers join, and the first round opens with all of them."""
        self.send(ev.PauseRequested(paused=True))
        self.join(*names)
        self.report(*names)
        self.send(ev.PauseRequested(paused=False))
        assert set(self.num_leased()) == set(names)

    def join(
        self,
        *names: str,
        role: str = "worker",
        token_id: str = TOKEN,
        lease_id: int | None = None,
        needs_approval: bool = False,
    ) -> None:
        for name in names:
            self.send(
                ev.PeerJoined(
                    peer=name,
                    name=name,
                    device="",
                    role=role,
                    token_id=token_id,
                    lease_id=lease_id,
                    needs_approval=needs_approval,
                )
            )

    def report(
        self,
        *names: str,
        digest: str | None = None,
        claimed_steps_per_s: float = 1.0,
        optimizer_share: float = 0.0,
    ) -> None:
        """Each says that it holds the state after the last merge: the right one, unless a digest is given."""
        for name in names:
            self.send(
                ev.StateReported(
                    peer=name,
                    round=self.state.rounds_merged,
                    digest=digest or digest_after(self.state.rounds_merged),
                    claimed_steps_per_s=claimed_steps_per_s,
                    optimizer_share=optimizer_share,
                )
            )

    def commit(self, name: str, *, units: Sequence[Unit] | None = None, **changes: Any) -> ev.ContributionCommitted:
        """The header of a contribution to the peer's last lease: all of its shards, unless told otherwise."""
        lease = self.granted[name]
        units = tuple(lease.units if units is None else units)
        header: dict[str, Any] = {
            "lease_id": lease.lease_id,
            "base_digest": lease.base_digest,
            "inner_steps": len(units) * self.spec.data.shard_steps,
            "tokens": len(units) * self.spec.shard_tokens,
            "mean_loss": 2.0,
            "codec": lease.codec,
            "payload_bytes": 100,
            **changes,
        }
        content = sha256_hex(repr((name, units, header)).encode())
        header = {"contribution_hash": content, "payload_hash": sha256_hex(content.encode()), **header}
        committed = ev.ContributionCommitted(peer=name, units=units, **header)
        self.send(committed)
        return committed

    def check(self, name: str, payload_hash: str, refused_because: str = "", norm: float = 1.0) -> None:
        self.send(ev.PayloadChecked(peer=name, payload_hash=payload_hash, norm=norm, refused_because=refused_because))

    def contribute(self, *names: str, units: Sequence[Unit] | None = None, after_s: float = 10.0) -> None:
        """Each commits and reveals, `after_s` seconds from now: one step a second, when ten were leased."""
        self.now_s += after_s
        for name in names:
            self.check(name, self.commit(name, units=units).payload_hash)

    # ---- time

    def wait(self, seconds: float) -> None:
        self.send(ev.TimerFired(), after_s=seconds)

    def wait_for_deadline(self) -> None:
        deadline_s = machine.next_deadline(self.state)
        assert deadline_s is not None
        self.wait(deadline_s - self.now_s)
        self.now_s = deadline_s

    def play_round(self, true_steps_per_s: dict[str, float]) -> None:
        """One round of honest work at these speeds, on the coordinator's clock, and the merge after it.

        A worker stops in time and contributes the shards that it has finished, if any.
        """
        assert self.state.round is not None
        round_ = self.state.round
        opened_s, latest_s = self.now_s, round_.deadline_s - self.spec.round.exchange_s
        moments = []
        for name, lease in round_.leases.items():
            done = min(len(lease.units), int((latest_s - opened_s) * true_steps_per_s[name] + 1e-9))
            moments.append((opened_s + done / true_steps_per_s[name], name, lease.units[:done]))
        for moment_s, name, units in sorted(moments):
            if units:
                self.now_s = moment_s
                self.contribute(name, units=units, after_s=0.0)
        if self.state.round is round_:
            self.wait_for_deadline()
        self.report(*[name for name in true_steps_per_s if name in self.state.peers])


def outstanding(state: State) -> list[Unit]:
    """Every unit that was taken from the pass and is not credited, wherever it is; doubled ones appear twice."""
    units = list(state.pool.returned)
    for peer in state.peers.values():
        units += peer.carried
    for lease in state.round.leases.values() if state.round else ():
        if lease.status is not LeaseStatus.CLOSED:
            units += lease.units + lease.ahead
            units += lease.candidate.carried_units if lease.candidate else []
    return units
