"""What goes on record is kept and read alike on SQLite and on PostgreSQL."""

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sqlalchemy import text

from coordinator.core import events as ev
from coordinator.records import reader, runs
from coordinator.records.export import TABLES, export_csv, export_parquet
from coordinator.records.recorder import read_on_record
from coordinator.storage.database import Batch, Database, JournalRow
from protocol.errors import ManyhandsError
from tests.recorded_run import RecordedRun


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Iterator[RecordedRun]:
    run = RecordedRun(tmp_path, database_url)
    yield run
    run.database.close()


def test_records_are_read_back_when_a_run_has_gone_on(run: RecordedRun) -> None:
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    for _ in range(3):
        run.contribute(ann, bob)
        run.report(ann, bob)
    run.check(bob, run.commit(bob).payload_hash, refused_because="the vector is not finite")
    run.send(ev.PeerLeft(peer=ann, reason="the session ended"))
    engine = run.database.readers
    assert [line.tokens for line in reader.read_leaderboard(engine)] == [240, 240]
    waterfall = reader.read_waterfall(engine, 1)
    assert waterfall is not None
    assert [bar.result for bar in waterfall.bars] == ["accepted", "accepted"]
    assert all(bar.merged_unix_s is not None for bar in waterfall.bars)
    history = reader.read_peer(engine, ann)
    assert history is not None
    assert [point.tokens for point in history.credited] == [80, 160, 240]
    assert {incident.kind for incident in reader.read_incidents(engine)} >= {"refused", "lost_peer"}
    assert "join" in {marker.kind for marker in reader.read_markers(engine)}
    assert reader.read_communication(engine).tokens == 480
    assert len(reader.read_receipts(engine, peer=ann)) == 3
    assert len(runs.read_curves(engine).train) == 3
    assert runs.read_cost(engine, run.folder).runs[0].tokens == 480
    kept = read_on_record(run.database.engine)
    assert kept.numbers == {ann: 1, bob: 2}
    assert {episode.kind for episode in kept.lasting} == {"void_round"}


def test_hostile_words_and_numbers_of_a_peer_do_not_stop_the_coordinator(run: RecordedRun) -> None:
    """PostgreSQL refuses NUL, integers beyond a column's, and sums that overflow; a refused write would end it."""
    ann, bob = run.meet("ann", "bob")
    run.start(ann, bob)
    run.compute_s = 1e308
    for _ in range(2):
        run.send(ev.LeaseReturned(peer=bob, lease_id=run.granted[bob].lease_id, reason="\0" * 400 + "'; --"))
        run.now_s += 10
        run.check(ann, run.commit(ann, inner_steps=2**53 - 1).payload_hash)
        run.report(ann, bob)
    run.send(ev.PeerLeft(peer=bob, reason="\0bye"))
    engine = run.database.readers
    assert reader.read_leaderboard(engine)[0].compute_s <= 25.0
    waterfall = reader.read_waterfall(engine, 0)
    assert waterfall is not None
    assert {bar.reason for bar in waterfall.bars} == {"", "'; --"}


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_exported_whole(run: RecordedRun, table: str) -> None:
    (ann,) = run.meet("ann")
    run.start(ann)
    run.contribute(ann)
    run.send(ev.PeerLeft(peer=ann, reason="the session ended"))
    lines = b"".join(export_csv(run.database.readers, table)).decode().splitlines()
    parquet = pq.read_table(io.BytesIO(b"".join(export_parquet(run.database.readers, table))))
    assert parquet.num_rows > 0
    assert lines[0].split(",") == parquet.column_names


def test_records_are_not_written_when_their_batch_fails(run: RecordedRun) -> None:
    (ann,) = run.meet("ann")
    run.start(ann)
    batch = Batch(journal=[JournalRow(seq=1, now_s=0.0, unix_s=0.0, event=b"{}")])  # there is one already
    batch.records.new_contributors[9] = {
        "number": 9,
        "peer": "x",
        "name": "",
        "device": "",
        "role": "worker",
        "seen_unix_s": 0.0,
        "joined_unix_s": None,
        "accepted": 0,
        "late": 0,
        "refused": 0,
        "tokens": 0,
        "compute_s": 0.0,
        "payload_bytes": 0,
    }
    with pytest.raises(ManyhandsError):
        run.database.commit(batch)
    assert [line.peer for line in reader.read_leaderboard(run.database.readers)] == [ann]


def test_an_older_run_folder_gets_the_tables_and_its_peers_when_it_is_opened(
    run: RecordedRun, database_url: str
) -> None:
    """As a folder of before these records: the other tables are there, with peers in the state."""
    (ann,) = run.meet("ann")
    run.start(ann)
    run.contribute(ann)
    with run.database.engine.begin() as connection:
        for table in ("work", "contributors", "incidents", "markers", "round_splits"):
            connection.execute(text(f"DROP TABLE {table}"))
    run.database.close()
    run.database = Database(database_url)
    run.restart()
    board = reader.read_leaderboard(run.database.readers)
    assert [(line.peer, line.tokens, line.accepted) for line in board] == [(ann, 80, 1)]
    run.start(ann)
    run.contribute(ann)
    assert reader.read_leaderboard(run.database.readers)[0].tokens == 160
    assert "before these records" in runs.read_cost(run.database.readers, run.folder).runs[0].note
