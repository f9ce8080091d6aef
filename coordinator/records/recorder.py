"""Follows a run's events and effects and says what goes on record with them: work, incidents, markers, contributors.

The engine calls `note` for each event and writes the batch in the event's own transaction. Nothing here does I/O, and
nothing is decided by it. What it knows of the open round is in memory; after a restart it is made again from the state.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine, func, select

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core.state import State
from coordinator.records.incidents import Episode, IncidentLog
from coordinator.records.noticing import notice
from coordinator.records.views import Waterfall
from coordinator.records.work import WorkLog, shorten
from coordinator.storage.database import JournalRow, LedgerRow
from coordinator.storage.record_batch import RecordBatch
from coordinator.storage.records import (
    MAX_MARKERS,
    MAX_WORK_ROWS,
    ContributorRow,
    IncidentRow,
    MarkerRow,
    WorkRow,
)
from protocol.signing import Signed


@dataclass(slots=True, kw_only=True)
class OnRecord:
    """What the database holds when a coordinator starts."""

    numbers: dict[str, int] = field(default_factory=dict)  # of contributors, by peer
    rows_of_rounds: deque[tuple[int, int]] = field(default_factory=deque)  # (round, work rows), oldest first
    next_incident: int = 1
    next_marker: int = 1
    lasting: list[Episode] = field(default_factory=list)
    last_event_s: float = 0.0
    last_event_unix_s: float = 0.0


def read_on_record(engine: Engine) -> OnRecord:
    """What is there to go on from."""
    kept = OnRecord()
    with engine.connect() as connection:
        for peer, number in connection.execute(select(ContributorRow.peer, ContributorRow.number)):
            kept.numbers[peer] = number
        rounds = select(WorkRow.round, func.count()).group_by(WorkRow.round).order_by(WorkRow.round)
        kept.rows_of_rounds = deque((round_, rows) for round_, rows in connection.execute(rounds))
        kept.next_incident = (connection.execute(select(func.max(IncidentRow.id))).scalar() or 0) + 1
        kept.next_marker = (connection.execute(select(func.max(MarkerRow.id))).scalar() or 0) + 1
        lasting = select(*IncidentRow.__table__.columns).where(IncidentRow.until_unix_s.is_(None))
        for row in connection.execute(lasting):
            kept.lasting.append(Episode(**{**row._mapping, "evidence": json.loads(row.evidence)}))
        last = select(JournalRow.now_s, JournalRow.unix_s).order_by(JournalRow.seq.desc()).limit(1)
        for now_s, unix_s in connection.execute(last):
            kept.last_event_s, kept.last_event_unix_s = now_s, unix_s
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """One event that the core has handled."""

    event: ev.Event
    effects: Sequence[fx.Effect]
    documents: Sequence[Signed] = ()
    entries: Sequence[LedgerRow] = ()  # those of the ledger that it made
    unix_s: float

    def refused(self) -> list[fx.JudgeContribution]:
        return [effect for effect in self.effects if isinstance(effect, fx.JudgeContribution) and not effect.accepted]


class Recorder:
    """The records of one run."""

    def __init__(self, kept: OnRecord, state: State) -> None:
        self._state = state
        self._numbers = kept.numbers
        self._rows_of_rounds = kept.rows_of_rounds
        self._num_rows = sum(rows for _, rows in kept.rows_of_rounds)
        self._next_marker = kept.next_marker
        self._knows_all = False  # whether everybody in the state has a number
        self.last_event_unix_s = kept.last_event_unix_s
        self.incidents = IncidentLog(kept.lasting, kept.next_incident)
        self.work = WorkLog(state, self._numbers, kept.last_event_unix_s - kept.last_event_s)
        self._markers: list[tuple[str, str, str]] = []  # kind, peer, words
        # Seconds since a connected peer's last heartbeat, for whoever knows: a Watch sets it.
        self.read_silence: Callable[[str], float | None] = lambda peer: None

    def open_round(self) -> Waterfall | None:
        """The round that is open now, as far as it is; None between two rounds."""
        rounds = self._rows_of_rounds
        return self.work.describe(self._state, rounds[0][0] if rounds else self._state.rounds_merged)

    def mark(self, kind: str, words: str, peer: str = "") -> None:
        """Put a mark on the curves, at the event that is noted now."""
        self._markers.append((kind, peer, shorten(words)))

    def note(self, noted: Noted, batch: RecordBatch) -> None:
        """Put into the batch what this event leaves on record."""
        event = noted.event
        self._know(noted, batch)
        notice(self, self._state, noted)
        self.work.note_event(event, noted.refused(), noted.unix_s)
        if isinstance(event, ev.ContributionCommitted):
            self._note_contribution(event, noted, batch)
        elif isinstance(event, ev.StateReported):
            self.work.note_state(event, noted.unix_s, batch)
        for effect in noted.effects:
            self._note_effect(effect, noted, batch)
        self.write_news(batch, noted.unix_s)
        self.last_event_unix_s = noted.unix_s

    def write_news(self, batch: RecordBatch, unix_s: float) -> None:
        """Put the incidents and markers that came up into the batch."""
        self.incidents.write(batch)
        for kind, peer, words in self._markers:
            batch.markers.append(
                {
                    "id": self._next_marker,
                    "unix_s": unix_s,
                    "round": self._state.rounds_merged,
                    "tokens": self._state.tokens_credited,
                    "kind": kind,
                    "peer": peer,
                    "words": words,
                }
            )
            self._next_marker += 1
        if self._markers:
            batch.forget_markers_before = max(0, self._next_marker - MAX_MARKERS)
            self._markers.clear()

    def _know(self, noted: Noted, batch: RecordBatch) -> None:
        """Everybody whom the core knows is a contributor; one of before these records has its totals from the core."""
        joined = noted.event.peer if isinstance(noted.event, ev.PeerJoined) else None
        new = [joined] if joined in self._state.peers else []
        if not self._knows_all:
            new += [peer for peer in self._state.peers if peer not in self._numbers and peer != joined]
            self._knows_all = True
        for peer_id in new:
            peer = self._state.peers[peer_id]
            words = {"name": peer.name[:64], "device": peer.device[:64], "role": peer.role, "seen_unix_s": noted.unix_s}
            number = self._numbers.get(peer_id)
            if number is not None:
                where = batch.new_contributors if number in batch.new_contributors else batch.contributors
                where[number] = {**where.get(number, {}), **words}
                continue
            number = self._numbers[peer_id] = len(self._numbers) + 1
            batch.new_contributors[number] = {
                "number": number,
                "peer": peer_id,
                **words,
                "joined_unix_s": noted.unix_s if peer_id == joined else None,
                "accepted": peer.accepted,
                "late": 0,
                "refused": peer.refused,
                "tokens": peer.credited_tokens,
                "compute_s": 0.0,
                "payload_bytes": 0,
            }

    def _note_contribution(self, event: ev.ContributionCommitted, noted: Noted, batch: RecordBatch) -> None:
        refused = next((verdict for verdict in noted.refused() if verdict.payload_hash == event.payload_hash), None)
        if refused is None:
            self.work.note_header(event, noted.documents)
        elif refused.reason.startswith("late:"):
            self.work.note_late(event, refused.reason, noted.unix_s, batch)

    def _note_effect(self, effect: fx.Effect, noted: Noted, batch: RecordBatch) -> None:
        match effect:
            case fx.GrantLease():
                self.work.grant(effect, noted.unix_s, batch)
            case fx.JudgeContribution():
                self.work.judge(effect, noted.unix_s)
            case fx.CloseRound():
                self.work.close(effect, noted.entries, noted.unix_s, batch)
                self._count_rows(effect.round, batch)
            case fx.VoidRound():
                self.work.void(effect, noted.unix_s, batch)
                self._count_rows(effect.round, batch)

    def _count_rows(self, round_: int, batch: RecordBatch) -> None:
        """Keep to MAX_WORK_ROWS: whole rounds are forgotten, the oldest first, but never the last one."""
        rows = len(batch.work) - batch.counted_work
        batch.counted_work = len(batch.work)
        self._rows_of_rounds.append((round_, rows))
        self._num_rows += rows
        while self._num_rows > MAX_WORK_ROWS and self._rows_of_rounds[0][0] < round_:
            oldest, rows = self._rows_of_rounds.popleft()
            self._num_rows -= rows
            batch.forget_rounds_before = max(batch.forget_rounds_before, oldest + 1)
