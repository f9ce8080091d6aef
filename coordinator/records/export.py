"""Whole tables as CSV or Parquet, in pieces: read by key, some thousand rows at a time, so that a slow download holds
neither a transaction nor memory.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Engine,
    Float,
    Integer,
    Row,
    Select,
    select,
)

from coordinator.storage.database import LedgerRow, RoundRow
from coordinator.storage.records import ContributorRow, IncidentRow, MarkerRow, WorkRow

ROWS_A_PIECE = 5_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _query(table: str) -> tuple[Select[Any], Any]:
    """What a table's export reads, and the key that it is ordered by."""
    peer = ContributorRow.peer
    match table:
        case "rounds":
            return select(*RoundRow.__table__.columns), RoundRow.round
        case "work":
            columns = [column for column in WorkRow.__table__.columns if column.name != "contributor"]
            query = select(*columns, peer).join(ContributorRow, ContributorRow.number == WorkRow.contributor)
            return query, WorkRow.lease_id
        case "incidents":
            return select(*IncidentRow.__table__.columns), IncidentRow.id
        case "markers":
            return select(*MarkerRow.__table__.columns), MarkerRow.id
        case "receipts":
            columns = [LedgerRow.__table__.c[name] for name in ("seq", "round", "unix_s", "body", "signature")]
            return select(*columns).where(LedgerRow.kind == "receipt"), LedgerRow.seq
        case "peers":
            return select(*ContributorRow.__table__.columns), ContributorRow.number
    raise ValueError(f"there is no table {table} to export")


TABLES = ("rounds", "work", "incidents", "markers", "receipts", "peers")


def export_csv(engine: Engine, table: str) -> Iterator[bytes]:
    """The table as CSV with a header, in pieces. Raises ValueError for another than TABLES."""
    names = _names(table)
    yield _write_csv([names])
    for rows in _read(engine, table):
        yield _write_csv([[_cell(value) for value in row] for row in rows])


def export_parquet(engine: Engine, table: str) -> Iterator[bytes]:
    """The table as a Parquet file, in pieces: a row group each. Raises ValueError for another than TABLES."""
    query, _ = _query(table)
    schema = pa.schema([(column.name, _arrow_type(column)) for column in query.selected_columns])
    sink = _Sink()
    with pq.ParquetWriter(sink, schema) as writer:
        for rows in _read(engine, table):
            columns = [[_plain(row[place]) for row in rows] for place in range(len(schema))]
            arrays = [pa.array(values, type=of.type) for values, of in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            yield sink.drain()
    yield sink.drain()


def _names(table: str) -> list[str]:
    return [column.name for column in _query(table)[0].selected_columns]


def _read(engine: Engine, table: str) -> Iterator[Sequence[Row[Any]]]:
    query, key = _query(table)
    place, last = _names(table).index(key.name), None
    while True:
        piece = query.order_by(key).limit(ROWS_A_PIECE)
        with engine.connect() as connection:
            rows = connection.execute(piece if last is None else piece.where(key > last)).all()
        if rows:
            yield rows
            last = rows[-1][place]
        if len(rows) < ROWS_A_PIECE:
            return


def _plain(value: Any) -> Any:
    """Bytes as text: a document's JSON as it is, a signature in hex."""
    if not isinstance(value, bytes):
        return value
    return value.decode() if value.startswith(b"{") else value.hex()


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: names are the peers' own words."""
    plain = _plain(value)
    return f"'{plain}" if isinstance(plain, str) and plain.startswith(_FORMULA) else plain


def _write_csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _arrow_type(column: ColumnElement[Any]) -> pa.DataType:
    if isinstance(column.type, BigInteger | Integer):
        return pa.int64()
    return pa.float64() if isinstance(column.type, Float) else pa.string()


class _Sink(io.RawIOBase):
    """What was written since it was last drained."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._written += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._written

    def drain(self) -> bytes:
        drained = b"".join(self._pieces)
        self._pieces.clear()
        return drained
