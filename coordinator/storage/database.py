"""Tables and transactions. SQLite by default, PostgreSQL (with psycopg 3) by URL; one transaction a transition.

`commit` writes what one batch of events changed: the events, the ledger entries and the documents that they refer to,
and the row of a closed round, all or nothing. A snapshot only shortens recovery; the journal is the truth.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import (
    URL,
    BigInteger,
    Engine,
    Float,
    Integer,
    LargeBinary,
    String,
    create_engine,
    event,
    make_url,
    select,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Mapped, Session, mapped_column

from coordinator.storage.base import BIG, Base
from coordinator.storage.record_batch import RecordBatch
from protocol.errors import ConfigError, DiskFullError, ManyhandsError
from protocol.signing import Signed

CONNECT_TIMEOUT_S = 10
_URL_HINT = "in a password, write @ as %40, : as %3A and / as %2F"


class JournalRow(Base):
    __tablename__ = "journal"
    seq: Mapped[int] = mapped_column(BIG, primary_key=True)
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
    seq: Mapped[int] = mapped_column(BIG, primary_key=True)
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
    round: Mapped[int] = mapped_column(BIG, primary_key=True)
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
    records: RecordBatch = field(default_factory=RecordBatch)
    snapshot: tuple[int, bytes] | None = None  # journal seq, state


class Database:
    """One run's database."""

    def __init__(self, url: str) -> None:
        """Open the database and make its tables. Raises ConfigError when it cannot be opened, DiskFullError when full.

        `url`: an SQLAlchemy URL; `postgresql://` means psycopg 3.
        """
        parsed = _parse_url(url)
        self.name = f"the database {parsed.set(query={}).render_as_string(hide_password=True)}"
        try:
            self._engine = _connect(parsed)
            self._readers = _connect(parsed)
            Base.metadata.create_all(self._engine)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.name} needs {error.name}: `pip install 'manyhands[postgresql]'`") from error
        except (SQLAlchemyError, ValueError) as error:
            if _is_full(error):
                raise self._disk_full() from error
            raise ConfigError(f"cannot open {self.name}: {_first_line(error)}") from error

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def readers(self) -> Engine:
        """Connections apart from the coordinator's own: however many people look, no commit waits for one."""
        return self._readers

    def close(self) -> None:
        self._engine.dispose()
        self._readers.dispose()

    def commit(self, batch: Batch) -> None:
        """Write the batch in one transaction. Raises DiskFullError when there is no room; then nothing was written."""
        with self._translate_errors(), Session(self._engine, expire_on_commit=False) as session, session.begin():
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
            batch.records.write(session.connection())
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

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            if _is_full(error):
                raise self._disk_full() from error
            raise ManyhandsError(f"{self.name} failed: {_first_line(error)}") from error

    def _disk_full(self) -> DiskFullError:
        return DiskFullError(f"the disk of {self.name} is full or read-only; free some space and start again")


def sqlite_url(folder: Path) -> str:
    """The URL of a run folder's own database."""
    return f"sqlite:///{folder / 'run.db'}"


def _parse_url(url: str) -> URL:
    """The URL's parts; no error tells any of them, since a password may be in the wrong place."""
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError) as error:
        raise ConfigError(f"coordinator.database is not an SQLAlchemy URL; {_URL_HINT}") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql") or "@" in (parsed.host or ""):
        raise ConfigError(f"coordinator.database is neither sqlite:///path nor postgresql://…; {_URL_HINT}")
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def _connect(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url)
        event.listen(engine, "connect", _set_sqlite_pragmas)
        return engine
    # A connection that broke while it lay idle is replaced; a server that does not answer is told of soon.
    return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_TIMEOUT_S})


def _set_sqlite_pragmas(connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined] # a DBAPI connection
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # what is committed survives a power cut too
    cursor.execute("PRAGMA busy_timeout = 10000")
    cursor.close()


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
    text = str(getattr(error, "orig", None) or error).lower()
    return any(sign in text for sign in ("disk is full", "no space left", "readonly", "disk i/o error"))


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
