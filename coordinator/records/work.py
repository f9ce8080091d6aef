"""The leases of the open round as they go on, and what is written of them once the round is settled.

Follows the core's events and effects; decides nothing. Times are Unix seconds of the coordinator's clock.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core.state import LeaseStatus, State
from coordinator.records.reader import make_waterfall
from coordinator.records.views import Bar, Waterfall
from coordinator.storage.database import LedgerRow
from coordinator.storage.record_batch import RecordBatch, Values
from protocol.signing import Signed

LATE, VOID, ASIDE = "late:", "the round is void", "it is another peer's turn"
_RESULTS = {LeaseStatus.COMMITTED: "committed", LeaseStatus.ACCEPTED: "accepted", LeaseStatus.CLOSED: "returned"}


@dataclass(slots=True, kw_only=True)
class Work:
    """One lease; the fields are those of views.Bar."""

    lease_id: int
    round: int
    peer: str
    leased_unix_s: float
    committed_unix_s: float | None = None
    checked_unix_s: float | None = None
    merged_unix_s: float | None = None
    result: str = "open"
    reason: str = ""
    inner_steps: int = 0
    tokens: int = 0
    compute_s: float | None = None
    payload_bytes: int = 0
    codec: str = ""
    receipt_seq: int | None = None


class WorkLog:
    """The open round's work, and, until the next round opens, that of the last one."""

    def __init__(self, state: State, numbers: dict[str, int], to_unix_s: float) -> None:
        """`numbers`: of the contributors, by peer. `to_unix_s`: what turns the run's clock into Unix time."""
        self._numbers = numbers
        self._open: dict[str, Work] = {}  # by peer
        self._merging: dict[str, Work] = {}
        self._closed_unix_s = 0.0
        for lease in state.round.leases.values() if state.round else ():
            candidate = lease.candidate
            self._open[lease.peer] = Work(
                lease_id=lease.lease_id,
                round=state.round.index if state.round else 0,
                peer=lease.peer,
                leased_unix_s=lease.granted_s + to_unix_s,
                result=_RESULTS.get(lease.status, lease.status.value),
                payload_bytes=candidate.payload_bytes if candidate else 0,
                codec=candidate.codec if candidate else "",
            )

    def describe(self, state: State, oldest: int) -> Waterfall | None:
        """The open round; `oldest`: the first round that is on record."""
        if not self._open:
            return None
        bars = []
        for work in self._open.values():
            peer = state.peers[work.peer]
            bars.append(Bar(**asdict(work), name=peer.name, device=peer.device))
        return make_waterfall(tuple(bars), None, oldest, bars[0].round)

    # ---- events

    def note_event(self, event: ev.Event, refused: Sequence[fx.JudgeContribution], unix_s: float) -> None:
        """What a worker did with its lease. `refused`: the contributions that the core refused upon this event."""
        work = self._open.get(getattr(event, "peer", ""))
        if work is None:
            return
        match event:
            case ev.ContributionCommitted(lease_id=work.lease_id) if not refused and work.committed_unix_s is None:
                work.committed_unix_s, work.result, work.reason = unix_s, "committed", ""
                work.tokens, work.inner_steps = event.tokens, event.inner_steps
                work.payload_bytes, work.codec = event.payload_bytes, event.codec
            case ev.LeaseReturned(lease_id=work.lease_id) if work.result in ("open", "aside"):
                work.result, work.reason = "returned", shorten(event.reason)
            case ev.PeerLeft() | ev.PeerBanned() if work.result == "open":
                work.result, work.reason = "away", shorten(event.reason)
            case ev.PeerJoined() if work.result == "away":
                if event.lease_id == work.lease_id:
                    work.result, work.reason = "open", ""
                else:
                    work.result, work.reason = "returned", "it came back without its lease"

    def note_header(self, event: ev.ContributionCommitted, documents: Sequence[Signed]) -> None:
        """Take the compute time from the signed header, which the service has read and checked before.

        It is the peer's word: no more is believed than has gone by since the lease.
        """
        work = self._open.get(event.peer)
        if work is not None and work.lease_id == event.lease_id and documents and work.committed_unix_s is not None:
            most = max(0.0, work.committed_unix_s - work.leased_unix_s)
            work.compute_s = min(float(json.loads(documents[0].body)["compute_s"]), most)

    def note_late(self, event: ev.ContributionCommitted, reason: str, unix_s: float, batch: RecordBatch) -> None:
        """A contribution to a round that is closed already."""
        number = self._numbers.get(event.peer)
        if number is not None:
            late: Values = {"lease_id": event.lease_id, "contributor": number, "reason": shorten(reason)}
            batch.late.append({**late, "committed_unix_s": unix_s})
            batch.credits.append(_credit(number, unix_s, late=1))

    def note_state(self, event: ev.StateReported, unix_s: float, batch: RecordBatch) -> None:
        """A worker that had a lease of the last round holds the state after it."""
        work = self._merging.get(event.peer)
        if work is not None and work.merged_unix_s is None and event.round == work.round + 1:
            work.merged_unix_s = batch.merged[work.lease_id] = unix_s

    # ---- effects

    def grant(self, grant: fx.GrantLease, unix_s: float, batch: RecordBatch) -> None:
        if self._merging and grant.round not in (work.round for work in self._open.values()):
            self._finish_split(batch)
        known = self._open.get(grant.peer)
        if known is not None and known.lease_id == grant.lease_id:
            return  # handed out again after a broken connection
        self._open[grant.peer] = Work(
            lease_id=grant.lease_id,
            round=grant.round,
            peer=grant.peer,
            leased_unix_s=unix_s,
            result="open" if grant.contribute else "aside",
        )

    def judge(self, verdict: fx.JudgeContribution, unix_s: float) -> bool:
        """An accepted or refused payload. True when it was refused for a fault of its own."""
        work = self._open.get(verdict.peer)
        if verdict.accepted:
            if work is not None:
                work.checked_unix_s, work.result, work.reason = unix_s, "accepted", ""
            return False
        at_fault = not verdict.reason.startswith((LATE, VOID, ASIDE))
        if work is not None and at_fault and work.result != "accepted":
            work.result, work.reason = "refused", shorten(verdict.reason)
        elif work is not None and work.result == "committed" and verdict.reason.startswith(LATE):
            work.result, work.reason = "late", shorten(verdict.reason)
        return at_fault

    def close(self, closed: fx.CloseRound, entries: Sequence[LedgerRow], unix_s: float, batch: RecordBatch) -> None:
        """The round is merged: `entries` are its manifest and one receipt a credit."""
        for place, credit in enumerate(closed.credits, 1):
            work = self._open.get(credit.peer)
            if work is not None:
                work.result, work.tokens, work.payload_bytes = "accepted", credit.tokens, credit.payload_bytes
                work.codec = credit.codec
                work.receipt_seq = entries[place].seq if place < len(entries) else None
        credited = {credit.peer for credit in closed.credits}
        for work in self._open.values():
            if work.peer in credited:
                continue
            if work.result == "open":
                work.result, work.reason = "expired", f"nothing came until the round closed ({closed.closed_because})"
            elif work.result == "committed":
                work.result = "late"
            elif work.result == "accepted":
                work.result, work.reason = "late", "its group was not merged in time"
        opened = min((work.leased_unix_s for work in self._open.values()), default=unix_s)
        self._write(unix_s, batch)
        self._merging, self._open, self._closed_unix_s = self._open, {}, unix_s
        batch.new_splits[closed.round] = {
            "round": closed.round,
            "opened_unix_s": opened,
            "leased": closed.leased_peers,
            "codec": closed.credits[0].codec if closed.credits else "",
            "inner_steps": closed.inner_steps,
            "tokens": sum(credit.tokens for credit in closed.credits),
            "payload_bytes": sum(credit.payload_bytes for credit in closed.credits),
            **self._split(),
        }

    def void(self, voided: fx.VoidRound, unix_s: float, batch: RecordBatch) -> None:
        for work in self._open.values():
            if work.result in ("open", "committed", "accepted"):
                work.result, work.reason = "void", shorten(voided.reason)
        self._write(unix_s, batch)
        self._open = {}

    def _write(self, unix_s: float, batch: RecordBatch) -> None:
        for work in self._open.values():
            number = self._numbers[work.peer]
            row = asdict(work)
            del row["peer"]
            batch.work.append(row | {"contributor": number})
            if work.result in ("accepted", "late", "refused"):
                batch.credits.append(_credit(number, unix_s, **{work.result: 1}, work=work))

    # ---- how the time was spent

    def _finish_split(self, batch: RecordBatch) -> None:
        rounds = {work.round for work in self._merging.values()}
        for round_ in rounds:
            batch.splits[round_] = self._split()
        self._merging = {}

    def _split(self) -> dict[str, float]:
        """Of the workers that contributed: computing, exchanging (fetching, sending, merging), and waiting."""
        merged = [work.merged_unix_s for work in self._merging.values() if work.merged_unix_s is not None]
        end = max([self._closed_unix_s, *merged])
        compute_s = exchange_s = idle_s = 0.0
        for work in self._merging.values():
            if work.committed_unix_s is None:
                continue
            trained_s = max(0.0, work.committed_unix_s - work.leased_unix_s)
            computed_s = trained_s if work.compute_s is None else work.compute_s
            exchanged_s = trained_s - computed_s
            exchanged_s += max(0.0, (work.checked_unix_s or self._closed_unix_s) - work.committed_unix_s)
            if work.merged_unix_s is not None:
                exchanged_s += max(0.0, work.merged_unix_s - self._closed_unix_s)
            compute_s += computed_s
            exchange_s += exchanged_s
            idle_s += max(0.0, end - work.leased_unix_s - computed_s - exchanged_s)
        return {"compute_s": compute_s, "exchange_s": exchange_s, "idle_s": idle_s}


def shorten(words: str) -> str:
    """Words of a peer or the operator as a column takes them; PostgreSQL takes no NUL."""
    return words.replace("\0", "")[:300]


def _credit(
    number: int, unix_s: float, *, accepted: int = 0, late: int = 0, refused: int = 0, work: Work | None = None
) -> Values:
    """What is added to a contributor's totals."""
    is_credited = bool(accepted) and work is not None
    return {
        "number": number,
        "seen_unix_s": unix_s,
        "accepted": accepted,
        "late": late,
        "refused": refused,
        "tokens": work.tokens if work is not None and is_credited else 0,
        "compute_s": (work.compute_s or 0.0) if work is not None and is_credited else 0.0,
        "payload_bytes": work.payload_bytes if work is not None and is_credited else 0,
        "last_receipt_seq": work.receipt_seq if work is not None and is_credited else None,
    }
