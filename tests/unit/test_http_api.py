"""The HTTP API over a run with a real database and the real engine, as a client sees it."""

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from coordinator.core import events as ev
from coordinator.dashboard.api import make_router
from coordinator.engine import Engine
from tests.recorded_run import RUN_ID, RecordedRun

ADDRESSES = (
    "/api/status",
    "/api/coordinator",
    "/api/waterfall",
    "/api/rounds",
    "/api/incidents",
    "/api/markers",
    "/api/leaderboard",
    "/api/communication",
    "/api/receipts",
    "/api/proof/0",
    "/api/curves",
    "/api/cost",
)
TABLES = ("rounds", "work", "incidents", "markers", "receipts", "peers")


@pytest.fixture
def run(tmp_path: Path) -> RecordedRun:
    """Three rounds of two workers, and a fourth that is open."""
    run = RecordedRun(tmp_path)
    ann, bob = run.meet("ann", "=HYPERLINK(bob)")
    run.start(ann, bob)
    for _ in range(3):
        run.contribute(ann, bob)
        run.report(ann, bob)
    run.send(ev.PeerLeft(peer=bob, reason="the session ended"))
    return run


@pytest.fixture
def client(run: RecordedRun, tmp_path: Path) -> TestClient:
    engine = Engine.recover(run.database, run.ledger, run.fresh_state())
    server: Any = SimpleNamespace(
        engine=engine,
        database=run.database,
        folder=SimpleNamespace(path=tmp_path),
        run=SimpleNamespace(run_id=RUN_ID),
        sessions=SimpleNamespace(connected=list),
        status=lambda: {"phase": "train", "round": engine.state.rounds_merged},
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(make_router(server))
    return TestClient(app)


def test_every_address_answers_and_is_described(client: TestClient) -> None:
    described = client.get("/api/openapi.json").json()
    assert set(described["paths"]) == {
        *(address for address in ADDRESSES if address != "/api/proof/0"),
        "/api/proof/{seq}",
        "/api/peers/{peer}",
        "/api/export/{table}.{kind}",
    }
    assert all(set(methods) == {"get"} for methods in described["paths"].values())
    for address in ADDRESSES:
        answer = client.get(address)
        assert answer.status_code == 200, (address, answer.text)
        assert answer.json(), address
    assert "Bar" in described["components"]["schemas"]


def test_documentation_names_every_address(client: TestClient) -> None:
    text = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    for path in client.get("/api/openapi.json").json()["paths"]:
        assert f"`{path}" in text


def test_values_are_those_of_the_run(client: TestClient, run: RecordedRun) -> None:
    assert [line["round"] for line in client.get("/api/rounds?last=2").json()] == [1, 2]
    live = client.get("/api/waterfall").json()
    assert (live["round"], live["closed_unix_s"]) == (3, None)
    assert client.get("/api/waterfall?round=1").json()["round"] == 1
    board = client.get("/api/leaderboard").json()
    assert [line["tokens"] for line in board] == [240, 240]
    peer = client.get(f"/api/peers/{board[0]['peer']}").json()
    assert peer["credited"][-1]["tokens"] == 240
    facts = client.get("/api/coordinator").json()
    assert {lease["status"] for lease in facts["leases"]} == {"open", "away"}
    assert facts["journal_events"] == run.seq


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("/api/waterfall?round=77", 404),
        ("/api/waterfall?round=-1", 422),
        ("/api/peers/nobody", 404),
        ("/api/proof/77", 404),
        ("/api/proof/99999999999999999999", 422),
        ("/api/incidents?limit=1001", 422),
        ("/api/export/documents.csv", 422),
        ("/api/export/journal.parquet", 422),
        ("/api/export/rounds.exe", 422),
    ],
)
def test_what_is_not_there_is_refused(client: TestClient, address: str, code: int) -> None:
    assert client.get(address).status_code == code


@pytest.mark.parametrize("table", TABLES)
def test_exports_hold_the_same_rows_in_both_formats(
    client: TestClient, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.records.export.ROWS_A_PIECE", 2)  # so that there are several pieces
    answer = client.get(f"/api/export/{table}.csv")
    assert answer.headers["content-disposition"] == f'attachment; filename="{RUN_ID}-{table}.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    parquet = pq.read_table(io.BytesIO(client.get(f"/api/export/{table}.parquet").content))
    assert parquet.column_names == list(rows[0])
    assert parquet.num_rows == len(rows) == {"rounds": 3, "work": 6, "receipts": 6, "peers": 2}.get(table, len(rows))
    for name in set(parquet.column_names) & {"round", "tokens", "lease_id", "seq", "id"}:
        assert [int(row[name]) for row in rows] == parquet[name].to_pylist()


def test_a_name_is_no_formula_in_a_spreadsheet(client: TestClient) -> None:
    rows = list(csv.DictReader(io.StringIO(client.get("/api/export/peers.csv").text)))
    assert [row["name"] for row in rows] == ["ann", "'=HYPERLINK(bob)"]
