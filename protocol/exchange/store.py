"""BlobStore: a folder of files named by the SHA-256 of their content.

Invariants: a name that is there was complete when it got there (temporary file, then rename); whatever is handed out as
a whole is hashed again first; a hash that a peer sent never reaches a path unless it is 64 hex digits; a full disk
raises DiskFullError and leaves everything that was committed as it was.

    ab/ab12…           a blob
    ab/ab12….part      being received, kept after a break so that the next try goes on from there; one writer at a time
    ab/ab12….pieces    the same for a blob that arrives in pieces, with holes (protocol.exchange.piece_writer)
    ab/*.tmp           a write in progress

All calls block; an event loop runs the long ones in a thread. Several threads and processes may share a folder. Which
blobs to take, from whom and how large they may be, is the caller's business.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from protocol.errors import DiskFullError, MissingBlobError, VerificationError
from protocol.signing import sha256_hex

_HASH = re.compile(r"[0-9a-f]{64}")
_DISK_ERRORS = {
    errno.ENOSPC: "is full; free some space",
    errno.EDQUOT: "is full: its disk quota is used up; free some space",
    errno.EROFS: "is on a read-only disk; make it writable or choose another folder",
}
_ABANDONED_AFTER_S = 3600.0  # an unfinished file untouched for so long has lost its writer
_PART, _PIECES, _TEMPORARY = ".part", ".pieces", ".tmp"


@contextmanager
def naming_full_disks(folder: Path) -> Iterator[None]:
    """Turn an OSError that says "no space", "quota" or "read-only" into a DiskFullError naming `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise DiskFullError(f"{folder} {_DISK_ERRORS[error.errno]}") from error


class Arriving(Protocol):
    """A blob that is being received in pieces: what came is verified, and may be handed on."""

    @property
    def size_bytes(self) -> int: ...

    def read_piece(self, offset: int, max_bytes: int) -> bytes:
        """At most `max_bytes` from `offset` on; empty when they are not here yet."""


class BlobStore:
    """Blobs in `folder`, which is made at the first write.

    For those who serve the blobs: `expected` are the hashes of those that this process is about to fetch, `arriving`
    are those that it is receiving in pieces.

    Every method that takes a hash raises VerificationError when it is not 64 lower-case hex digits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: set[str] = set()
        self.arriving: dict[str, Arriving] = {}

    def path(self, blob_hash: str) -> Path:
        """Where the blob of that hash is, or would be."""
        if not isinstance(blob_hash, str) or _HASH.fullmatch(blob_hash) is None:
            raise VerificationError("not a SHA-256 hash: 64 hex digits are expected")
        return self.folder / blob_hash[:2] / blob_hash

    def has(self, blob_hash: str) -> bool:
        return self.path(blob_hash).is_file()

    def size(self, blob_hash: str) -> int:
        """In bytes. Raises MissingBlobError."""
        with _naming_missing(blob_hash):
            return self.path(blob_hash).stat().st_size

    def put(self, data: bytes | memoryview, *, durable: bool = False) -> str:
        """Store `data` and return its hash. Nothing is written when a blob of that hash and size is there.

        `durable`: on return the blob outlives a power cut (fsync). Without it a power cut may leave it cut short, which
        `read` notices and the next `put` mends. Raises DiskFullError.
        """
        blob_hash = sha256_hex(data)
        path = self.path(blob_hash)
        with naming_full_disks(self.folder):
            try:
                if path.stat().st_size == memoryview(data).nbytes:
                    return blob_hash
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
            _write_file(path, data, durable)
        return blob_hash

    def read(self, blob_hash: str) -> bytes:
        """The blob, hashed again.

        Raises MissingBlobError, or VerificationError when the file was altered: `remove` it and get it anew.
        """
        path = self.path(blob_hash)
        with _naming_missing(blob_hash):
            data = path.read_bytes()
        if sha256_hex(data) != blob_hash:
            raise VerificationError(f"{path} was altered: its content does not have the hash of its name; delete it")
        return data

    def read_piece(self, blob_hash: str, offset: int, max_bytes: int) -> bytes:
        """At most `max_bytes` from `offset` on; empty at the end and beyond. Not hashed: the receiver does that.

        Raises MissingBlobError; ValueError for a negative offset or length.
        """
        if offset < 0 or max_bytes < 0:
            raise ValueError("offset and max_bytes are never negative")
        path = self.path(blob_hash)
        with _naming_missing(blob_hash), path.open("rb") as file:
            remaining_bytes = os.fstat(file.fileno()).st_size - offset
            if remaining_bytes <= 0:  # also keeps absurd offsets away from seek
                return b""
            file.seek(offset)
            return file.read(min(max_bytes, remaining_bytes))

    def receive(self, blob_hash: str, size_bytes: int, *, resume: bool = True) -> "BlobWriter":
        """A writer for a blob that arrives in chunks; use it as a context manager.

        An earlier try that broke off is taken up where it stopped: send from `writer.offset` on. With `resume` off it
        is forgotten, for senders that can only begin at the beginning. The caller limits `size_bytes`; nothing is
        allocated from it. Raises DiskFullError; ValueError for a negative size.
        """
        if size_bytes < 0:
            raise ValueError("a size is never negative")
        return BlobWriter(self.path(blob_hash), size_bytes, self.folder, resume=resume)

    def remove(self, blob_hash: str) -> None:
        """Remove the blob if it is there."""
        self.path(blob_hash).unlink(missing_ok=True)

    def total_bytes(self) -> int:
        """Bytes of all files in the folder, unfinished ones included."""
        return sum(size_bytes for _, size_bytes, _ in self._files())

    def prune(self, keep: Set[str], max_bytes: int) -> int:
        """Remove the oldest blobs that are not in `keep` until at most `max_bytes` are left; returns bytes freed.

        Counts and removes unfinished files too, once they have had no writer for an hour.
        """
        abandoned_before_s = time.time() - _ABANDONED_AFTER_S
        files = sorted(self._files())
        excess_bytes = sum(size_bytes for _, size_bytes, _ in files) - max_bytes
        freed_bytes = 0
        for changed_s, size_bytes, path in files:
            if freed_bytes >= excess_bytes:
                break
            unfinished = path.suffix in (_PART, _PIECES, _TEMPORARY)
            if path.name in keep or (unfinished and changed_s > abandoned_before_s):
                continue
            path.unlink(missing_ok=True)
            freed_bytes += size_bytes
        return freed_bytes

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last change (seconds since 1970), size in bytes and path of each file."""
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(FileNotFoundError):  # renamed or removed meanwhile
                status = path.stat()
                yield status.st_mtime, status.st_size, path


class BlobWriter:
    """Receives one blob. Made by BlobStore.receive; on leaving without `commit` what came so far is kept.

    The first writer of a hash holds the lock on its `.part` file; another one at the same time writes to a file of
    its own from offset 0, and whoever commits first or last, the blob is the same.
    """

    def __init__(self, path: Path, size_bytes: int, folder: Path, *, resume: bool) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._folder = folder
        self._sha256 = hashlib.sha256()
        self._offset = 0
        with naming_full_disks(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._resumable = open_part(path)
            if not resume:
                self._file.truncate(0)
            self._take_up()

    @property
    def offset(self) -> int:
        """Bytes that are here already."""
        return self._offset

    @property
    def end(self) -> int:
        """Bytes of the whole blob."""
        return self._size_bytes

    def write(self, chunk: bytes | memoryview) -> None:
        """Append. Raises VerificationError, and drops what came, when the blob grows beyond its size; DiskFullError."""
        rest = memoryview(chunk).cast("B")
        if self._offset + len(rest) > self._size_bytes:
            self._discard()
            raise VerificationError(f"more than the announced {self._size_bytes} bytes came for blob {self._path.name}")
        with naming_full_disks(self._folder):
            while rest:  # an unbuffered write may take only a part, as it does just before a disk is full
                written = self._file.write(rest)
                self._sha256.update(rest[:written])
                self._offset += written
                rest = rest[written:]

    def commit(self, *, durable: bool = False) -> None:
        """Check size and hash, then put the blob in its place. `durable` as in BlobStore.put.

        Raises VerificationError: too short keeps what came, a wrong hash deletes it. Raises DiskFullError.
        """
        if self._offset != self._size_bytes:
            raise VerificationError(
                f"blob {self._path.name} broke off after {self._offset} of {self._size_bytes} bytes; fetch the rest"
            )
        if self._sha256.hexdigest() != self._path.name:
            self._discard()
            raise VerificationError(f"what came as blob {self._path.name} has another hash; it was deleted")
        with naming_full_disks(self._folder):
            if durable:
                os.fsync(self._file.fileno())
            Path(self._file.name).replace(self._path)
            self._file.close()
            if durable:
                flush_folder(self._path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file.closed:  # committed or discarded
            return
        if self._resumable and self._offset:
            self._file.close()
        else:
            self._discard()

    def _take_up(self) -> None:
        """Hash what an earlier try left; start anew when that is longer than the blob."""
        kept_bytes = os.fstat(self._file.fileno()).st_size
        if kept_bytes > self._size_bytes:
            self._file.truncate(0)
            return
        while self._offset < kept_bytes and (chunk := self._file.read(1 << 20)):
            self._sha256.update(chunk)
            self._offset += len(chunk)

    def _discard(self) -> None:
        Path(self._file.name).unlink(missing_ok=True)  # before the lock goes, or it could be another writer's
        self._file.close()


def open_part(path: Path, *, in_pieces: bool = False) -> tuple[FileIO, bool]:
    """Open and lock the unfinished file of a blob, and whether a later try may go on with it.

    While another writer holds it, that is a temporary file instead.
    """
    part = path.with_name(path.name + (_PIECES if in_pieces else _PART))
    while True:
        file = FileIO(str(part), "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return _open_temporary(path), False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file, True
        file.close()  # the writer before us committed or removed it between our open and our lock


def _open_temporary(path: Path) -> FileIO:
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}{_TEMPORARY}").open("xb+", buffering=0)


def _write_file(path: Path, data: bytes | memoryview, durable: bool) -> None:
    rest = memoryview(data).cast("B")
    with _open_temporary(path) as file:
        try:
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    if durable:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming_missing(blob_hash: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingBlobError(f"there is no blob {blob_hash} in the store") from error
