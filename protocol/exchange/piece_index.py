"""The piece index of a blob: what each of its pieces hashes to, so that every piece can be checked as it arrives.

A blob above PIECE_BYTES has one: the 32-byte SHA-256 of its pieces, one after the other. The index is itself a blob,
named by its hash (`pieces_hash` in a contribution and in a manifest). A smaller blob is one piece, and its own hash
checks it.

An index says nothing about the blob's hash: whoever announces both is believed only after somebody has compared them
(the coordinator does, before a manifest names them), and whoever assembles the blob hashes it as a whole.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import VerificationError

PIECE_BYTES = 1 << 18
DIGEST_BYTES = 32


def has_index(size_bytes: int) -> bool:
    """Whether a blob of that size has a piece index."""
    return size_bytes > PIECE_BYTES


def index_bytes(size_bytes: int) -> int:
    """Size in bytes of the piece index of a blob of `size_bytes`."""
    return DIGEST_BYTES * -(-size_bytes // PIECE_BYTES)


def make_piece_index(blob: bytes | memoryview | Path) -> bytes:
    """The piece index of a blob, given as bytes or as a file; a file is read one piece at a time."""
    return b"".join(hashlib.sha256(piece).digest() for piece in _pieces(blob))


def _pieces(blob: bytes | memoryview | Path) -> Iterator[bytes | memoryview]:
    if isinstance(blob, Path):
        with blob.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    else:
        view = memoryview(blob).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


@dataclass(frozen=True, slots=True)
class PieceIndex:
    """The index of a blob of `size_bytes`. Made by `parse`."""

    size_bytes: int
    digests: bytes

    @classmethod
    def parse(cls, data: bytes, size_bytes: int) -> "PieceIndex":
        """Raises VerificationError when `data` cannot be the index of a blob of that size."""
        if len(data) != index_bytes(size_bytes):
            raise VerificationError(
                f"a piece index of {len(data)} bytes; a blob of {size_bytes} bytes has one of {index_bytes(size_bytes)}"
            )
        return cls(size_bytes, data)

    @property
    def num_pieces(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    def start_of(self, number: int) -> int:
        """Where a piece begins, in bytes; for `num_pieces` the blob's end."""
        return min(number * PIECE_BYTES, self.size_bytes)

    def is_piece(self, number: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether `data` is that piece."""
        digest = self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        return hashlib.sha256(data).digest() == digest
