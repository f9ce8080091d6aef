"""What the coordinator relies on, whatever the database: the same tests on SQLite and on PostgreSQL."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from coordinator.storage.database import Batch, Database, JournalRow, LedgerRow, RoundRow, sqlite_url
from protocol.errors import ConfigError, ManyhandsError
from protocol.identity import Identity
from protocol.signing import Signed

ROOT = Path(__file__).parents[2]
IDENTITY = Identity.generate()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


def journal_row(seq: int, event: bytes = b"{}") -> JournalRow:
    return JournalRow(seq=seq, now_s=seq + 0.1, unix_s=1_800_000_000.123456 + seq, event=event)


def ledger_row(seq: int, kind: str = "manifest", round_: int | None = None) -> LedgerRow:
    signed = IDENTITY.sign(f"entry {seq}".encode())
    return LedgerRow(
        seq=seq,
        kind=kind,
        round=round_,
        unix_s=1_800_000_000.5,
        body=signed.body,
        public_key=signed.public_key,
        signature=signed.signature,
    )


def round_row(index: int) -> RoundRow:
    return RoundRow(
        round=index,
        unix_s=1_800_000_000.5,
        seconds=12.25,
        tokens_after=2**53 - 1,
        contributions=3,
        payload_bytes=2**40,
        mean_loss=2.345678901234567,
    )


def journal_seqs(database: Database, after_seq: int = 0) -> list[int]:
    return [row.seq for row in database.read_journal(after_seq)]


def test_everything_is_read_back_unchanged_when_a_batch_was_committed(database: Database, database_url: str) -> None:
    signed = IDENTITY.sign(b"\x00\xff a header")
    database.commit(
        Batch(
            journal=[journal_row(1, b"\x00\xff")],
            ledger=[ledger_row(0, "genesis"), ledger_row(1, "manifest", 0)],
            documents=[signed],
            rounds=[round_row(0)],
            snapshot=(1, b"\x00state"),
        )
    )
    database.close()
    again = Database(database_url)
    row = next(again.read_journal(0))
    assert (row.seq, row.now_s, row.unix_s, row.event) == (1, 1.1, 1_800_000_001.123456, b"\x00\xff")
    entries = list(again.read_ledger())
    assert [(entry.seq, entry.kind, entry.round) for entry in entries] == [(0, "genesis", None), (1, "manifest", 0)]
    for entry in entries:
        entry.signed.verify()
    assert again.load_document(signed.hash) == signed
    kept = again.read_rounds()[0]
    assert (kept.tokens_after, kept.payload_bytes, kept.mean_loss) == (2**53 - 1, 2**40, 2.345678901234567)
    assert kept.held_out_loss is None
    assert again.load_snapshot() == (1, b"\x00state")
    assert again.last_event_s() == 1.1
    again.close()


def test_a_new_database_is_empty_when_it_is_opened(database: Database) -> None:
    assert journal_seqs(database) == []
    assert list(database.read_ledger()) == []
    assert database.last_ledger_entry() is None
    assert database.load_snapshot() is None
    assert database.load_document("0" * 64) is None
    assert database.read_rounds() == []
    assert database.last_event_s() == 0.0


def test_nothing_of_a_batch_is_left_when_its_last_row_breaks_a_key(database: Database) -> None:
    database.commit(Batch(journal=[journal_row(1)], ledger=[ledger_row(0)], rounds=[round_row(0)]))
    document = IDENTITY.sign(b"of the batch that fails")
    bad = Batch(
        journal=[journal_row(2), journal_row(3)],
        ledger=[ledger_row(1), ledger_row(2)],
        documents=[document],
        held_out={0: 1.5},
        snapshot=(3, b"ahead"),
        rounds=[round_row(1), round_row(0)],  # round 0 was closed before
    )
    with pytest.raises(ManyhandsError) as caught:
        database.commit(bad)
    assert "\n" not in str(caught.value)
    assert journal_seqs(database) == [1]
    assert [entry.seq for entry in database.read_ledger()] == [0]
    assert [row.round for row in database.read_rounds()] == [0]
    assert database.read_rounds()[0].held_out_loss is None
    assert database.load_document(document.hash) is None
    assert database.load_snapshot() is None
    database.commit(Batch(journal=[journal_row(2)]))  # and it still works
    assert journal_seqs(database) == [1, 2]


def test_journal_is_read_in_order_when_it_is_long(database: Database) -> None:
    database.commit(Batch(journal=[journal_row(seq) for seq in range(2500, 0, -1)]))
    assert journal_seqs(database) == list(range(1, 2501))
    assert journal_seqs(database, after_seq=2400) == list(range(2401, 2501))
    assert database.last_event_s() == 2500.1


def test_ledger_is_filtered_when_kinds_or_rounds_are_asked_for(database: Database) -> None:
    rows = [ledger_row(0, "genesis")]
    for round_ in range(4):
        kinds = ["manifest", "receipt", "receipt", "evaluation"]
        rows += [
            ledger_row(len(rows) + place, kind, None if kind == "evaluation" else round_)
            for place, kind in enumerate(kinds)
        ]
    database.commit(Batch(ledger=rows))
    assert [entry.seq for entry in database.read_ledger(from_seq=14)] == [14, 15, 16]
    manifests = database.read_ledger(kinds=("manifest",), from_round=2)
    assert [(entry.kind, entry.round) for entry in manifests] == [("manifest", 2), ("manifest", 3)]
    assert {entry.kind for entry in database.read_ledger(kinds=("genesis", "evaluation"))} == {"genesis", "evaluation"}
    last = database.last_ledger_entry()
    assert last is not None
    assert (last.seq, last.kind) == (16, "evaluation")


def test_newest_rounds_are_read_oldest_first_when_only_some_are_asked_for(database: Database) -> None:
    database.commit(Batch(rounds=[round_row(index) for index in (3, 0, 2, 1)]))
    assert [row.round for row in database.read_rounds()] == [0, 1, 2, 3]
    assert [row.round for row in database.read_rounds(last=2)] == [2, 3]


def test_snapshot_is_replaced_when_a_newer_one_comes(database: Database) -> None:
    for seq in (10, 20):
        database.commit(Batch(snapshot=(seq, f"state {seq}".encode())))
    assert database.load_snapshot() == (20, b"state 20")


def test_document_is_kept_once_when_it_is_sent_twice(database: Database) -> None:
    signed = IDENTITY.sign(b"a header that was sent again")
    database.commit(Batch(documents=[signed, signed]))
    database.commit(Batch(documents=[signed]))
    assert database.load_document(signed.hash) == signed


def test_held_out_loss_is_added_when_the_round_is_known(database: Database) -> None:
    database.commit(Batch(rounds=[round_row(0)], held_out={0: 2.5}))  # in the batch that closes it
    database.commit(Batch(rounds=[round_row(1)]))
    database.commit(Batch(held_out={1: 2.25, -1: 9.0, 7: 9.0}))  # later; and of rounds that there are not
    assert [row.held_out_loss for row in database.read_rounds()] == [2.5, 2.25]


def test_reading_goes_on_when_batches_are_committed_meanwhile(database: Database) -> None:
    database.commit(Batch(ledger=[ledger_row(seq) for seq in range(5)]))
    entries = database.read_ledger()
    assert next(entries).seq == 0
    database.commit(Batch(ledger=[ledger_row(5)]))
    assert [entry.seq for entry in entries][:4] == [1, 2, 3, 4]


# ---- what ends with a sentence


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:s3cret@127.0.0.1:1/run",
        "postgresql://ann:s3cret@127.0.0.1:1/run?password=s3cret",
        "postgresql://ann:s3cret@no port/run",
        "postgresql://ann:p@s3cret@127.0.0.1:1/run",
        "postgresql://ann:p:s3cret@127.0.0.1:1/run",
        "postgresql://ann:p/s3cret@127.0.0.1:1/run",
        "postgresql+nodriver://ann:s3cret@127.0.0.1:1/run",
        "mysql://ann:s3cret@127.0.0.1:1/run",
        "s3cret",
        "",
        "sqlite:////no/such/folder/run.db",
    ],
)
def test_error_is_one_line_without_the_password_when_the_url_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(url)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "database" in str(caught.value)


def test_error_is_a_sentence_when_the_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"once upon a time " * 100)
    with pytest.raises(ConfigError, match="not a database"):
        Database(sqlite_url(tmp_path))


# ---- SIGKILL

COMMIT_FOREVER = """
import sys
from coordinator.storage.database import Batch, Database
from tests.contract.test_database import journal_row, ledger_row, round_row, signed_of_batch

