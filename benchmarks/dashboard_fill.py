"""Fills a run folder with a long history: the coordinator's own core, ledger and records under a virtual clock.

Everything is signed and chained as in a real run; only the model, the payloads and the time are made up. The journal is
left out but for its end: a snapshot holds the state, so a coordinator starts on the folder as on any other.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tomlkit

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import dump_state
from coordinator.ledger import LedgerWriter
from coordinator.records.recorder import Noted, Recorder, read_on_record
from coordinator.run_folder import InitialModel, RunFolder, prepare
from coordinator.storage.database import Batch, Database, JournalRow, RoundRow
from protocol.documents import Contribution, Genesis, ShardRef, sign
from protocol.identity import Identity
from protocol.signing import Signed, sha256_hex

DEVICES = ("NVIDIA GeForce RTX 4070, 12 GB", "AMD Ryzen 7 7840U, 8 cores", "Apple M3", "NVIDIA H100 PCIe, 80 GB")
TOKEN = "0" * 16
NUM_PARAMETERS = 10_000_000
STEP_S = 0.5  # of a peer of median speed


@dataclass(slots=True, kw_only=True)
class Person:
    """A made-up volunteer."""

    identity: Identity
    name: str
    device: str
    steps_per_s: float


@dataclass(kw_only=True)
class History:
    """What is filled in, and where it stands."""

    folder: RunFolder
    database: Database
    num_peers: int
    online_target: int
    start_unix_s: float
    chance: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 # a simulation, no secret
    now_s: float = 0.0
    journal_seq: int = 0
    online: dict[str, Person] = field(default_factory=dict)
    granted: dict[str, fx.GrantLease] = field(default_factory=dict)
    headers: dict[str, Signed] = field(default_factory=dict)
    batch: Batch = field(default_factory=Batch)

    def begin(self, genesis: Signed) -> None:
        """Peers, state, ledger and records of a run that has just been prepared."""
        self.run = Genesis.model_validate_json(genesis.body)
        self.state = machine.create(
            self.run.spec,
            num_shards=self.run.num_shards,
            num_parameters=self.run.num_parameters,
            initial_digest=self.run.initial_digest,
        )
        identity = self.folder.identity()
        self.ledger = LedgerWriter(identity, self.run.run_id, self.run.spec, self.database.last_ledger_entry())
        self.recorder = Recorder(read_on_record(self.database.engine), self.state)
        self.people = [
            Person(
                identity=Identity.generate(),
                name=f"volunteer-{place}",
                device=self.chance.choice(DEVICES),
                steps_per_s=self.chance.lognormvariate(0.0, 0.4) / STEP_S,
            )
            for place in range(self.num_peers)
        ]
        self.waiting = list(self.people)
        self.send(ev.InviteIssued(token_id=TOKEN, uses=1_000_000))

    def send(self, event: ev.Event, document: Signed | None = None) -> None:
        """One event: the core, the ledger, the records."""
        effects = machine.handle(self.state, event, self.now_s)
        unix_s = self.start_unix_s + self.now_s
        self.journal_seq += 1
        entries = []
        for effect in effects:
            if isinstance(effect, fx.GrantLease):
                self.granted[effect.peer] = effect
            elif isinstance(effect, fx.CloseRound):
                entries = self.ledger.append_round(effect, self.headers, unix_s)
                self.batch.ledger += entries
                self.batch.rounds.append(self._describe(effect, unix_s))
                self.headers.clear()
        documents = [document] if document else []
        noted = Noted(event=event, effects=effects, documents=documents, entries=entries, unix_s=unix_s)
        self.recorder.note(noted, self.batch.records)
        self.last_event = JournalRow(seq=self.journal_seq, now_s=self.now_s, unix_s=unix_s, event=ev.dump_event(event))

    def play_round(self) -> None:
        """Some come and go; who is there works; what was merged is reported."""
        self._come_and_go()
        self._report()
        round_ = self.state.round
        if round_ is None:
            raise RuntimeError(f"no round opened: {machine.describe_phase(self.state)}")
        opened_s = self.now_s
        work = sorted(
            (opened_s + len(lease.units) / self.online[peer].steps_per_s * self.chance.uniform(0.9, 1.3), peer)
            for peer, lease in round_.leases.items()
            if peer in self.online
        )
        for moment_s, peer in work:
            if self.state.round is not round_:
                break
            self.now_s = max(self.now_s, moment_s)
            self._contribute(peer)
        while self.state.round is round_:
            self.now_s = machine.next_deadline(self.state) or self.now_s
            self.send(ev.TimerFired())
        self.now_s += self.chance.uniform(0.5, 2.0)
        self.database.commit(self.batch)
        self.batch = Batch()

    def _come_and_go(self) -> None:
        if len(self.online) >= self.online_target and self.chance.random() < 0.3:
            peer = self.chance.choice(list(self.online))
            person = self.online.pop(peer)
            self.waiting.append(person)
            reason = self.chance.choice(("the session ended", "it said goodbye"))
            self.send(ev.PeerLeft(peer=peer, reason=reason))
        while len(self.online) < min(self.online_target, self.num_peers):
            person = self.waiting.pop(0)  # who was away longest comes next: so everybody comes
            peer = person.identity.peer_id
            self.online[peer] = person
            joined = ev.PeerJoined(
                peer=peer, name=person.name, device=person.device, role="worker", token_id=TOKEN, lease_id=None
            )
            self.send(joined)

    def _report(self) -> None:
        merged = self.state.rounds_merged
        digest = self.run.initial_digest if merged == 0 else sha256_hex(f"state {merged}".encode())
        for peer, person in self.online.items():
            self.now_s += 0.01
            report = ev.StateReported(peer=peer, round=merged, digest=digest, claimed_steps_per_s=person.steps_per_s)
            self.send(report)

    def _contribute(self, peer: str) -> None:
        lease = self.granted[peer]
        if self.chance.random() < 0.01:
            self.send(ev.LeaseReturned(peer=peer, lease_id=lease.lease_id, reason="paused: on battery"))
            return
        person, spec = self.online[peer], self.run.spec
        content = f"{peer} {lease.lease_id}".encode()
        header = Contribution(
            run_id=self.run.run_id,
            peer=peer,
            round=lease.round,
            lease_id=lease.lease_id,
            base_digest=lease.base_digest,
            shards=tuple(ShardRef(pass_index=pass_index, index=index) for pass_index, index in lease.units),
            inner_steps=len(lease.units) * spec.data.shard_steps,
            tokens=len(lease.units) * spec.shard_tokens,
            mean_loss=2.0 + 4.0 / (1.0 + 0.01 * lease.round) + self.chance.gauss(0.0, 0.02),
            compute_s=len(lease.units) / person.steps_per_s,
            codec=lease.codec,
            payload_hash=sha256_hex(content),
            payload_bytes=NUM_PARAMETERS // 4,
        )
        signed = sign(header, person.identity)
        self.headers[signed.hash] = signed
        committed = ev.ContributionCommitted(
            peer=peer,
            lease_id=lease.lease_id,
            base_digest=lease.base_digest,
            units=lease.units,
            inner_steps=header.inner_steps,
            tokens=header.tokens,
            mean_loss=header.mean_loss,
            codec=header.codec,
            contribution_hash=signed.hash,
            payload_hash=header.payload_hash,
            payload_bytes=header.payload_bytes,
        )
        self.send(committed, signed)
        refused = "the vector is not finite" if self.chance.random() < 0.003 else ""
        checked = ev.PayloadChecked(
            peer=peer, payload_hash=header.payload_hash, norm=1.0, upload_bps=2e7, refused_because=refused
        )
        self.now_s += 0.05
        self.send(checked)

    def _describe(self, closed: fx.CloseRound, unix_s: float) -> RoundRow:
        tokens = sum(credit.tokens for credit in closed.credits)
        loss = sum(credit.mean_loss * credit.tokens for credit in closed.credits) / max(1, tokens)
        return RoundRow(
            round=closed.round,
            unix_s=unix_s,
            seconds=self.now_s - closed.opened_s,
            tokens_after=closed.tokens_after,
            contributions=len(closed.credits),
            payload_bytes=sum(credit.payload_bytes for credit in closed.credits),
            mean_loss=loss,
            held_out_loss=loss + 0.05 if closed.round % 10 == 0 else None,
        )

    def end(self) -> None:
        """Leave the folder so that a coordinator goes on from here."""
        snapshot = (self.journal_seq, dump_state(self.state))
        self.database.commit(Batch(journal=[self.last_event], snapshot=snapshot))


def fill(
    folder: Path,
    *,
    num_peers: int,
    num_rounds: int,
    http_port: int,
    grpc_port: int,
    progress: Callable[[int], None],
) -> float:
    """Make a run folder with that history, about 30 peers online at a time. Returns the seconds that it took."""
    started_s = time.perf_counter()
    text = folder.parent / "text.txt"
    text.write_text("the old clock remembers every visitor of the quiet river. " * 20_000)
    toml = folder.parent / "run.toml"
    table = {
        "name": "a long run",
        "data": {"source": str(text), "sequence_length": 128, "shard_steps": 5},
        "train": {"tokens": 1 << 50},
        "round": {"inner_steps": 20, "min_peers": 1},
        "coordinator": {"http": f"127.0.0.1:{http_port}", "listen": f"127.0.0.1:{grpc_port}"},
    }
    toml.write_text(tomlkit.dumps(table))
    home = RunFolder(folder)
    spec = home.create(toml)
    database = home.open_database(spec)

    def initialize_model(_: int) -> Callable[[], InitialModel]:
        state, config = home.store.put(b"no state"), home.store.put(b"{}")
        return lambda: InitialModel(num_parameters=NUM_PARAMETERS, digest=state, config_hash=config)

    genesis = prepare(home, spec, database, initialize_model)
    history = History(
        folder=home,
        database=database,
        num_peers=num_peers,
        online_target=30,
        start_unix_s=time.time() - 25.0 * num_rounds,
    )
    history.begin(genesis)
    for round_ in range(num_rounds):
        history.play_round()
        if round_ % 100 == 99:
            progress(round_ + 1)
    history.end()
    database.close()
    return time.perf_counter() - started_s
