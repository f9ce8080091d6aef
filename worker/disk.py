"""Files that are complete or not there, and a full disk in plain words.

What is written here is flushed to the disk before it gets its name, so that a power cut leaves the old file or the new
one. Tensors are safetensors, never pickles.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from protocol.errors import DiskFullError

_DISK_ERRORS = {
    errno.ENOSPC: "is on a full disk; free some space",
    errno.EDQUOT: "is over its quota; free some space",
    errno.EROFS: "is on a read-only disk; choose another folder",
}


@contextlib.contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space", "quota" and "read-only" into a DiskFullError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise DiskFullError(f"{path} {_DISK_ERRORS[error.errno]}") from error
        raise
    except SafetensorError as error:  # its message is the only place that has the number
        found = re.search(r"os error (\d+)", str(error))
        if found and int(found[1]) in _DISK_ERRORS:
            raise DiskFullError(f"{path} {_DISK_ERRORS[int(found[1])]}") from error
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in one step; the same bytes for the same tensors.

    Raises DiskFullError; what was at `path` then is still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with translate_disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), temporary)
            flush(temporary)
            os.replace(temporary, path)  # noqa: PTH105  # the name says that it overwrites
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
