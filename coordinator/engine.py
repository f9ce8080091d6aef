"""The shell around the core: takes events one by one, journals them, then carries out the effects.

One task owns the core. It takes every event that is waiting, lets the core handle them, writes all that changed in one
transaction, and only then sends anything. When the write fails the coordinator stops: what was sent is on the disk,
what is not on the disk was not sent. The clock is the process's monotonic one, moved on so that it never goes back over
a restart.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import Phase, State, dump_state, load_state
from coordinator.ledger import LedgerWriter
from coordinator.records.recorder import Noted, Recorder, read_on_record
from coordinator.storage.database import Batch, Database, JournalRow, LedgerRow, RoundRow
from protocol.documents import EvaluationReport
from protocol.signing import Signed

log = structlog.get_logger()
SNAPSHOT_EVERY_EVENTS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """One event after its transaction: what the core wants done, and the ledger entries that were written."""

    event: ev.Event
    effects: Sequence[fx.Effect]
    entries: Sequence[LedgerRow]


class Carrier(Protocol):
    """Carries effects out in the world: sends to peers, checks payloads."""

    def carry_out(self, committed: Committed) -> None: ...


@dataclass(slots=True)
class _Submission:
    event: ev.Event | None  # None: only what is new on record is to be written
    documents: Sequence[Signed]
    on_committed: Callable[[Committed], None] | None
    queued_s: float = field(default_factory=time.monotonic)


class Engine:
    """Runs the core of one run."""

    def __init__(self, database: Database, ledger: LedgerWriter, state: State, *, journal_seq: int, now_s: float):
        self.state = state
        self.started_unix_s = time.time()
        self._database = database
        self._ledger = ledger
        self._journal_seq = journal_seq
        self._snapshot_seq = journal_seq
        self._clock_offset_s = now_s - time.monotonic()
        self._queue: asyncio.Queue[_Submission] = asyncio.Queue()
        self._headers: dict[str, Signed] = {}
        self.commit_seconds: deque[float] = deque(maxlen=1000)
        self.wait_seconds: deque[float] = deque(maxlen=1000)  # of events, from submit until the core took them
        self.recorder = Recorder(read_on_record(database.engine), state)

    @classmethod
    def recover(cls, database: Database, ledger: LedgerWriter, fresh: State) -> "Engine":
        """The engine of a run folder: `fresh` when nothing has happened yet, else snapshot plus journal."""
        snapshot = database.load_snapshot()
        seq, state = (snapshot[0], load_state(snapshot[1])) if snapshot else (0, fresh)
        for row in database.read_journal(after_seq=seq):
            machine.handle(state, ev.load_event(row.event), row.now_s)
            seq = row.seq
        return cls(database, ledger, state, journal_seq=seq, now_s=database.last_event_s())

    def now_s(self) -> float:
        """Seconds on the run's own clock: it stands still while the coordinator is down."""
        return time.monotonic() + self._clock_offset_s

    @property
    def num_waiting(self) -> int:
        """Events that were submitted and not taken yet."""
        return self._queue.qsize()

    @property
    def journal_seq(self) -> int:
        """Events in the journal."""
        return self._journal_seq

    @property
    def ledger_head(self) -> str:
        return self._ledger.head

    def submit(
        self,
        event: ev.Event,
        documents: Sequence[Signed] = (),
        on_committed: Callable[[Committed], None] | None = None,
    ) -> None:
        """Queue an event. `on_committed` is called right after its transaction, before its effects are carried out."""
        self._queue.put_nowait(_Submission(event, documents, on_committed))

    def write_news(self) -> None:
        """Have what the recorder was told beside the core's events written soon."""
        self._queue.put_nowait(_Submission(None, (), None))

    async def run(self, carrier: Carrier) -> None:
        """Handle events until cancelled. Raises DiskFullError or another ManyhandsError when a write fails."""
        while True:
            submissions = await self._next_submissions()
            batch = Batch()
            done = [(submission, self._handle(submission, batch)) for submission in submissions]
            if self._journal_seq - self._snapshot_seq >= SNAPSHOT_EVERY_EVENTS:
                batch.snapshot = (self._journal_seq, dump_state(self.state))
                self._snapshot_seq = self._journal_seq
            started = time.perf_counter()
            # Shielded: a cancelled engine still finishes the write that it began.
            await asyncio.shield(asyncio.to_thread(self._database.commit, batch))
            self.commit_seconds.append(time.perf_counter() - started)
            for submission, committed in done:
                if committed is None:
                    continue
                if submission.on_committed is not None:
                    submission.on_committed(committed)
                carrier.carry_out(committed)

    async def _next_submissions(self) -> list[_Submission]:
        deadline_s = machine.next_deadline(self.state)
        timeout_s = None if deadline_s is None else max(0.0, deadline_s - self.now_s())
        try:
            async with asyncio.timeout(timeout_s):  # wait_for would drop a cancellation that comes with an event
                first = await self._queue.get()
        except TimeoutError:
            return [_Submission(ev.TimerFired(), (), None)]
        submissions = [first]
        while not self._queue.empty() and len(submissions) < 500:
            submissions.append(self._queue.get_nowait())
        return submissions

    def _handle(self, submission: _Submission, batch: Batch) -> Committed | None:
        now_s, unix_s, event = self.now_s(), time.time(), submission.event
        self.wait_seconds.append(time.monotonic() - submission.queued_s)
        if event is None:
            self.recorder.write_news(batch.records, unix_s)
            return None
        phase = self.state.phase
        effects = machine.handle(self.state, event, now_s)
        self._journal_seq += 1
        batch.journal.append(JournalRow(seq=self._journal_seq, now_s=now_s, unix_s=unix_s, event=ev.dump_event(event)))
        if any(_keeps_document(effect) for effect in effects):
            batch.documents += submission.documents  # what the core refused is not kept
            self._headers |= {signed.hash: signed for signed in submission.documents}
        entries: list[LedgerRow] = []
        for effect in effects:
            entries += self._write_entries(effect, batch, now_s, unix_s)
            if isinstance(effect, fx.AnnouncePlan):
                log.info("exchange", from_round=effect.round, plan=effect.reason)
        if self.state.phase is not phase:
            log.info("phase", phase=self.state.phase.value, reason=machine.describe_phase(self.state))
        noted = Noted(event=event, effects=effects, documents=submission.documents, entries=entries, unix_s=unix_s)
        self.recorder.note(noted, batch.records)
        return Committed(event=event, effects=effects, entries=entries)

    def _write_entries(self, effect: fx.Effect, batch: Batch, now_s: float, unix_s: float) -> list[LedgerRow]:
        match effect:
            case fx.CloseRound():
                headers = {
                    credit.contribution_hash: self._header(credit.contribution_hash) for credit in effect.credits
                }
                entries = self._ledger.append_round(effect, headers, unix_s)
                self._headers.clear()
                batch.rounds.append(_describe_round(effect, now_s, unix_s))
            case fx.RecordEvaluation():
                report = self._header(effect.report_hash)
                entries = [self._ledger.append_evaluation(report, unix_s)]
                evaluated = EvaluationReport.model_validate_json(report.body)
                batch.held_out[evaluated.round - 1] = evaluated.held_out_loss
            case _:
                return []
        batch.ledger += entries
        return entries

    def _header(self, hash_: str) -> Signed:
        """A peer's signed document: kept since it came, or from before a restart."""
        signed = self._headers.get(hash_) or self._database.load_document(hash_)
        if signed is None:
            raise RuntimeError(f"the signed document {hash_} is in the journal but not in the database")
        return signed

    def is_finished(self) -> bool:
        return self.state.phase is Phase.FINISHED


def _keeps_document(effect: fx.Effect) -> bool:
    return isinstance(effect, fx.CheckPayload | fx.RecordEvaluation) or (
        isinstance(effect, fx.JudgeContribution) and effect.accepted
    )


def _describe_round(closed: fx.CloseRound, now_s: float, unix_s: float) -> RoundRow:
    tokens = sum(credit.tokens for credit in closed.credits)
    return RoundRow(
        round=closed.round,
        unix_s=unix_s,
        seconds=now_s - closed.opened_s,
        tokens_after=closed.tokens_after,
        contributions=len(closed.credits),
        payload_bytes=sum(credit.payload_bytes for credit in closed.credits),
        mean_loss=sum(credit.mean_loss * credit.tokens for credit in closed.credits) / max(1, tokens),
    )
