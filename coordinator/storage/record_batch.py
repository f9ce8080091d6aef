"""What a transaction writes into the tables of records.py: few statements, whatever the number of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BigInteger, Connection, Table, bindparam, delete, func, insert, update

from coordinator.storage.base import Base
from coordinator.storage.records import ContributorRow, IncidentRow, MarkerRow, SplitRow, WorkRow

Values = dict[str, Any]  # by column
TOTALS = ("accepted", "late", "refused", "tokens", "compute_s", "payload_bytes")


@dataclass(slots=True, kw_only=True)
class RecordBatch:
    """Rows by their key, as columns and values; all rows of one kind name the same columns."""

    new_contributors: dict[int, Values] = field(default_factory=dict)
    contributors: dict[int, Values] = field(default_factory=dict)  # name, device, role, seen_unix_s
    credits: list[Values] = field(default_factory=list)  # number, seen_unix_s, last_receipt_seq, and what is added
    work: list[Values] = field(default_factory=list)
    merged: dict[int, float] = field(default_factory=dict)  # lease id -> unix_s
    late: list[Values] = field(default_factory=list)  # lease_id, contributor, committed_unix_s, reason
    new_splits: dict[int, Values] = field(default_factory=dict)
    splits: dict[int, Values] = field(default_factory=dict)
    new_incidents: dict[int, Values] = field(default_factory=dict)
    incidents: dict[int, Values] = field(default_factory=dict)
    markers: list[Values] = field(default_factory=list)
    counted_work: int = 0  # how many rows of `work` are of rounds that are done
    forget_rounds_before: int = 0  # work
    forget_incidents_before: int = 0  # ids
    forget_markers_before: int = 0

    def write(self, connection: Connection) -> None:
        """Write it all in the connection's transaction."""
        _insert(connection, ContributorRow, self.new_contributors.values())
        _update(connection, ContributorRow, "number", self.contributors)
        _add_credits(connection, self.credits)
        _insert(connection, WorkRow, self.work)
        _update(
            connection, WorkRow, "lease_id", {key: {"merged_unix_s": unix_s} for key, unix_s in self.merged.items()}
        )
        _mark_late(connection, self.late)
        _insert(connection, SplitRow, self.new_splits.values())
        _update(connection, SplitRow, "round", self.splits)
        _insert(connection, IncidentRow, self.new_incidents.values())
        _update(connection, IncidentRow, "id", self.incidents)
        _insert(connection, MarkerRow, self.markers)
        for column, before in (
            (WorkRow.round, self.forget_rounds_before),
            (IncidentRow.id, self.forget_incidents_before),
            (MarkerRow.id, self.forget_markers_before),
        ):
            if before:
                connection.execute(delete(column.class_).where(column < before))


def _table(row: type[Base]) -> Table:
    table = row.__table__
    if not isinstance(table, Table):
        raise TypeError(f"{row.__name__} is of no table")
    return table


def _insert(connection: Connection, row: type[Base], rows: Any) -> None:
    values = list(rows)
    if values:
        connection.execute(insert(_table(row)), values)


def _update(connection: Connection, row: type[Base], key: str, rows: Mapping[int, Values]) -> None:
    if not rows:
        return
    table = _table(row)
    columns = next(iter(rows.values()))
    statement = update(table).where(table.c[key] == bindparam("key_"))
    statement = statement.values({column: bindparam(f"new_{column}") for column in columns})
    connection.execute(
        statement, [{"key_": at, **{f"new_{name}": value for name, value in new.items()}} for at, new in rows.items()]
    )


def _add_credits(connection: Connection, credits_: Sequence[Values]) -> None:
    if not credits_:
        return
    table = _table(ContributorRow)
    changes: Values = {name: table.c[name] + bindparam(f"new_{name}") for name in TOTALS}
    changes["seen_unix_s"] = bindparam("new_seen_unix_s")
    newest = bindparam("new_last_receipt_seq", type_=BigInteger)  # none where nothing was credited
    changes["last_receipt_seq"] = func.coalesce(newest, table.c.last_receipt_seq)
    statement = update(table).where(table.c.number == bindparam("key_")).values(changes)
    connection.execute(statement, [_renamed(credit) for credit in credits_])


def _renamed(credit: Values) -> Values:
    values = {f"new_{name}": credit[name] for name in (*TOTALS, "seen_unix_s", "last_receipt_seq")}
    return {"key_": credit["number"], **values}


def _mark_late(connection: Connection, late: Sequence[Values]) -> None:
    """Work that came after its round had closed: the lease is only found under the peer that it was given to."""
    if not late:
        return
    table = _table(WorkRow)
    statement = (
        update(table)
        .where(table.c.lease_id == bindparam("key_"), table.c.contributor == bindparam("of"))
        .values(result="late", reason=bindparam("why"), committed_unix_s=bindparam("at"))
    )
    connection.execute(
        statement,
        [
            {"key_": row["lease_id"], "of": row["contributor"], "why": row["reason"], "at": row["committed_unix_s"]}
            for row in late
        ],
    )
