"""PieceWriter: a blob that arrives in pieces, in any order, from whoever has them.

Invariants: only pieces that match the index are kept; the blob gets its name only when its own hash holds too; after a
break, a crash included, the next writer hashes what is on the disk against the index and goes on with the rest, so no
record of what is there can be wrong. While it is open, the store hands its pieces on to others (`BlobStore.arriving`).

All calls but `has`, `write` and `read_piece` may take seconds for a large blob: run them in a thread.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from protocol.errors import VerificationError
from protocol.exchange.piece_index import PIECE_BYTES, PieceIndex
from protocol.exchange.store import BlobStore, naming_full_disks, open_part

_READ_BYTES = 1 << 20


class PieceWriter:
    """Receives one blob; a context manager. On leaving without `commit`, the pieces that came are kept.

    As with BlobWriter, a second writer of the same blob works on a file of its own. Raises DiskFullError.
    """

    def __init__(self, store: BlobStore, blob_hash: str, index: PieceIndex) -> None:
        self._store = store
        self._path = store.path(blob_hash)
        self._index = index
        with naming_full_disks(store.folder):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._resumable = open_part(self._path, in_pieces=True)
        try:
            self._missing = dict.fromkeys(number for number in range(index.num_pieces) if not self._holds(number))
        except BaseException:
            self._file.close()
            raise
        store.arriving.setdefault(blob_hash, self)

    @property
    def index(self) -> PieceIndex:
        return self._index

    @property
    def size_bytes(self) -> int:
        return self._index.size_bytes

    @property
    def missing(self) -> list[int]:
        """The pieces that are not here yet, in order."""
        return list(self._missing)

    @property
    def is_complete(self) -> bool:
        return not self._missing

    def has(self, number: int) -> bool:
        return number not in self._missing

    def write(self, number: int, data: bytes | bytearray) -> bool:
        """Take a piece in; False, and nothing is written, when it is another. Raises DiskFullError."""
        if not self._index.is_piece(number, data):
            return False
        if self.has(number):
            return True
        rest, offset = memoryview(data), self._index.start_of(number)
        with naming_full_disks(self._store.folder):
            while rest:
                written = os.pwrite(self._file.fileno(), rest, offset)
                rest, offset = rest[written:], offset + written
        del self._missing[number]
        return True

    def read_piece(self, offset: int, max_bytes: int) -> bytes:
        """Bytes from `offset` on, from one piece at most; empty when it is not here yet."""
        number = offset // PIECE_BYTES
        if not 0 <= offset < self.size_bytes or not self.has(number):
            return b""
        return os.pread(self._file.fileno(), min(max_bytes, self._index.start_of(number + 1) - offset), offset)

    def commit(self) -> None:
        """Put the blob in its place. Call once it is complete.

        Raises VerificationError, and deletes what came, when the index is not this blob's; DiskFullError.
        """
        if self._missing:
            raise VerificationError(f"{len(self._missing)} pieces of blob {self._path.name} are missing")
        if self._hash() != self._path.name:
            self._remove()
            raise VerificationError(f"the piece index that was announced for blob {self._path.name} is another blob's")
        with naming_full_disks(self._store.folder):
            self._file.truncate(self.size_bytes)  # an earlier try may have expected more
            Path(self._file.name).replace(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice."""
        if self._store.arriving.get(self._path.name) is self:
            del self._store.arriving[self._path.name]
        if not self._file.closed:
            if not self._resumable or len(self._missing) == self._index.num_pieces:
                self._remove()  # where it was renamed by `commit`, nothing has this name any more
            self._file.close()

    def _holds(self, number: int) -> bool:
        start = self._index.start_of(number)
        return self._index.is_piece(
            number, os.pread(self._file.fileno(), self._index.start_of(number + 1) - start, start)
        )

    def _hash(self) -> str:
        sha256 = hashlib.sha256()
        for start in range(0, self.size_bytes, _READ_BYTES):
            sha256.update(os.pread(self._file.fileno(), min(_READ_BYTES, self.size_bytes - start), start))
        return sha256.hexdigest()

    def _remove(self) -> None:
        Path(self._file.name).unlink(missing_ok=True)
