"""A run's core with its records in a real database: what the engine does for each event, without its clock."""

from pathlib import Path
from typing import Any

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.ledger import LedgerWriter
from coordinator.records.recorder import Noted, Recorder, read_on_record
from coordinator.storage.database import Batch, Database, JournalRow, RoundRow, sqlite_url
from protocol.documents import Contribution, sign
from protocol.identity import Identity
from protocol.signing import Signed
from tests.core_run import TOKEN, CoreRun

START_UNIX_S = 1_800_000_000.0
RUN_ID = "0" * 16


class RecordedRun(CoreRun):
    """Peers are identities here, so that receipts are real: `ann, bob = run.meet("ann", "bob")` gives their ids."""

    def __init__(self, folder: Path, database_url: str | None = None, **sections: Any) -> None:
        self.folder = folder
        self.identities: dict[str, Identity] = {}  # by peer id
        self.names: dict[str, str] = {}
        self.database = Database(database_url or sqlite_url(folder))
        self.recorder: Recorder | None = None
        self.coordinator = Identity.generate()
        self.headers: dict[str, Signed] = {}
        self.compute_s = 4.0
        self.down_s = 0.0
        super().__init__(**sections)

    def meet(self, *names: str) -> list[str]:
        """Peer ids of newcomers, who join under these names."""
        for name in names:
            identity = Identity.generate()
            self.identities[identity.peer_id] = identity
            self.names[identity.peer_id] = name
        return list(self.identities)[-len(names) :]

    def join(self, *names: str, role: str = "worker", token_id: str = TOKEN, lease_id: int | None = None) -> None:
        for peer in names:
            self.send(
                ev.PeerJoined(
                    peer=peer,
                    name=self.names[peer],
                    device="NVIDIA H100 PCIe, 80 GB" if self.names[peer] == "ann" else "AMD EPYC 7B13, 8 cores",
                    role=role,
                    token_id=token_id,
                    lease_id=lease_id,
                )
            )

    @property
    def unix_s(self) -> float:
        return START_UNIX_S + self.now_s + self.down_s

    def send(self, event: ev.Event, after_s: float = 0.0) -> list[fx.Effect]:
        effects = super().send(event, after_s)
        if self.recorder is None:
            self.recorder = Recorder(read_on_record(self.database.engine), self.state)
            last = self.database.last_ledger_entry()
            self.ledger = LedgerWriter(self.coordinator, RUN_ID, self.spec, last)
        seq = self.seq = getattr(self, "seq", 0) + 1
        batch = Batch(journal=[JournalRow(seq=seq, now_s=self.now_s, unix_s=self.unix_s, event=ev.dump_event(event))])
        documents = self._documents(event)
        for effect in effects:
            if isinstance(effect, fx.CloseRound):
                batch.ledger += self.ledger.append_round(effect, self.headers, self.unix_s)
                batch.rounds.append(self._round_row(effect))
        noted = Noted(event=event, effects=effects, documents=documents, entries=batch.ledger, unix_s=self.unix_s)
        self.recorder.note(noted, batch.records)
        self.database.commit(batch)
        return effects

    def restart(self, down_s: float = 60.0) -> None:
        """The coordinator's process is new; its clock stood still, the world's did not."""
        self.recorder = Recorder(read_on_record(self.database.engine), self.state)
        self.down_s += down_s
        self.send(ev.CoordinatorRestarted())

    def _documents(self, event: ev.Event) -> list[Signed]:
        if not isinstance(event, ev.ContributionCommitted):
            return []
        header = Contribution(
            run_id=RUN_ID,
            peer=event.peer,
            round=self.state.rounds_merged,
            lease_id=event.lease_id,
            base_digest=event.base_digest,
            shards=(),
            inner_steps=event.inner_steps,
            tokens=event.tokens,
            mean_loss=event.mean_loss,
            compute_s=self.compute_s,
            codec=event.codec,
            payload_hash=event.payload_hash,
            payload_bytes=event.payload_bytes,
        )
        signed = self.headers[event.contribution_hash] = sign(header, self.identities[event.peer])
        return [signed]

    def _round_row(self, closed: fx.CloseRound) -> RoundRow:
        return RoundRow(
            round=closed.round,
            unix_s=self.unix_s,
            seconds=self.now_s - closed.opened_s,
            tokens_after=closed.tokens_after,
            contributions=len(closed.credits),
            payload_bytes=sum(credit.payload_bytes for credit in closed.credits),
            mean_loss=3.0 - 0.1 * closed.round,
            held_out_loss=None if closed.round % 2 else 3.1 - 0.1 * closed.round,
        )
