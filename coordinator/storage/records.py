"""Tables of what happened, for people and pages. Derived; an older run folder gets them when it is opened.

Only `work`, `incidents` and `markers` grow with time, and they are thinned: the oldest go first.
"""

from sqlalchemy import BigInteger, Float, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from coordinator.storage.base import BIG, Base

MAX_WORK_ROWS = 300_000
MAX_INCIDENTS = 5_000
MAX_MARKERS = 20_000


class ContributorRow(Base):
    """Everybody who ever joined, with totals over the whole run."""

    __tablename__ = "contributors"
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=False)
    peer: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(64))
    device: Mapped[str] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(16))
    joined_unix_s: Mapped[float | None] = mapped_column(Float)  # none: before these records began
    seen_unix_s: Mapped[float] = mapped_column(Float)  # its last join or its last settled lease
    accepted: Mapped[int] = mapped_column(BigInteger, default=0)
    late: Mapped[int] = mapped_column(BigInteger, default=0)
    refused: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0, index=True)
    compute_s: Mapped[float] = mapped_column(
        Float, default=0.0
    )  # of accepted contributions, as far as time had gone by
    payload_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    last_receipt_seq: Mapped[int | None] = mapped_column(BigInteger)


class WorkRow(Base):
    """One lease. Times are Unix seconds by the coordinator's clock."""

    __tablename__ = "work"
    __table_args__ = (Index("ix_work_contributor", "contributor", "lease_id"),)
    lease_id: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=False)
    round: Mapped[int] = mapped_column(BigInteger, index=True)
    contributor: Mapped[int] = mapped_column(BigInteger)
    leased_unix_s: Mapped[float] = mapped_column(Float)
    committed_unix_s: Mapped[float | None] = mapped_column(Float)
    checked_unix_s: Mapped[float | None] = mapped_column(Float)
    merged_unix_s: Mapped[float | None] = mapped_column(Float)
    result: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(String(300))
    inner_steps: Mapped[int] = mapped_column(BigInteger)  # as the header says
    tokens: Mapped[int] = mapped_column(BigInteger)
    compute_s: Mapped[float | None] = mapped_column(Float)
    payload_bytes: Mapped[int] = mapped_column(BigInteger)
    codec: Mapped[str] = mapped_column(String(64))
    receipt_seq: Mapped[int | None] = mapped_column(BigInteger)


class SplitRow(Base):
    """How the time of a merged round's workers was spent, summed over them, and what they sent it with."""

    __tablename__ = "round_splits"
    round: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=False)
    opened_unix_s: Mapped[float] = mapped_column(Float)
    leased: Mapped[int] = mapped_column(Integer)
    codec: Mapped[str] = mapped_column(String(64))
    inner_steps: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    payload_bytes: Mapped[int] = mapped_column(BigInteger)
    compute_s: Mapped[float] = mapped_column(Float)
    exchange_s: Mapped[float] = mapped_column(Float)
    idle_s: Mapped[float] = mapped_column(Float)


class IncidentRow(Base):
    """Something that went wrong, found by the coordinator itself."""

    __tablename__ = "incidents"
    id: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(32))
    peer: Mapped[str] = mapped_column(String(64))  # empty when it is of no single peer
    name: Mapped[str] = mapped_column(String(64))
    since_unix_s: Mapped[float] = mapped_column(Float)
    until_unix_s: Mapped[float | None] = mapped_column(Float)  # none while it lasts
    first_round: Mapped[int] = mapped_column(BigInteger)
    last_round: Mapped[int] = mapped_column(BigInteger)
    count: Mapped[int] = mapped_column(Integer)
    evidence: Mapped[str] = mapped_column(Text)  # JSON
    action: Mapped[str] = mapped_column(String(300))


class MarkerRow(Base):
    """Something to mark on a curve."""

    __tablename__ = "markers"
    id: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=False)
    unix_s: Mapped[float] = mapped_column(Float)
    round: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    kind: Mapped[str] = mapped_column(String(16))
    peer: Mapped[str] = mapped_column(String(64))
    words: Mapped[str] = mapped_column(String(300))
