"""BlobStore: what is there is whole and right, whatever peers send and disks do."""

import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import DiskFullError, MissingBlobError, VerificationError
from protocol.exchange.store import BlobStore, naming_full_disks

DATA = b"pseudo-gradient" * 100
HASH = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def files(store: BlobStore) -> list[str]:
    return sorted(path.name for path in store.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("data", [b"", DATA, memoryview(DATA)])
def test_blob_comes_back_when_it_was_put(store: BlobStore, data: bytes, durable: bool) -> None:
    blob_hash = store.put(data, durable=durable)
    assert blob_hash == hashlib.sha256(data).hexdigest()
    assert store.has(blob_hash)
    assert store.size(blob_hash) == len(data)
    assert store.read(blob_hash) == data
    assert store.path(blob_hash).read_bytes() == data
    assert files(store) == [blob_hash]


def test_nothing_is_written_when_the_blob_is_there(store: BlobStore) -> None:
    inode = store.path(store.put(DATA)).stat().st_ino
    assert store.path(store.put(DATA)).stat().st_ino == inode


def test_put_mends_when_a_power_cut_left_the_blob_short(store: BlobStore) -> None:
    store.path(store.put(DATA)).write_bytes(b"")
    with pytest.raises(VerificationError):
        store.read(HASH)
    store.put(DATA)
    assert store.read(HASH) == DATA


def test_read_refuses_when_the_file_was_altered(store: BlobStore) -> None:
    store.path(store.put(DATA)).write_bytes(DATA[:-1] + b"!")
    with pytest.raises(VerificationError, match="altered"):
        store.read(HASH)


def test_absence_is_told_when_there_is_no_such_blob(store: BlobStore) -> None:
    assert not store.has(HASH)
    for call in (store.read, store.size, lambda blob_hash: store.read_piece(blob_hash, 0, 1)):
        with pytest.raises(MissingBlobError, match=HASH):
            call(HASH)
    store.remove(HASH)


@pytest.mark.parametrize(
    "blob_hash", ["", "../../etc/passwd", HASH[:-1], HASH.upper(), HASH + "\n", "/" + HASH[1:], "\0" * 64, None, 7]
)
def test_no_path_is_touched_when_a_hash_is_none(store: BlobStore, blob_hash: str) -> None:
    calls = (
        store.path,
        store.has,
        store.size,
        store.read,
        store.remove,
        lambda blob_hash: store.read_piece(blob_hash, 0, 1),
        lambda blob_hash: store.receive(blob_hash, 1),
    )
    for call in calls:
        with pytest.raises(VerificationError):
            call(blob_hash)
    assert not store.folder.exists()


@pytest.mark.parametrize(
    ("offset", "max_bytes", "piece"),
    [(0, 4, DATA[:4]), (4, 1 << 60, DATA[4:]), (len(DATA), 1, b""), (1 << 64, 1, b""), (3, 0, b"")],
)
def test_piece_stays_within_the_blob_when_asked_for_any(
    store: BlobStore, offset: int, max_bytes: int, piece: bytes
) -> None:
    store.put(DATA)
    assert store.read_piece(HASH, offset, max_bytes) == piece


@pytest.mark.parametrize(("offset", "max_bytes"), [(-1, 1), (0, -1)])
def test_piece_is_refused_when_negative(store: BlobStore, offset: int, max_bytes: int) -> None:
    store.put(DATA)
    with pytest.raises(ValueError, match="negative"):
        store.read_piece(HASH, offset, max_bytes)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), tries=st.lists(st.lists(st.integers(0, 60), max_size=4), max_size=5))
