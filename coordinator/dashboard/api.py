"""The read-only HTTP API under /api. Answers are the plain values of coordinator.records.views; /api/openapi.json has
their schema. No invite and no token is in any of it.

Readings of the records are done in threads, a few at a time, and kept for a moment: many who ask cost as one.
"""

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import quantiles
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, HTTPException, Path, Query
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import Engine, select

from coordinator.records import reader, runs, views
from coordinator.records.export import export_csv, export_parquet
from coordinator.server import Server
from coordinator.storage.database import RoundRow

T = TypeVar("T")
READINGS_AT_ONCE = 2
EXPORTS_AT_ONCE = 4
KEEP_READINGS = 64
FRESH_S = 1.0
COST_FRESH_S = 60.0
MEDIA_TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}

Limit = Annotated[int, Query(ge=1, le=1000)]
PeerId = Annotated[str, Path(max_length=64)]
Table = Literal["rounds", "work", "incidents", "markers", "receipts", "peers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLine:
    """A merged round. seconds: from its opening to its close; payload_bytes: of what was merged."""

    round: int
    unix_s: float
    seconds: float
    tokens_after: int
    contributions: int
    payload_bytes: int
    mean_loss: float
    held_out_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLease:
    """A lease of the open round. expires_in_s: until the round's deadline, below zero when it has passed."""

    peer: str
    lease_id: int
    status: str
    age_s: float
    expires_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorFacts:
    """How the coordinator itself does. Quantiles are of the last 1000; None before the second.

    commit: a transaction. wait: of an event, from its arrival until it was taken. waiting: events that wait now.
    """

    started_unix_s: float
    journal_events: int
    commits: int
    commit_p50_s: float | None
    commit_p99_s: float | None
    wait_p99_s: float | None
    wait_max_s: float | None
    waiting: int
    sessions: int
    disk_free_bytes: int
    disk_total_bytes: int
    leases: tuple[OpenLease, ...]


class _Readings:
    """Answers by what was asked, for a moment."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[float, Any]] = {}
        self._slots = asyncio.Semaphore(READINGS_AT_ONCE)

    async def read(self, function: Callable[..., T], *arguments: Any, fresh_s: float = FRESH_S) -> T:
        key = (function, *arguments)
        async with self._slots:
            read_s, answer = self._kept.pop(key, (float("-inf"), None))
            if time.monotonic() - read_s > fresh_s:
                answer = await asyncio.to_thread(function, *arguments)
                read_s = time.monotonic()
            self._kept[key] = (read_s, answer)
            while len(self._kept) > KEEP_READINGS:
                del self._kept[next(iter(self._kept))]
            found: T = answer
            return found


def make_router(server: Server) -> APIRouter:
    """All of /api for one run."""
    router = APIRouter(prefix="/api")
    readings, engine = _Readings(), server.database.readers
    _add_state(router, server, readings)
    _add_records(router, server, readings)
    _add_exports(router, server)

    @router.get("/curves", summary="Training and held-out loss, at most about 500 points each")
    async def read_curves() -> views.Curves:
        return await readings.read(runs.read_curves, engine)

    @router.get("/cost", summary="Accepted device-hours and an energy estimate, of this run and those beside it")
    async def read_cost() -> views.Cost:
        return await readings.read(runs.read_cost, engine, server.folder.path, fresh_s=COST_FRESH_S)

    @router.get("/openapi.json", include_in_schema=False)
    async def read_schema() -> dict[str, Any]:
        return get_openapi(title="manyhands", version="1", summary="A run, read-only.", routes=router.routes)

    return router


def _add_state(router: APIRouter, server: Server, readings: _Readings) -> None:
    """What is in the coordinator's memory: answered without the database."""
    latest: list[tuple[float, JSONResponse]] = []

    @router.get("/status", summary="The run now: phase, verdict, loss, peers. As `coordinator status --json`")
    async def read_status() -> dict[str, Any]:
        now = time.monotonic()
        if not latest or now - latest[0][0] > FRESH_S / 2:
            latest[:] = [(now, JSONResponse(server.status()))]
        return latest[0][1]  # type: ignore[return-value] # a response made before, for all who ask in this moment

    @router.get("/coordinator", summary="Commit times, queue, leases, disk")
    async def read_coordinator() -> CoordinatorFacts:
        return describe_coordinator(server)

    @router.get("/waterfall", summary="One round's leases: the open round, or the one that is named")
    async def read_waterfall(round: Annotated[int | None, Query(ge=0)] = None) -> views.Waterfall:  # noqa: A002 - the word in the URL
        live = server.engine.recorder.open_round()
        if live is not None and round in (None, live.round):
            return live
        return _found(await readings.read(reader.read_waterfall, server.database.readers, round), "round")


def _add_records(router: APIRouter, server: Server, readings: _Readings) -> None:
    engine = server.database.readers

    @router.get("/rounds", summary="Merged rounds, oldest first")
    async def read_rounds(last: Annotated[int, Query(ge=1, le=100_000)] = 1000) -> list[RoundLine]:
        return await readings.read(_read_rounds, engine, last)

    @router.get("/peers/{peer}", summary="One peer: totals, credit over time, last leases")
    async def read_peer(peer: PeerId) -> views.PeerHistory:
        return _found(await readings.read(reader.read_peer, engine, peer), "peer")

    @router.get("/incidents", summary="What went wrong, newest first")
    async def read_incidents(limit: Limit = 200) -> tuple[views.Incident, ...]:
        return await readings.read(reader.read_incidents, engine, limit)

    @router.get("/markers", summary="What to mark on the curves, oldest first")
    async def read_markers(limit: Limit = 500) -> tuple[views.Marker, ...]:
        return await readings.read(reader.read_markers, engine, limit)

    @router.get("/leaderboard", summary="Workers by credited tokens")
    async def read_leaderboard(limit: Limit = 1000) -> tuple[views.Standing, ...]:
        return await readings.read(reader.read_leaderboard, engine, limit)

    @router.get("/communication", summary="Bytes for each verified token; computing, exchanging, waiting; plans")
    async def read_communication() -> views.Communication:
        return await readings.read(reader.read_communication, engine)

    @router.get("/receipts", summary="Receipts, newest first; `before_seq` pages on")
    async def read_receipts(
        peer: Annotated[str | None, Query(max_length=64)] = None,
        limit: Limit = 100,
        before_seq: Annotated[int | None, Query(ge=0)] = None,
    ) -> tuple[views.ReceiptLine, ...]:
        return await readings.read(reader.read_receipts, engine, peer, limit, before_seq)

    @router.get("/proof/{seq}", summary="A ledger entry as it was signed, and its place in the chain")
    async def read_proof(seq: Annotated[int, Path(ge=0, lt=1 << 53)]) -> views.Proof:
        return _found(await readings.read(reader.read_proof, engine, seq), "ledger entry")


def _add_exports(router: APIRouter, server: Server) -> None:
    running: set[object] = set()

    @router.get("/export/{table}.{kind}", summary="A whole table", response_class=StreamingResponse)
    async def export(table: Table, kind: Literal["csv", "parquet"]) -> StreamingResponse:
        if len(running) >= EXPORTS_AT_ONCE:
            raise HTTPException(503, "too many exports are running; try again in a minute", {"Retry-After": "60"})
        write = export_csv if kind == "csv" else export_parquet
        name = f'attachment; filename="{server.run.run_id}-{table}.{kind}"'
        pieces = _counted(write(server.database.readers, table), running)
        return StreamingResponse(pieces, media_type=MEDIA_TYPES[kind], headers={"Content-Disposition": name})


def _counted(pieces: Iterator[bytes], running: set[object]) -> Iterator[bytes]:
    running.add(pieces)
    try:
        yield from pieces
    finally:
        running.discard(pieces)


def _found(answer: T | None, what: str) -> T:
    if answer is None:
        raise HTTPException(404, f"there is no such {what} on record")
    return answer


def _read_rounds(engine: Engine, last: int) -> list[RoundLine]:
    query = select(*RoundRow.__table__.columns).order_by(RoundRow.round.desc()).limit(last)
    with engine.connect() as connection:
        return [RoundLine(**row._mapping) for row in connection.execute(query)][::-1]


def describe_coordinator(server: Server) -> CoordinatorFacts:
    """How the coordinator does now. From memory; call it in the coordinator's own thread."""
    engine = server.engine
    commits, waits = sorted(engine.commit_seconds), sorted(engine.wait_seconds)
    disk = shutil.disk_usage(server.folder.path)
    round_, now_s = engine.state.round, engine.now_s()
    return CoordinatorFacts(
        started_unix_s=engine.started_unix_s,
        journal_events=engine.journal_seq,
        commits=len(commits),
        commit_p50_s=commits[len(commits) // 2] if commits else None,
        commit_p99_s=_p99(commits),
        wait_p99_s=_p99(waits),
        wait_max_s=waits[-1] if waits else None,
        waiting=engine.num_waiting,
        sessions=len(server.sessions.connected()),
        disk_free_bytes=disk.free,
        disk_total_bytes=disk.total,
        leases=tuple(
            OpenLease(
                peer=lease.peer,
                lease_id=lease.lease_id,
                status=lease.status.value,
                age_s=round(now_s - lease.granted_s, 3),
                expires_in_s=round(round_.deadline_s - now_s, 3),
            )
            for lease in round_.leases.values()
        )
        if round_
        else (),
    )


def _p99(values: list[float]) -> float | None:
    return quantiles(values, n=100)[-1] if len(values) > 1 else None
