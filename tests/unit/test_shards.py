"""Shards: every token is trained on once and in one place, held-out text never, and shard bytes are not trusted."""

import json
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coordinator.shards import DataPlan, cut_shards
from protocol.errors import DataError, PayloadError
from protocol.exchange.store import BlobStore
from protocol.run_spec import RunSpec
from protocol.shard_format import decode_shard, encode_shard
from protocol.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
GOLDEN_INDEX = "6b17ed96618f369b9120e9019edce27216c5679bf76e288744b985d5e77e5f62"
GOLDEN_HELD_OUT = "37214d65f3d314d64932d5aeebad09005c9e4e97b45cee247e6c9672e4aacc83"


class NumberingTokenizer:
    """Gives each character the next number as its id, so that a token says where in the text it stands."""

    vocabulary_size = 1 << 20
    end_of_text_id = 0

    def __init__(self) -> None:
        self.num_tokens = 0

    def encode_to_array(self, text: str) -> NDArray[np.uint32]:
        first = self.num_tokens + 1
        self.num_tokens += len(text)
        return np.arange(first, first + len(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        raise NotImplementedError

    def to_json(self) -> bytes:
        raise NotImplementedError


def spec_of(source: Path, *, batch_sequences: int = 2, seed: int = 0, **data: object) -> RunSpec:
    return RunSpec.model_validate(
        {
            "seed": seed,
            "data": {"source": str(source), "sequence_length": 8, **data},
            "train": {"batch_sequences": batch_sequences},
        }
    )


def write_documents(folder: Path, lengths: list[int]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in lengths))
    return path


def rows_of(store: BlobStore, hashes: Sequence[str], vocabulary_size: int) -> NDArray[np.int64]:
    return np.concatenate([decode_shard(store.read(blob_hash), vocabulary_size) for blob_hash in hashes])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    batch_sequences=st.integers(1, 3),
    shard_steps=st.integers(1, 3),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, (1 << 63) - 1),
)
def test_each_token_is_in_one_place_when_text_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    batch_sequences: int,
    shard_steps: int,
    fraction: float,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    data = {"shard_steps": shard_steps, "held_out_fraction": fraction}
    spec = spec_of(write_documents(folder, lengths), batch_sequences=batch_sequences, seed=seed, **data)
    tokenizer, store = NumberingTokenizer(), BlobStore(folder / "blobs")
    num_tokens = sum(lengths) + len(lengths)
    try:
        plan = cut_shards(spec, tokenizer, store)
    except DataError:
        assert num_tokens * (1 - fraction) - 9 < spec.shard_tokens + 1
        return
    training = rows_of(store, plan.shard_hashes, tokenizer.vocabulary_size)
    held_out = rows_of(store, [plan.held_out_hash], tokenizer.vocabulary_size)
    assert json.loads(store.read(plan.shard_index_hash)) == list(plan.shard_hashes)
    assert training.shape == (len(plan.shard_hashes) * batch_sequences * shard_steps, 9)
    assert (plan.num_tokens, plan.held_out_tokens) == (training[:, 1:].size, held_out[:, 1:].size)

    assert not set(training.flat) & set(held_out.flat) - {0}  # 0 ends every document
    for rows in (training, held_out):
        predicted = Counter(rows[:, 1:].flat)
        assert all(count == 1 for token, count in predicted.items() if token != 0)
        within = (rows[:, 1:] != 0) & (rows[:, :-1] != 0)
        assert ((np.diff(rows) > 0) | ~within).all()  # in the order of the text
    seen = set(training[:, 1:].flat) | set(held_out[:, 1:].flat)
    unseen = num_tokens - len(lengths) - len(seen - {0})
    assert unseen <= 2 + 8 + spec.shard_tokens  # the first id of each stream, a started row, a started shard
    assert held_out[:, 1:].size <= max(8, int(num_tokens * fraction))


