"""Piece indices, and blobs that are put together from pieces in any order, with breaks at any point."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import VerificationError
from protocol.exchange.piece_index import PIECE_BYTES, PieceIndex, has_index, index_bytes, make_piece_index
from protocol.exchange.piece_writer import PieceWriter
from protocol.exchange.store import BlobStore
from protocol.signing import sha256_hex

DATA = b"".join(index.to_bytes(4, "big") for index in range(4 * PIECE_BYTES // 4 + 300))  # five pieces, the last short
HASH = sha256_hex(DATA)
INDEX = PieceIndex.parse(make_piece_index(DATA), len(DATA))
PIECES = [DATA[start : start + PIECE_BYTES] for start in range(0, len(DATA), PIECE_BYTES)]


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def files(store: BlobStore) -> list[str]:
    return sorted(path.name for path in store.folder.rglob("*") if path.is_file())


def test_index_holds_the_hash_of_each_piece_when_made_from_bytes_or_file(tmp_path: Path) -> None:
    expected = b"".join(hashlib.sha256(piece).digest() for piece in PIECES)
    (tmp_path / "blob").write_bytes(DATA)
    assert (
        make_piece_index(DATA) == make_piece_index(memoryview(DATA)) == make_piece_index(tmp_path / "blob") == expected
    )


@pytest.mark.parametrize(
    ("size_bytes", "num_pieces"), [(0, 0), (1, 1), (PIECE_BYTES, 1), (PIECE_BYTES + 1, 2), (1 << 40, 1 << 22)]
)
def test_index_has_32_bytes_a_piece_when_the_blob_has_any_size(size_bytes: int, num_pieces: int) -> None:
    assert index_bytes(size_bytes) == 32 * num_pieces
    assert has_index(size_bytes) == (num_pieces > 1)


@pytest.mark.parametrize("num_bytes", [0, 31, 32 * 4, 32 * 6])
def test_index_is_refused_when_its_length_is_not_that_of_the_blob(num_bytes: int) -> None:
    with pytest.raises(VerificationError, match="piece index"):
        PieceIndex.parse(bytes(num_bytes), len(DATA))


@settings(max_examples=25, deadline=None)
@given(tries=st.lists(st.lists(st.integers(0, len(PIECES) - 1), max_size=4), max_size=4))
def test_blob_is_whole_when_its_pieces_came_in_any_order_with_breaks(
    tmp_path_factory: pytest.TempPathFactory, tries: list[list[int]]
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    here: set[int] = set()
    for numbers in tries:
        with PieceWriter(store, HASH, INDEX) as writer:
            assert writer.missing == [number for number in range(len(PIECES)) if number not in here]
            for number in numbers:
                assert writer.write(number, PIECES[number])
            here.update(numbers)
            assert writer.is_complete == (len(here) == len(PIECES))
        assert not store.has(HASH)
    with PieceWriter(store, HASH, INDEX) as writer:
        for number in writer.missing:
            assert writer.write(number, PIECES[number])
        writer.commit()
    assert store.read(HASH) == DATA
    assert files(store) == [HASH]
    assert store.arriving == {}


def test_nothing_is_written_when_a_piece_is_another(store: BlobStore) -> None:
    with PieceWriter(store, HASH, INDEX) as writer:
        assert not writer.write(0, PIECES[1])
        assert not writer.write(0, PIECES[0][:-1])
        assert not writer.write(4, PIECES[4] + b"!")
        assert writer.missing == [0, 1, 2, 3, 4]
    assert files(store) == []


def test_piece_is_asked_for_again_when_the_disk_altered_it(store: BlobStore) -> None:
    with PieceWriter(store, HASH, INDEX) as writer:
        writer.write(0, PIECES[0])
        writer.write(3, PIECES[3])
    part = store.path(HASH).with_suffix(".pieces")
    part.write_bytes(b"!" + part.read_bytes()[1:])
    with PieceWriter(store, HASH, INDEX) as writer:
        assert writer.missing == [0, 1, 2, 4]


def test_blob_is_refused_when_its_index_is_another_blobs(store: BlobStore) -> None:
    with PieceWriter(store, "ab" * 32, INDEX) as writer:
        for number, piece in enumerate(PIECES):
            writer.write(number, piece)
        with pytest.raises(VerificationError, match="another blob's"):
            writer.commit()
    assert files(store) == []


def test_commit_is_refused_when_a_piece_is_missing(store: BlobStore) -> None:
    with PieceWriter(store, HASH, INDEX) as writer:
        writer.write(0, PIECES[0])
        with pytest.raises(VerificationError, match="4 pieces"):
            writer.commit()


def test_only_pieces_that_are_here_are_read_when_a_blob_is_arriving(store: BlobStore) -> None:
    with PieceWriter(store, HASH, INDEX) as writer:
        writer.write(1, PIECES[1])
        writer.write(4, PIECES[4])
        assert store.arriving == {HASH: writer}
        assert writer.read_piece(PIECE_BYTES + 5, 10) == PIECES[1][5:15]
        assert writer.read_piece(2 * PIECE_BYTES - 3, 1000) == PIECES[1][-3:]
        assert writer.read_piece(4 * PIECE_BYTES, 1 << 40) == PIECES[4]
        for offset in (-1, 0, 2 * PIECE_BYTES, len(DATA), 1 << 70):
            assert writer.read_piece(offset, 10) == b""
    assert store.arriving == {}


def test_writers_do_not_disturb_each_other_when_they_want_the_same(store: BlobStore) -> None:
    with PieceWriter(store, HASH, INDEX) as first, PieceWriter(store, HASH, INDEX) as second:
        first.write(0, PIECES[0])
        for number, piece in enumerate(PIECES):
            second.write(number, piece)
        second.commit()
        assert store.arriving == {HASH: first}
        with PieceWriter(store, HASH, INDEX) as another:
            another.write(1, PIECES[1])
    assert files(store) == [HASH, HASH + ".pieces"]
    assert store.read(HASH) == DATA
    with PieceWriter(store, HASH, INDEX) as third:
        assert third.missing == [1, 2, 3, 4]  # the first one's
