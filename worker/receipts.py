"""What the coordinator signed for accepted work, in one run's folder.

receipts.jsonl, receipts.1.jsonl    the newest receipts, a line each; at most twice MAX_BYTES
receipts-total.json                 what those before them came to

Older receipts are in the run's ledger. Each is an entry there, and names the hash of the entry before it: the newest
ones, kept here, prove all of the ledger up to them.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.documents import Receipt
from protocol.errors import VerificationError
from protocol.signing import Signed

MAX_BYTES = 4_000_000  # thousands of receipts: of some weeks


class Credit(BaseModel):
    """What receipts come to."""

    model_config = ConfigDict(frozen=True)

    tokens: int = 0
    accepted: int = 0
    last_seq: int = -1  # of the ledger: receipts up to it are counted


class Receipts:
    """The receipts of one run."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._newest = folder / "receipts.jsonl"
        self._older = folder / "receipts.1.jsonl"
        self._total = folder / "receipts-total.json"
        self._max_bytes = max_bytes

    def keep(self, signed: Signed) -> None:
        """Add a receipt. A full disk is not a reason to stop computing: the ledger has it too."""
        with suppress(OSError):
            with self._newest.open("a") as file:
                file.write(json.dumps(signed.to_json()) + "\n")
                is_full = file.tell() > self._max_bytes
            if is_full:
                self._rotate()

    def credit(self) -> Credit:
        """What all receipts came to, those that are no longer kept among them."""
        return _add(_add(self._read_total(), self._older), self._newest)

    def _rotate(self) -> None:
        """Drop the older half. The total is written first: after a crash here nothing is counted twice, by `last_seq`.

        Raises OSError.
        """
        total = _add(self._read_total(), self._older)
        temporary = self._total.with_suffix(".tmp")
        temporary.write_text(total.model_dump_json())
        temporary.replace(self._total)
        self._newest.replace(self._older)

    def _read_total(self) -> Credit:
        try:
            return Credit.model_validate_json(self._total.read_text())
        except (OSError, ValidationError):
            return Credit()


def _add(credit: Credit, path: Path) -> Credit:
    """With those receipts of a file that are not in it yet."""
    for receipt in _read(path):
        if receipt.seq > credit.last_seq:
            credit = Credit(tokens=credit.tokens + receipt.tokens, accepted=credit.accepted + 1, last_seq=receipt.seq)
    return credit


def _read(path: Path) -> Iterator[Receipt]:
    """What a crash cut short is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            with suppress(ValueError, VerificationError):
                yield Receipt.model_validate_json(Signed.from_json(json.loads(line)).body)
