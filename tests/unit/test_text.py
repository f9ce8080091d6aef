"""read_documents: the same files give the same documents, and an error says which file and what to do."""

import bz2
import gzip
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from coordinator.text import read_documents
from protocol.errors import DataError


def read(source: object, field: str = "text") -> list[str]:
    return list(read_documents(str(source), field))


def error_of(source: object, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(source, field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_corpus(folder: Path) -> None:
    (folder / "b").mkdir()
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "z.MD").write_text("z")
    (folder / "a.txt").write_text("\ufeffä", encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\xff")
    (folder / "b" / "c.py").write_text("pass")
    (folder / "b" / "d.rst.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "e.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": null}\n{"text": "two\\ud800"}')
    (folder / "e.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "three"}'))


def test_all_files_are_read_in_order_when_source_is_a_folder(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    expected = ["ä", "pass", "packed", "one", "two?", "three", "z"]
    assert read(tmp_path) == expected
    assert read(f"{tmp_path}/") == read(f"file://{tmp_path}") == expected


def test_matching_files_are_read_when_source_is_a_glob(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    assert read(tmp_path / "*.txt") == ["ä"]
    assert read(tmp_path / "*") == ["ä", "one", "two?", "three", "z"]
    assert read(tmp_path / "**" / "*.[pr]*") == ["pass", "packed"]


def test_file_is_read_when_named_outright_whatever_its_extension(tmp_path: Path) -> None:
    (tmp_path / ".notes").write_text("kept")
    assert read(tmp_path / ".notes") == ["kept"]


def test_url_is_read_when_fsspec_knows_it() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/b.txt": b"b", "/corpus/a/.x.txt": b"hidden", "/corpus/a/y.txt": b"y"})
    assert read("memory://corpus") == ["y", "b"]
    assert read("memory://corpus/*.txt") == ["b"]
    assert read("memory://corpus/b.txt") == ["b"]


def test_large_file_comes_in_parts_when_read(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(800_000))
    (tmp_path / "large.txt").write_text(text)
    parts = read(tmp_path)
    assert len(parts) == 3
    assert all(part.endswith("\n") for part in parts)
    assert "".join(parts) == text


def test_field_is_read_when_source_is_parquet(tmp_path: Path) -> None:
    bodies = [f"body {number}" for number in range(1000)]
    table = pyarrow.table({"id": range(1002), "body": [*bodies, None, ""]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path, "body") == bodies
    assert "there is no field `text`; set data.field to the one that holds the text: id, body" in error_of(tmp_path)
    assert "field `id` is a int, not a text" in error_of(tmp_path, "id")


def test_standard_library_is_read_when_asked_for() -> None:
    documents = read("stdlib")
    assert 4_000_000 < sum(map(len, documents)) < 20_000_000
    assert any(document.startswith('"""Random variable generators.') for document in documents)
    assert documents == read("stdlib")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({"body": "x", "id": 1}), "line 2: there is no field `text`; .*: body, id$"),
        ("{}", "line 2: there is no field `text`; .*: none$"),
        ('{"text": 1}', "line 2: field `text` is a int, not a text"),
        ('["text"]', "line 2: not an object"),
        ('{"text": "x', "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("1" * 5000, "line 2: not JSON"),
    ],
)
def test_line_is_named_when_a_jsonl_line_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path / "x.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"caf\xe9", "is not UTF-8 text"),
        ("x.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8 text"),
        ("x.txt.gz", b"not packed", "cannot be read"),
        ("x.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-20], "cannot be read"),
        ("x.parquet", b"PAR1 or not", "cannot be read"),
    ],
)
def test_file_is_named_when_it_cannot_be_decoded(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    told = error_of(tmp_path)
    assert told.startswith(str(tmp_path / name))
    assert message in told


def test_nearest_path_is_told_when_the_source_is_missing(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    assert error_of(tmp_path / "corpsu").endswith(f"the nearest that exists is {tmp_path / 'corpus'}")
    assert error_of(tmp_path / "corpus" / "a" / "b.txt").endswith(f"the nearest that exists is {tmp_path / 'corpus'}")
    assert "there is no memory://nowhere" in error_of("memory://nowhere")


def test_extensions_are_told_when_no_file_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\xff")
    for source in (tmp_path, tmp_path / "*.png"):
        assert "has no file to read; .jsonl .md .parquet .py .rst .txt are read, also with .bz2 .gz .xz" in error_of(
            source
        )


def test_protocol_is_told_when_fsspec_knows_it_not() -> None:
    assert error_of("gopher://host/x").startswith("data.source gopher://host/x cannot be read: ")