def cut(store: BlobStore, source: Path, **changes: Any) -> DataPlan:
    return cut_shards(spec_of(source, **changes), BYTES, store)


def test_hashes_are_the_same_when_cut_again(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text("".join(f"{number * word} " for word in range(10 + number)))
    source = tmp_path / "corpus"
    plan = cut(BlobStore(tmp_path / "blobs"), source, seed=1)
    assert cut(BlobStore(tmp_path / "others"), source, seed=1) == plan
    # golden: when these change, the shards of existing runs can no longer be cut again from the same text
    assert plan.shard_index_hash == GOLDEN_INDEX
    assert plan.held_out_hash == GOLDEN_HELD_OUT


def test_held_out_stays_and_order_changes_when_the_seed_differs(tmp_path: Path) -> None:
    source = tmp_path / "corpus.txt"
    source.write_text("".join(f"{number} " for number in range(2000)))
    store = BlobStore(tmp_path / "blobs")
    one, other = cut(store, source, seed=1), cut(store, source, seed=2)
    assert one.held_out_hash == other.held_out_hash
    assert one.shard_hashes != other.shard_hashes


def test_end_is_held_out_when_there_is_one_document(tmp_path: Path) -> None:
    source, store = tmp_path / "corpus.txt", BlobStore(tmp_path / "blobs")
    source.write_text("".join(f"{number:04d}" for number in range(1000)))
    plan = cut(store, source, held_out_fraction=0.1)
    held_out = rows_of(store, [plan.held_out_hash], 257)
    text = BYTES.decode(np.append(held_out[:, :-1], held_out[-1, -1]))
    assert (source.read_text() + "<|endoftext|>").endswith(text)
    assert plan.held_out_tokens == 392  # the 400 of 4001 in whole rows


def test_held_out_comes_from_all_over_when_documents_are_many(tmp_path: Path) -> None:
    source, store, tokenizer = (
        write_documents(tmp_path, [500] * 200),
        BlobStore(tmp_path / "blobs"),
        NumberingTokenizer(),
    )
    plan = cut_shards(spec_of(source, batch_sequences=64), tokenizer, store)
    held_out = rows_of(store, [plan.held_out_hash], tokenizer.vocabulary_size)
    documents = np.unique((held_out[held_out != 0] - 1) // 500)
    assert len(documents) >= 60
    assert np.histogram(documents, bins=4, range=(0, 200))[0].min() >= 8


def test_long_and_short_documents_are_held_out_by_their_share_when_mixed(tmp_path: Path) -> None:
    lengths = [10_000] * 40 + [40] * 10_000  # half of the text each
    tokenizer, store = NumberingTokenizer(), BlobStore(tmp_path / "blobs")
    plan = cut_shards(spec_of(write_documents(tmp_path, lengths), batch_sequences=64), tokenizer, store)
    held_out = rows_of(store, [plan.held_out_hash], tokenizer.vocabulary_size)
    assert 0.35 < (held_out[held_out != 0] <= 400_000).mean() < 0.65


def test_rows_of_a_shard_come_from_all_over_when_dealt(tmp_path: Path) -> None:
    source, tokenizer, store = write_documents(tmp_path, [20_000]), NumberingTokenizer(), BlobStore(tmp_path / "blobs")
    plan = cut_shards(spec_of(source, batch_sequences=32), tokenizer, store)
    starts = decode_shard(store.read(plan.shard_hashes[0]), tokenizer.vocabulary_size)[:, 0]
    assert np.ptp(starts) > 10_000


def test_only_the_beginning_is_used_when_tokens_are_limited(tmp_path: Path) -> None:
    source, tokenizer, store = (
        write_documents(tmp_path, [300] * 10),
        NumberingTokenizer(),
        BlobStore(tmp_path / "blobs"),
    )
    reports: list[int] = []
    plan = cut_shards(spec_of(source, max_tokens=1000), tokenizer, store, reports.append)
    everything = rows_of(store, [*plan.shard_hashes, plan.held_out_hash], tokenizer.vocabulary_size)
    assert everything.max() <= 1000
    assert plan.num_tokens + plan.held_out_tokens > 970
    assert reports[-1] == 1000


@pytest.mark.parametrize("length", [0, 1, 24])
def test_numbers_are_told_when_the_text_is_too_short(tmp_path: Path, length: int) -> None:
    source = tmp_path / "corpus.txt"
    source.write_text("x" * length)
    tokens = length + 1 if length else 0
    with pytest.raises(DataError, match=f"gives {tokens} tokens; one shard and the held-out rows need 26: give more"):
        cut(BlobStore(tmp_path / "blobs"), source)
    with pytest.raises(DataError, match=r"need 26: raise data.max_tokens, give"):
        cut(BlobStore(tmp_path / "blobs"), source, max_tokens=5)


def test_one_shard_is_cut_when_the_text_is_just_long_enough(tmp_path: Path) -> None:
    source = tmp_path / "corpus.txt"
    source.write_text("x" * 25)
    plan = cut(BlobStore(tmp_path / "blobs"), source)
    assert (len(plan.shard_hashes), plan.num_tokens, plan.held_out_tokens) == (1, 16, 8)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(2, 9),
    vocabulary_size=st.sampled_from([2, 257, 1 << 16, (1 << 16) + 1, 1 << 32]),
    seed=st.integers(0, 9),
)
def test_ids_come_back_when_a_shard_is_decoded(rows: int, columns: int, vocabulary_size: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, vocabulary_size, (rows, columns))
    data = encode_shard(ids, vocabulary_size)
    assert len(data) == 16 + ids.size * (2 if vocabulary_size <= 1 << 16 else 4)
    decoded = decode_shard(memoryview(data), vocabulary_size)
    assert decoded.dtype == np.int64
    assert decoded.flags.writeable
    assert (decoded == ids).all()


@given(data=st.binary(max_size=64), position=st.integers(0, 15), byte=st.integers(0, 255))
def test_decoding_raises_nothing_else_when_bytes_are_wrong(data: bytes, position: int, byte: int) -> None:
    good = bytearray(encode_shard(np.full((2, 3), 7), 257))
    good[position] = byte
    for hostile in (data, bytes(good), bytes(good) + data[:1]):
        try:
            assert decode_shard(hostile, 257).shape == (2, 3)
        except PayloadError:
            continue


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no header"),
        (b"\0" * 16, "not a shard"),
        (struct.pack("<4sBBHII", b"MHSH", 2, 2, 0, 1, 2) + bytes(4), "update manyhands"),
        (struct.pack("<4sBBHII", b"MHSH", 1, 4, 0, 1, 2) + bytes(8), "4 bytes per id"),
        (struct.pack("<4sBBHII", b"MHSH", 1, 2, 0, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(4), "4294967295 x 4294967295"),
        (struct.pack("<4sBBHII", b"MHSH", 1, 2, 0, 0, 2), "0 x 2"),
        (struct.pack("<4sBBHII", b"MHSH", 1, 2, 0, 2, 1) + bytes(4), "2 x 1"),
        (struct.pack("<4sBBHII", b"MHSH", 1, 2, 0, 1, 2) + bytes(5), "does not have 21 bytes"),
        (encode_shard(np.array([[1, 257]]), 258), "outside the vocabulary of 257"),
    ],
)
def test_shard_is_refused_when_it_is_not_what_it_says(data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        decode_shard(data, 257)


@pytest.mark.parametrize(
    "rows", [np.zeros(4, int), np.zeros((0, 2), int), np.zeros((1, 1), int), np.zeros((1, 2)), [[-1, 0]], [[0, 257]]]
)
def test_rows_are_refused_when_they_are_no_token_ids(rows: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"shard has|outside"):
        encode_shard(np.asarray(rows), 257)
