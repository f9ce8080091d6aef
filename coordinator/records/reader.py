"""Reads what is on record: work, incidents, markers, receipts; runs.py has curves and cost.

Each function takes an SQLAlchemy engine, answers in plain values of bounded size, and can be called in any thread while
the coordinator writes.
"""

import json
from statistics import median
from typing import Any

from sqlalchemy import Engine, func, literal_column, select

from coordinator.records.views import (
    Bar,
    Communication,
    Credited,
    Incident,
    Marker,
    PeerHistory,
    PlanChange,
    Proof,
    ReceiptLine,
    Split,
    Standing,
    Waterfall,
)
from coordinator.storage.database import LedgerRow, RoundRow
from coordinator.storage.records import ContributorRow, IncidentRow, MarkerRow, SplitRow, WorkRow
from protocol.documents import Receipt
from protocol.signing import Signed

MAX_POINTS = 500
MAX_BARS = 2_000
MAX_LEASES = 200
STRAGGLES_ABOVE = 1.25  # times the median of the others

_BARS = (
    WorkRow.lease_id,
    WorkRow.round,
    ContributorRow.peer,
    ContributorRow.name,
    ContributorRow.device,
    WorkRow.result,
    WorkRow.reason,
    WorkRow.leased_unix_s,
    WorkRow.committed_unix_s,
    WorkRow.checked_unix_s,
    WorkRow.merged_unix_s,
    WorkRow.inner_steps,
    WorkRow.tokens,
    WorkRow.compute_s,
    WorkRow.payload_bytes,
    WorkRow.codec,
    WorkRow.receipt_seq,
)


def read_waterfall(engine: Engine, round_: int | None = None) -> Waterfall | None:
    """A settled round's leases; of the newest when none is named. None when there is no such round on record.

    The open round is not in the database: Recorder.open_round() gives it.
    """
    with engine.connect() as connection:
        first, last = connection.execute(select(func.min(WorkRow.round), func.max(WorkRow.round))).one()
        round_ = last if round_ is None else round_
        if round_ is None:
            return None
        bars = _read_bars(engine, select(*_BARS).where(WorkRow.round == round_).order_by(WorkRow.lease_id))
        closed = connection.execute(select(RoundRow.unix_s).where(RoundRow.round == round_)).scalar()
    return make_waterfall(bars, closed, first, last) if bars else None


def make_waterfall(bars: tuple[Bar, ...], closed_unix_s: float | None, first: int, last: int) -> Waterfall:
    """A waterfall of at least one bar, all of one round."""
    return Waterfall(
        round=bars[0].round,
        opened_unix_s=min(bar.leased_unix_s for bar in bars),
        closed_unix_s=closed_unix_s,
        straggler=_find_straggler(bars),
        first_round=first,
        last_round=last,
        bars=bars,
    )


def _find_straggler(bars: tuple[Bar, ...]) -> str | None:
    spans = {
        bar.peer: (bar.checked_unix_s or bar.committed_unix_s or float("inf")) - bar.leased_unix_s
        for bar in bars
        if bar.result in ("accepted", "late", "expired", "committed")
    }
    if len(spans) < 2:
        return None
    slowest = max(spans, key=lambda peer: spans[peer])
    others = median(span for peer, span in spans.items() if peer != slowest)
    return slowest if spans[slowest] > STRAGGLES_ABOVE * others else None


def _read_bars(engine: Engine, query: Any) -> tuple[Bar, ...]:
    query = query.join(ContributorRow, ContributorRow.number == WorkRow.contributor).limit(MAX_BARS)
    with engine.connect() as connection:
        return tuple(Bar(**row._mapping) for row in connection.execute(query))


