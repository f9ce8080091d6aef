"""A worker's receipts take little room, and what they come to is never lost."""

import json
from pathlib import Path

import pytest

from protocol.documents import Receipt, sign
from protocol.identity import Identity
from protocol.signing import Signed
from worker import receipts as module
from worker.receipts import Credit, Receipts

COORDINATOR = Identity.generate()
PEER = Identity.generate().peer_id


def make_receipt(seq: int) -> Signed:
    return sign(
        Receipt(
            run_id="0" * 16,
            seq=seq,
            previous="0" * 64,
            round=seq,
            peer=PEER,
            lease_id=seq,
            shards=(),
            tokens=100 + seq,
            contribution={},
        ),
        COORDINATOR,
    )


def keep(folder: Path, seqs: range, max_bytes: int) -> None:
    for seq in seqs:
        Receipts(folder, max_bytes).keep(make_receipt(seq))


def total_of(num_receipts: int) -> Credit:
    return Credit(
        tokens=sum(100 + seq for seq in range(num_receipts)), accepted=num_receipts, last_seq=num_receipts - 1
    )


def test_nothing_is_credited_before_the_first_receipt(tmp_path: Path) -> None:
    assert Receipts(tmp_path).credit() == Credit()


def test_files_stay_small_and_the_sum_stays_whole(tmp_path: Path) -> None:
    keep(tmp_path, range(100), max_bytes=4000)
    receipts = Receipts(tmp_path, 4000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12_000
    assert receipts.credit() == total_of(100)
    lines = "".join((tmp_path / name).read_text() for name in ("receipts.1.jsonl", "receipts.jsonl")).splitlines()
    kept = [json.loads(json.loads(line)["body"])["seq"] for line in lines]
    assert kept == list(range(kept[0], 100))  # the newest, without a gap
    assert 0 < kept[0] < 99


def test_nothing_is_counted_twice_when_a_crash_comes_between_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, range(20), max_bytes=4000)
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if self.name == "receipts.jsonl":
            raise OSError("the power went")
        return replace(self, target)

    monkeypatch.setattr(module.Path, "replace", crash)
    keep(tmp_path, range(20, 21), max_bytes=1)  # the total is written, the files stay
    assert Receipts(tmp_path, 4000).credit() == total_of(21)
    monkeypatch.undo()
    keep(tmp_path, range(21, 60), max_bytes=4000)
    assert Receipts(tmp_path, 4000).credit() == total_of(60)


def test_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    keep(tmp_path, range(3), max_bytes=4000)
    path = tmp_path / "receipts.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert Receipts(tmp_path).credit() == total_of(2)