database = Database(sys.argv[1])
batch = len(database.read_rounds())
print("ready", flush=True)
while True:
    database.commit(
        Batch(
            journal=[journal_row(3 * batch + place, b"x" * 2000) for place in (1, 2, 3)],
            ledger=[ledger_row(2 * batch + place, round_=batch) for place in (0, 1)],
            documents=[signed_of_batch(batch)],
            rounds=[round_row(batch)],
            held_out={batch - 1: 1.0},
            snapshot=(3 * batch + 3, b"s" * 5000),
        )
    )
    batch += 1
    print(batch, flush=True)
"""


def signed_of_batch(batch: int) -> Signed:
    """The same document for the same batch in every process; its signature is not looked at."""
    return Signed(body=f"batch {batch}".encode(), public_key=bytes(32), signature=bytes(64))


def wait_for_the_killed_ones_connection(database: Database) -> None:
    """PostgreSQL finishes what it was asked for, and may notice only then that nobody listens any more."""
    if database.engine.dialect.name != "postgresql":
        return
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with database.engine.connect() as connection:
        for _ in range(100_000):
            if connection.execute(text(others)).scalar() == 0:
                return
            connection.rollback()
    raise AssertionError("the killed process's connection is still there")


def test_whole_batches_are_there_when_the_process_is_killed_at_any_moment(database_url: str) -> None:
    """The ledger, the journal and the rounds agree; nothing that was acknowledged is missing."""
    acknowledged = 0
    for num_lines in (1, 2, 11, 30, 50):  # killed while it writes the next batch
        process = subprocess.Popen(
            [sys.executable, "-c", COMMIT_FOREVER, database_url],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            output = "".join(process.stdout.readline() for _ in range(num_lines))
            process.send_signal(signal.SIGKILL)
            output += process.stdout.read()
        complete_lines = output.split("\n")[:-1]
        acknowledged = max([acknowledged, *map(int, complete_lines[1:])])
        database = Database(database_url)
        wait_for_the_killed_ones_connection(database)
        whole = len(database.read_rounds())
        assert whole >= acknowledged
        assert journal_seqs(database) == list(range(1, 3 * whole + 1))
        assert [entry.seq for entry in database.read_ledger()] == list(range(2 * whole))
        assert [row.round for row in database.read_rounds()] == list(range(whole))
        assert all(database.load_document(signed_of_batch(batch).hash) for batch in range(whole))
        assert database.load_document(signed_of_batch(whole).hash) is None
        assert (database.load_snapshot() or (0, b""))[0] == 3 * whole
        database.close()
    assert acknowledged > 80