def test_blob_is_whole_when_receiving_broke_off_anywhere(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, tries: list[list[int]]
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    blob_hash = hashlib.sha256(data).hexdigest()
    received = 0
    for chunk_sizes in tries:
        with store.receive(blob_hash, len(data)) as writer:
            assert writer.offset == received
            for size in chunk_sizes:
                writer.write(data[writer.offset : writer.offset + size])
            received = writer.offset
        assert not store.has(blob_hash)
    with store.receive(blob_hash, len(data)) as writer:
        writer.write(memoryview(data)[writer.offset :])
        writer.commit(durable=True)
    assert store.read(blob_hash) == data
    assert files(store) == [blob_hash]


def test_earlier_bytes_are_forgotten_when_not_resuming(store: BlobStore) -> None:
    with store.receive(HASH, len(DATA)) as writer:
        writer.write(b"junk")
    with store.receive(HASH, len(DATA), resume=False) as writer:
        assert writer.offset == 0
        writer.write(DATA)
        writer.commit()
    assert store.read(HASH) == DATA


def test_kept_bytes_are_dropped_when_longer_than_the_blob(store: BlobStore) -> None:
    with store.receive(HASH, 1 << 30) as writer:
        writer.write(DATA + b"more")
    with store.receive(HASH, len(DATA)) as writer:
        assert writer.offset == 0


def test_blob_is_deleted_when_its_hash_is_wrong(store: BlobStore) -> None:
    with store.receive(HASH, len(DATA)) as writer:
        writer.write(bytes(len(DATA)))
        with pytest.raises(VerificationError, match="another hash"):
            writer.commit()
    assert files(store) == []


def test_blob_is_deleted_when_more_than_its_size_comes(store: BlobStore) -> None:
    with store.receive(HASH, len(DATA)) as writer:
        writer.write(DATA[:10])
        with pytest.raises(VerificationError, match="more than"):
            writer.write(DATA)
    assert files(store) == []


def test_rest_can_be_fetched_when_the_sender_stopped_early(store: BlobStore) -> None:
    with store.receive(HASH, len(DATA)) as writer:
        writer.write(DATA[:10])
        with pytest.raises(VerificationError, match="broke off after 10"):
            writer.commit()
    with store.receive(HASH, len(DATA)) as writer:
        assert writer.offset == 10


def test_receivers_do_not_disturb_each_other_when_they_want_the_same(store: BlobStore) -> None:
    with store.receive(HASH, len(DATA)) as first, store.receive(HASH, len(DATA)) as second:
        first.write(DATA[:100])
        second.write(b"?" * len(DATA))
        first.write(DATA[100:])
        with pytest.raises(VerificationError):
            second.commit()
        first.commit()
    with store.receive(HASH, len(DATA)) as first, store.receive(HASH, len(DATA)) as second:
        first.write(DATA[:100])
        second.write(DATA)
        second.commit()
    assert store.read(HASH) == DATA
    with store.receive(HASH, len(DATA)) as third, store.receive(HASH, len(DATA)) as fourth:
        assert third.offset == 100  # the first one's
        fourth.write(DATA[:10])
    assert files(store) == [HASH, HASH + ".part"]


def test_blob_is_right_when_many_threads_receive_it_at_once(store: BlobStore) -> None:
    failures: list[BaseException] = []

    def receive_often() -> None:
        try:
            for attempt in range(30):
                with store.receive(HASH, len(DATA)) as writer:
                    for start in range(writer.offset, len(DATA) - (attempt % 3 == 0), 400):
                        writer.write(DATA[start : start + 400])
                    if writer.offset == len(DATA):
                        writer.commit()
                assert not store.has(HASH) or store.read(HASH) == DATA
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=receive_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.read(HASH) == DATA
    assert not [name for name in files(store) if name.endswith(".tmp")]


def test_oldest_go_first_when_pruned(store: BlobStore) -> None:
    blobs = [store.put(bytes([number]) * 100) for number in range(6)]
    for age, blob_hash in enumerate(reversed(blobs)):
        os.utime(store.path(blob_hash), (1e9 - age, 1e9 - age))
    assert store.total_bytes() == 600
    assert store.prune({blobs[0], blobs[2]}, max_bytes=300) == 300
    assert [store.has(blob_hash) for blob_hash in blobs] == [True, False, True, False, False, True]
    assert store.prune({blobs[0]}, max_bytes=300) == 0
    assert store.prune({blobs[0]}, max_bytes=0) == 200
    assert files(store) == [blobs[0]]


def test_unfinished_files_go_when_pruned_and_long_without_writer(store: BlobStore) -> None:
    with store.receive(HASH, len(DATA)) as writer:
        writer.write(DATA[:10])
        assert store.prune(set(), max_bytes=0) == 0
    assert store.total_bytes() == 10
    os.utime(store.path(HASH).with_suffix(".part"), (1e9, 1e9))
    assert store.prune({HASH}, max_bytes=0) == 10


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_folder_is_named_when_the_disk_takes_no_more(code: int) -> None:
    with (
        pytest.raises(DiskFullError, match=r"/data/blobs is (full|on a read-only disk)"),
        naming_full_disks(Path("/data/blobs")),
    ):
        raise OSError(code, os.strerror(code))
    with pytest.raises(PermissionError), naming_full_disks(Path("/data/blobs")):
        raise PermissionError(errno.EACCES, "no")


def test_disk_full_is_told_when_the_device_says_so(store: BlobStore) -> None:
    part = store.path(HASH).with_suffix(".part")
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with store.receive(HASH, len(DATA)) as writer:
        with pytest.raises(DiskFullError, match="blobs is full; free some space"):
            writer.write(DATA)
        assert writer.offset == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_nothing_is_lost_when_the_disk_fills_up(small_disk: Path) -> None:
    store = BlobStore(small_disk)
    kept = store.put(b"k" * 30_000)
    with pytest.raises(DiskFullError, match="is full"):
        store.put(b"x" * 60_000)
    large = b"y" * 50_000
    with store.receive(hashlib.sha256(large).hexdigest(), len(large)) as writer:
        with pytest.raises(DiskFullError, match="is full"):
            writer.write(large)
        assert store.read(kept) == b"k" * 30_000
        store.remove(kept)
        writer.write(large[writer.offset :])  # goes on once there is room
        writer.commit()
    assert files(store) == [hashlib.sha256(large).hexdigest()]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(DiskFullError, match="read-only"):
        store.put(b"z")
