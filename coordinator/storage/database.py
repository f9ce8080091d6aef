"""Tables and transactions. SQLite by default, PostgreSQL by URL; one transaction a transition.

`commit` writes what one batch of events changed: the events, the ledger entries and the documents that they refer to,
and the row of a closed round, all or nothing. A snapshot only shortens recovery; the journal is the truth.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import BigInteger, Engine, Float, Integer, LargeBinary, String, create_engine, event, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from protocol.errors import ConfigError, DiskFullError, ManyhandsError
from protocol.signing import Signed

_BIG = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only for INTEGER


class Base(DeclarativeBase):
    pass


class JournalRow(Base):
    __tablename__ = "journal"
    seq: Mapped[int] = mapped_column(_BIG, primary_key=True)
    now_s: Mapped[float] = mapped_column(Float)
    unix_s: Mapped[float] = mapped_column(Float)
    event: Mapped[bytes] = mapped_column(LargeBinary)


class SnapshotRow(Base):
    __tablename__ = "snapshot"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    journal_seq: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[bytes] = mapped_column(LargeBinary)


class LedgerRow(Base):
    __tablename__ = "ledger"
    seq: Mapped[int] = mapped_column(_BIG, primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), index=True)
    round: Mapped[int | None] = mapped_column(BigInteger, index=True)
    unix_s: Mapped[float] = mapped_column(Float)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    public_key: Mapped[bytes] = mapped_column(LargeBinary(32))
    signature: Mapped[bytes] = mapped_column(LargeBinary(64))

    @property
    def signed(self) -> Signed:
        return Signed(body=self.body, public_key=self.public_key, signature=self.signature)


class DocumentRow(Base):
    """Peers' signed documents that an open round or a later ledger entry refers to, by hash."""

    __tablename__ = "documents"
    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    public_key: Mapped[bytes] = mapped_column(LargeBinary(32))
    signature: Mapped[bytes] = mapped_column(LargeBinary(64))


class RoundRow(Base):
    """What a closed round looked like, for the page. Derived; the ledger is what counts."""

    __tablename__ = "rounds"
    round: Mapped[int] = mapped_column(_BIG, primary_key=True)
    unix_s: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    tokens_after: Mapped[int] = mapped_column(BigInteger)
    contributions: Mapped[int] = mapped_column(Integer)
    payload_bytes: Mapped[int] = mapped_column(BigInteger)
    mean_loss: Mapped[float] = mapped_column(Float)
    held_out_loss: Mapped[float | None] = mapped_column(Float)


@dataclass(slots=True, kw_only=True)
class Batch:
    """What one transaction writes."""

    journal: list[JournalRow] = field(default_factory=list)
    ledger: list[LedgerRow] = field(default_factory=list)
    documents: list[Signed] = field(default_factory=list)
    rounds: list[RoundRow] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)  # round -> loss
    snapshot: tuple[int, bytes] | None = None  # journal seq, state


class Database:
    """One run's database."""

    def __init__(self, url: str) -> None:
        """Open the database and make its tables. Raises ConfigError when it cannot be opened."""
        self.url = url
        try:
            self._engine = create_engine(url)
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _set_sqlite_pragmas)
            with _translate_errors(url):
                Base.metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise ConfigError(f"cannot open the database {_hide_password(url)}: {_first_line(error)}") from error

    @property
    def engine(self) -> Engine:
        return self._engine

    def close(self) -> None:
        self._engine.dispose()

    def commit(self, batch: Batch) -> None:
        """Write the batch in one transaction. Raises DiskFullError when there is no room; then nothing was written."""
        with _translate_errors(self.url), Session(self._engine, expire_on_commit=False) as session, session.begin():
            session.add_all(batch.journal)
            session.add_all(batch.ledger)
            session.add_all(batch.rounds)
            for signed in batch.documents:
                session.merge(
                    DocumentRow(
                        hash=signed.hash,
                        body=signed.body,
                        public_key=signed.public_key,
                        signature=signed.signature,
                    )
                )
            session.flush()
            for round_, loss in batch.held_out.items():
                row = session.get(RoundRow, round_)
                if row is not None:
                    row.held_out_loss = loss
            if batch.snapshot is not None:
                seq, state = batch.snapshot
                session.merge(SnapshotRow(id=1, journal_seq=seq, state=state))

    def load_snapshot(self) -> tuple[int, bytes] | None:
        """The last snapshot: the journal's seq that it includes, and the state."""
        with Session(self._engine) as session:
            row = session.get(SnapshotRow, 1)
            return (row.journal_seq, row.state) if row else None

    def read_journal(self, after_seq: int) -> Iterator[JournalRow]:
        """Journal rows after `after_seq`, in order."""
        with Session(self._engine) as session:
            yield from session.scalars(
                select(JournalRow)
                .where(JournalRow.seq > after_seq)
                .order_by(JournalRow.seq)
                .execution_options(yield_per=1000)
            )

    def last_event_s(self) -> float:
        """The run's clock at the last journalled event; 0 before the first."""
        with Session(self._engine) as session:
            return session.scalar(select(JournalRow.now_s).order_by(JournalRow.seq.desc()).limit(1)) or 0.0

    def read_ledger(
        self, from_seq: int = 0, *, kinds: Sequence[str] = (), from_round: int | None = None
    ) -> Iterator[LedgerRow]:
        """Ledger entries from `from_seq` on, in order; only those of `kinds`, and of `from_round` on, when given."""
        query = select(LedgerRow).where(LedgerRow.seq >= from_seq).order_by(LedgerRow.seq)
        if kinds:
            query = query.where(LedgerRow.kind.in_(kinds))
        if from_round is not None:
            query = query.where(LedgerRow.round >= from_round)
        with Session(self._engine) as session:
            yield from session.scalars(query.execution_options(yield_per=500))

    def last_ledger_entry(self) -> LedgerRow | None:
        with Session(self._engine) as session:
            return session.scalar(select(LedgerRow).order_by(LedgerRow.seq.desc()).limit(1))

    def read_rounds(self, last: int | None = None) -> list[RoundRow]:
        """Closed rounds, oldest first; only the `last` so many when given."""
        query = select(RoundRow).order_by(RoundRow.round.desc())
        with Session(self._engine) as session:
            return list(session.scalars(query.limit(last) if last else query))[::-1]

    def load_document(self, hash_: str) -> Signed | None:
        with Session(self._engine) as session:
            row = session.get(DocumentRow, hash_)
            return Signed(body=row.body, public_key=row.public_key, signature=row.signature) if row else None


def sqlite_url(folder: Path) -> str:
    """The URL of a run folder's own database."""
    return f"sqlite:///{folder / 'run.db'}"


def _set_sqlite_pragmas(connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined] # a DBAPI connection
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # what is committed survives a power cut too
    cursor.execute("PRAGMA busy_timeout = 10000")
    cursor.close()


@contextmanager
def _translate_errors(url: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        text = str(error.orig).lower()
        if "disk is full" in text or "no space left" in text or "readonly" in text or "disk i/o error" in text:
            raise DiskFullError(
                f"the disk of {_hide_password(url)} is full or read-only; free some space and start again"
            ) from error
        raise ManyhandsError(f"the database {_hide_password(url)} failed: {_first_line(error)}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise DiskFullError(
                f"the disk of {_hide_password(url)} is full; free some space and start again"
            ) from error
        raise


def _hide_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.rpartition(':')[0]}:***@{tail}" if at and head.count(":") > 1 else url


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
