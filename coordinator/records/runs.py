"""Curves and cost, of this run and of the runs beside it, whose databases are opened for reading only.

Energy is an estimate: the compute time that accepted contributions name, times a stated power for each class of device.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, func, inspect, literal_column, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from coordinator.records.reader import stride_of
from coordinator.records.views import Cost, Curves, DeviceCost, EarlierRun, Loss, RunCost
from coordinator.storage.database import LedgerRow, RoundRow
from coordinator.storage.records import ContributorRow
from protocol.documents import Contribution, Receipt

MAX_RUNS = 200
MAX_RECEIPTS = 100_000
# Watts while it computes: stated figures for a class, not measured on anybody's machine. First pattern that fits.
WATTS: dict[str, float] = {
    "data-centre GPU": 600.0,
    "GPU": 250.0,
    "Apple": 40.0,
    "CPU": 65.0,
}
_CLASSES = (
    ("data-centre GPU", re.compile(r"\b([ABHL]\d{2,3}|GH?\d{3}|V100|MI\d{3}|Tesla|Instinct)", re.IGNORECASE)),
    ("GPU", re.compile(r"NVIDIA|GeForce|RTX|GTX|Radeon|\d GB$", re.IGNORECASE)),
    ("Apple", re.compile(r"^Apple", re.IGNORECASE)),
)


def classify(device: str) -> str:
    """The class of a device from a worker's words about it."""
    return next((name for name, pattern in _CLASSES if pattern.search(device)), "CPU")


def read_curves(engine: Engine) -> Curves:
    """The run's training and held-out loss."""
    with engine.connect() as connection:
        return _read_curves(connection)


def read_earlier_runs(folder: Path) -> tuple[EarlierRun, ...]:
    """The run folders beside `folder` (this run's) with merged rounds, newest first."""
    runs = []
    for other in _beside(folder):
        try:
            with _open_for_reading(other) as connection:
                rounds = connection.execute(select(func.count()).select_from(RoundRow)).scalar() or 0
        except SQLAlchemyError:
            continue
        if rounds:
            runs.append(EarlierRun(folder=other.name, name=other.name, rounds=rounds))
    return tuple(runs)


def read_earlier_run(folder: Path) -> Curves | None:
    """The curves of a run folder, or None when it cannot be read."""
    try:
        with _open_for_reading(folder) as connection:
            return _read_curves(connection)
    except SQLAlchemyError:
        return None


def read_cost(engine: Engine, folder: Path) -> Cost:
    """Accepted work of this run, kept in `folder`, and of the runs beside it."""
    with engine.connect() as connection:
        runs = [_read_run_cost(connection, folder.name)]
    unread = []
    for other in _beside(folder):
        try:
            with _open_for_reading(other) as connection:
                runs.append(_read_run_cost(connection, other.name))
        except SQLAlchemyError:
            unread.append(other.name)
    return Cost(runs=tuple(runs), watts=WATTS, unread=tuple(unread))


def _beside(folder: Path) -> list[Path]:
    found = [path.parent for path in folder.resolve().parent.glob("*/run.db")]
    others = [path for path in found if path != folder.resolve()]
    return sorted(others, key=lambda path: -(path / "run.db").stat().st_mtime)[:MAX_RUNS]


@contextmanager
def _open_for_reading(folder: Path) -> Iterator[Connection]:
    engine = create_engine(f"sqlite:///file:{folder.resolve()}/run.db?mode=ro&uri=true", poolclass=NullPool)
    with engine.connect() as connection:
        yield connection


def _read_curves(connection: Connection) -> Curves:
    first, last = connection.execute(select(func.min(RoundRow.unix_s), func.max(RoundRow.round))).one()
    stride = stride_of(last)
    return Curves(
        train=_read_curve(connection, RoundRow.mean_loss, first, stride),
        held_out=_read_curve(connection, RoundRow.held_out_loss, first, stride),
    )


def _read_curve(connection: Connection, column: Any, first_unix_s: float | None, stride: int) -> tuple[Loss, ...]:
    bucket = RoundRow.round.op("/")(literal_column(str(stride)))
    query = (
        select(func.max(RoundRow.round), func.max(RoundRow.tokens_after), func.max(RoundRow.unix_s), func.avg(column))
        .where(column.is_not(None))
        .group_by(bucket)
        .order_by(bucket)
    )
    return tuple(
        Loss(round=round_, tokens=tokens, unix_s=unix_s, elapsed_s=unix_s - (first_unix_s or unix_s), loss=loss)
        for round_, tokens, unix_s, loss in connection.execute(query)
    )


def _read_run_cost(connection: Connection, folder: str) -> RunCost:
    rounds, tokens = connection.execute(select(func.count(), func.max(RoundRow.tokens_after))).one()
    credited = {}
    if inspect(connection).has_table(ContributorRow.__tablename__):
        credited = _sum_contributors(connection)
    note = ""
    if not credited and rounds:
        credited, note = _sum_receipts(connection)
    elif credited:
        older = select(func.count()).where(ContributorRow.joined_unix_s.is_(None), ContributorRow.tokens > 0)
        if connection.execute(older).scalar():
            note = "hours of before these records began are not counted"
    devices = tuple(
        DeviceCost(
            device_class=name,
            hours=seconds / 3600,
            tokens=count,
            watts=WATTS.get(name, WATTS["CPU"]),
            energy_kwh=seconds / 3600 * WATTS.get(name, WATTS["CPU"]) / 1000,
        )
        for name, (seconds, count) in sorted(credited.items())
    )
    return RunCost(
        folder=folder,
        name=folder,
        rounds=rounds,
        tokens=tokens or 0,
        hours=sum(device.hours for device in devices),
        energy_kwh=sum(device.energy_kwh for device in devices),
        devices=devices,
        note=note,
    )


def _sum_contributors(connection: Connection) -> dict[str, tuple[float, int]]:
    """Compute seconds and tokens by device class."""
    sums: dict[str, tuple[float, int]] = {}
    query = select(ContributorRow.device, func.sum(ContributorRow.compute_s), func.sum(ContributorRow.tokens))
    for device, compute_s, tokens in connection.execute(
        query.where(ContributorRow.tokens > 0).group_by(ContributorRow.device)
    ):
        seconds, count = sums.get(classify(device), (0.0, 0))
        sums[classify(device)] = seconds + compute_s, count + int(tokens)
    return sums


def _sum_receipts(connection: Connection) -> tuple[dict[str, tuple[float, int]], str]:
    """The same from the signed receipts of a run that is older than these records; they do not name devices."""
    seconds, tokens, count = 0.0, 0, 0
    query = select(LedgerRow.body).where(LedgerRow.kind == "receipt").order_by(LedgerRow.seq).limit(MAX_RECEIPTS)
    for (body,) in connection.execute(query):
        count += 1
        receipt = Receipt.model_validate_json(body)
        seconds += Contribution.model_validate_json(receipt.contribution["body"]).compute_s
        tokens += receipt.tokens
    note = "devices are not on record; counted as CPU"
    if count == MAX_RECEIPTS:
        note += f"; only the first {MAX_RECEIPTS:,} receipts are counted"
    return {"CPU": (seconds, tokens)}, note
