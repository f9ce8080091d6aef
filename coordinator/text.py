"""Where the text comes from: files to a stream of documents.

The order is that of the sorted paths, so the same files give the same stream. One file is open at a time and is read as
a stream. Text is UTF-8. What the documents become is coordinator.shards' part.
"""

import difflib
import json
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec.core
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from protocol.errors import DataError, ManyhandsError

STDLIB = "stdlib"
TEXT_SUFFIXES = frozenset({".txt", ".md", ".py", ".rst"})
RECORD_SUFFIXES = frozenset({".jsonl", ".parquet"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".bz2", ".xz"})
_STDLIB_LEFT_OUT = frozenset(  # not the library's own code, or tables rather than code
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
)
_PART_CHARACTERS = 1 << 22
_LINE_CHARACTERS = 1 << 16
_PARQUET_BATCH_ROWS = 256


def read_documents(source: str, field: str) -> Iterator[str]:
    """The documents of `source`, none of them empty.

    `source`: a file, a folder (all of it but hidden files), a glob, an fsspec URL of one of these, or `stdlib`, the
    sources of Python's standard library. A text file is one document; one of more than 4 Mi characters comes in parts
    cut at line ends, a document each, so that memory is bounded. A line of a jsonl file and a row of a parquet file is
    a document, its text in `field`. Files may be compressed (.gz, .bz2, .xz).

    Raises DataError, in one line that says what to do.
    """
    file_system, paths = _find_stdlib() if source == STDLIB else _find_files(source)
    for path in paths:
        with _naming_unreadable(path):
            yield from _read_file(file_system, path, field)


def _find_stdlib() -> tuple[Any, list[str]]:
    folder = sysconfig.get_paths()["stdlib"]
    file_system = LocalFileSystem()
    paths = sorted(path for path in _walk(file_system, folder, _STDLIB_LEFT_OUT) if path.endswith(".py"))
    if not paths:
        raise DataError(f"data.source: this Python has no sources of its standard library in {folder}; name another")
    return file_system, paths


def _find_files(source: str) -> tuple[Any, list[str]]:
    """The file system of a source, and the sorted paths of its files there."""
    with _naming_unreadable(f"data.source {source}"):
        file_system, path = fsspec.core.url_to_fs(source)
        if file_system.isfile(path):
            return file_system, [path]  # of any extension, as it is named outright
        if file_system.isdir(path):
            found = list(_walk(file_system, path))
        elif any(character in path for character in "*?["):
            found = _match(file_system, path)
        else:
            raise DataError(f"data.source: there is no {source}{_nearest(file_system, path)}")
    known = sorted(path for path in found if _suffix(path) in TEXT_SUFFIXES | RECORD_SUFFIXES)
    if not known:
        extensions = " ".join(sorted(TEXT_SUFFIXES | RECORD_SUFFIXES))
        packed = " ".join(sorted(COMPRESSED_SUFFIXES))
        raise DataError(f"data.source: {source} has no file to read; {extensions} are read, also with {packed}")
    return file_system, known


def _walk(file_system: Any, folder: str, left_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of all files below, without hidden ones. Links to folders are not followed (fsspec calls them "other")."""
    for entry in file_system.ls(folder, detail=True):
        name = PurePosixPath(entry["name"]).name
        if name.startswith(".") or name in left_out or entry["name"].rstrip("/") == folder.rstrip("/"):
            continue
        if entry["type"] == "directory":
            yield from _walk(file_system, entry["name"], left_out)
        else:
            yield str(entry["name"])


def _match(file_system: Any, pattern: str) -> list[str]:
    """Files that match a glob, without those that are hidden below its literal beginning."""
    literal = next(index for index, character in enumerate(pattern) if character in "*?[")
    beginning = pattern[:literal].rpartition("/")[0]
    entries = file_system.glob(pattern, detail=True).items()
    files = [str(path) for path, entry in entries if entry["type"] != "directory"]
    return [path for path in files if "/." not in path.removeprefix(beginning)]


def _nearest(file_system: Any, path: str) -> str:
    """What exists where a missing local path should be, for the error message."""
    if not isinstance(file_system, LocalFileSystem):
        return ""
    missing = Path(path)
    while not missing.parent.is_dir():
        missing = missing.parent
    names = difflib.get_close_matches(missing.name, [entry.name for entry in missing.parent.iterdir()], n=1)
    return f"; the nearest that exists is {missing.parent.joinpath(*names)}"


def _suffix(path: str) -> str:
    """The extension in lower case, without that of a compression."""
    name = PurePosixPath(path.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED_SUFFIXES else name.suffix


def _read_file(file_system: Any, path: str, field: str) -> Iterator[str]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        with file_system.open(path, "rb") as file:
            yield from _read_parquet(file, path, field)
        return
    compression = infer_compression(path)
    with fsspec.core.OpenFile(file_system, path, "r", compression=compression, encoding="utf-8-sig") as file:
        yield from _read_jsonl(file, path, field) if suffix == ".jsonl" else _read_text(file)


def _read_text(file: IO[str]) -> Iterator[str]:
    while text := file.read(_PART_CHARACTERS):
        yield text + file.readline(_LINE_CHARACTERS)


def _read_jsonl(file: IO[str], path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); each line holds one object") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: not an object; each line holds one, with its text in `{field}`")
        if field not in record:
            raise DataError(f"{path}, line {number}: {_no_field(field, list(record))}")
        yield from _checked(record[field], f"{path}, line {number}: field `{field}`")


def _read_parquet(file: IO[bytes], path: str, field: str) -> Iterator[str]:
    import pyarrow.parquet  # here, as it takes a third of a second that only this format is worth

    table = pyarrow.parquet.ParquetFile(file)
    if field not in table.schema_arrow.names:
        raise DataError(f"{path}: {_no_field(field, table.schema_arrow.names)}")
    for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[field]):
        for text in batch.column(0).to_pylist():
            yield from _checked(text, f"{path}: field `{field}`")


def _no_field(field: str, fields: list[str]) -> str:
    return f"there is no field `{field}`; set data.field to the one that holds the text: {', '.join(fields) or 'none'}"


def _checked(text: object, place: str) -> Iterator[str]:
    """The text of a record; nothing where it is empty or null. Lone surrogates, which JSON allows, become "?"."""
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place} is a {type(text).__name__}, not a text; set data.field")
    if text:
        yield text.encode(errors="replace").decode()


@contextmanager
def _naming_unreadable(what: str) -> Iterator[None]:
    """Turn whatever reading raises into a DataError that names the file."""
    try:
        yield
    except ManyhandsError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8 text; convert it, or leave it out of data.source") from error
    except Exception as error:  # fsspec's many backends, the decompressors and arrow each raise their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} cannot be read: {reason}") from error