def read_peer(engine: Engine, peer: str) -> PeerHistory | None:
    """A peer's totals, credit over time and last leases. None for one that never joined."""
    with engine.connect() as connection:
        query = select(*ContributorRow.__table__.columns).where(ContributorRow.peer == peer)
        found = connection.execute(query).one_or_none()
        if found is None:
            return None
        accepted = (WorkRow.contributor == found.number) & (WorkRow.result == "accepted")
        of_credit = select(WorkRow.round, WorkRow.checked_unix_s, WorkRow.leased_unix_s, WorkRow.tokens)
        credited = connection.execute(of_credit.where(accepted).order_by(WorkRow.lease_id)).all()
    leases = select(*_BARS).where(WorkRow.contributor == found.number).order_by(WorkRow.lease_id.desc())
    totals = {key: value for key, value in found._mapping.items() if key not in ("number", "last_receipt_seq")}
    return PeerHistory(
        **totals,
        credited=_accumulate(credited, found.tokens),
        leases=_read_bars(engine, leases.limit(MAX_LEASES)),
    )


def _accumulate(rows: Any, total: int) -> tuple[Credited, ...]:
    """Credit over time; what was credited before the rows that are kept comes first."""
    tokens = total - sum(row.tokens for row in rows)
    stride = max(1, -(-len(rows) // MAX_POINTS))
    points = []
    for place, row in enumerate(rows, 1):
        tokens += row.tokens
        if place % stride == 0 or place == len(rows):
            unix_s = row.leased_unix_s if row.checked_unix_s is None else row.checked_unix_s
            points.append(Credited(round=row.round, unix_s=unix_s, tokens=tokens))
    return tuple(points[-MAX_POINTS:])


def read_incidents(engine: Engine, limit: int = 200) -> tuple[Incident, ...]:
    """Newest first."""
    query = select(*IncidentRow.__table__.columns).order_by(IncidentRow.id.desc()).limit(limit)
    with engine.connect() as connection:
        return tuple(
            Incident(**{**row._mapping, "evidence": json.loads(row.evidence)}) for row in connection.execute(query)
        )


def read_markers(engine: Engine, limit: int = 500) -> tuple[Marker, ...]:
    """Oldest first. When there are more than `limit`, joins, leaves and losses go first."""
    crowd = MarkerRow.kind.in_(("join", "leave", "lost"))
    columns = MarkerRow.__table__.columns
    with engine.connect() as connection:
        rare = connection.execute(select(*columns).where(~crowd).order_by(MarkerRow.id.desc()).limit(limit)).all()
        room = limit - len(rare)
        common = connection.execute(select(*columns).where(crowd).order_by(MarkerRow.id.desc()).limit(room)).all()
    rows = sorted([*rare, *common], key=lambda row: int(row.id))
    return tuple(Marker(**{key: value for key, value in row._mapping.items() if key != "id"}) for row in rows)


def read_leaderboard(engine: Engine, limit: int = 1000) -> tuple[Standing, ...]:
    """Workers by credited tokens, most first."""
    workers = ContributorRow.role == "worker"
    order = (ContributorRow.tokens.desc(), ContributorRow.number)
    with engine.connect() as connection:
        total = connection.execute(select(func.sum(ContributorRow.tokens)).where(workers)).scalar() or 0
        query = select(*ContributorRow.__table__.columns).where(workers).order_by(*order).limit(limit)
        rows = connection.execute(query).all()
    return tuple(_stand(rank, row, int(total)) for rank, row in enumerate(rows, 1))


def _stand(rank: int, row: Any, total: int) -> Standing:
    return Standing(
        rank=rank,
        peer=row.peer,
        name=row.name,
        device=row.device,
        role=row.role,
        accepted=row.accepted,
        late=row.late,
        refused=row.refused,
        tokens=row.tokens,
        share=row.tokens / total if total else 0.0,
        compute_s=row.compute_s,
        payload_bytes=row.payload_bytes,
        last_receipt_seq=row.last_receipt_seq,
    )


def read_communication(engine: Engine) -> Communication:
    """What was sent for what was learnt, and how the workers' time was spent."""
    sums = [
        func.sum(column)
        for column in (
            SplitRow.tokens,
            SplitRow.payload_bytes,
            SplitRow.compute_s,
            SplitRow.exchange_s,
            SplitRow.idle_s,
        )
    ]
    with engine.connect() as connection:
        stride = stride_of(connection.execute(select(func.max(SplitRow.round))).scalar())
        bucket = SplitRow.round.op("/")(literal_column(str(stride)))
        query = select(func.max(SplitRow.round), func.max(SplitRow.opened_unix_s), *sums).group_by(bucket)
        splits = tuple(_split(*tuple(row)) for row in connection.execute(query.order_by(bucket)))
        plans = connection.execute(
            select(MarkerRow.round, MarkerRow.unix_s, MarkerRow.words)
            .where(MarkerRow.kind == "codec")
            .order_by(MarkerRow.id.desc())
            .limit(MAX_POINTS)
        ).all()
        codec = connection.execute(select(SplitRow.codec).order_by(SplitRow.round.desc()).limit(1)).scalar()
    tokens, sent = sum(split.tokens for split in splits), sum(split.payload_bytes for split in splits)
    return Communication(
        splits=splits,
        plans=tuple(PlanChange(**row._mapping) for row in reversed(plans)),
        codec=codec or "",
        tokens=tokens,
        payload_bytes=sent,
        bytes_per_token=sent / tokens if tokens else None,
        compute_s=sum(split.compute_s for split in splits),
        exchange_s=sum(split.exchange_s for split in splits),
        idle_s=sum(split.idle_s for split in splits),
    )


def _split(
    round_: int, unix_s: float, tokens: int, payload_bytes: int, compute_s: float, exchange_s: float, idle_s: float
) -> Split:
    return Split(
        round=round_,
        unix_s=unix_s,
        tokens=int(tokens),
        payload_bytes=int(payload_bytes),
        bytes_per_token=float(payload_bytes / tokens) if tokens else 0.0,
        compute_s=compute_s,
        exchange_s=exchange_s,
        idle_s=idle_s,
    )


def stride_of(last_round: int | None) -> int:
    """How many neighbouring rounds make one point, so that there are at most MAX_POINTS."""
    return 1 if last_round is None else max(1, -(-(last_round + 1) // MAX_POINTS))


def read_receipts(
    engine: Engine, peer: str | None = None, limit: int = 100, before_seq: int | None = None
) -> tuple[ReceiptLine, ...]:
    """Newest first; of one peer, those of the work that is still on record. `before_seq`: to page on."""
    query = select(LedgerRow.seq, LedgerRow.unix_s, LedgerRow.body, LedgerRow.public_key, LedgerRow.signature)
    if peer is None:
        query = query.where(LedgerRow.kind == "receipt")
    else:
        query = query.join(WorkRow, WorkRow.receipt_seq == LedgerRow.seq)
        query = query.join(ContributorRow, ContributorRow.number == WorkRow.contributor)
        query = query.where(ContributorRow.peer == peer)
    if before_seq is not None:
        query = query.where(LedgerRow.seq < before_seq)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(LedgerRow.seq.desc()).limit(limit)).all()
    return tuple(_receipt(row) for row in rows)


def _receipt(row: Any) -> ReceiptLine:
    receipt = Receipt.model_validate_json(row.body)
    return ReceiptLine(
        seq=row.seq,
        round=receipt.round,
        unix_s=row.unix_s,
        peer=receipt.peer,
        lease_id=receipt.lease_id,
        shards=len(receipt.shards),
        tokens=receipt.tokens,
        hash=_signed(row).hash,
    )


def read_proof(engine: Engine, seq: int) -> Proof | None:
    """A ledger entry as it was signed, and its place in the chain. None when there is no such entry."""
    columns = list(LedgerRow.__table__.columns)
    with engine.connect() as connection:
        row = connection.execute(select(*columns).where(LedgerRow.seq == seq)).one_or_none()
        head = connection.execute(select(*columns).order_by(LedgerRow.seq.desc()).limit(1)).one_or_none()
    if row is None or head is None:
        return None
    signed = _signed(row)
    return Proof(
        seq=seq,
        kind=row.kind,
        hash=signed.hash,
        previous=json.loads(signed.body)["previous"],
        signed=signed.to_json(),
        head_seq=head.seq,
        head_hash=_signed(head).hash,
    )


def _signed(row: Any) -> Signed:
    return Signed(body=row.body, public_key=row.public_key, signature=row.signature)
