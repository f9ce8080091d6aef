"""Text to tokens, tokens to content-addressed shards.

The documents' tokens, each document closed by end_of_text, form one stream. Stretches of it are held out first; they
are never leased. What remains is cut into rows of sequence_length predicted tokens, the rows are dealt to shards in
shuffled order, and each shard becomes a blob. The same text, tokenizer and spec give the same hashes.

Invariants: a token is in one training row, in one held-out row or in the dropped tail (neighbouring rows share the one
id that the first predicts last and the second reads first). What is held out does not depend on the seed, so runs
that differ in it are compared on the same text. Tokens wait in a temporary file, not in memory. Who gets which shard
is not decided here.

Shape letters: N documents, S stretches, R rows, C columns (sequence length + 1).
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from coordinator.text import read_documents
from protocol.errors import DataError
from protocol.exchange.store import BlobStore, naming_full_disks
from protocol.run_spec import RunSpec
from protocol.shard_format import encode_shard, token_dtype
from protocol.tokenizer import Tokenizer

_HELD_OUT_STREAM, _DEALING_STREAM = 0, 1  # each use of randomness has a stream of its own
_STRETCHES = 64  # places of the text that are held out; more where the documents are short
_STRETCH_ROWS = 4  # but no stretch shorter than so many rows, where the documents allow it
_PROGRESS_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlan:
    """What a run trains on and is evaluated on, by hash. Tokens are predicted ones: rows times sequence_length."""

    shard_hashes: tuple[str, ...]
    shard_index_hash: str  # blob: JSON list of shard_hashes
    held_out_hash: str
    num_tokens: int  # in all shards: one pass over the data
    held_out_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stretches:
    """Disjoint parts of the token stream, in order, (S,) each; one after the other they are a stream themselves."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @classmethod
    def but(cls, others: Self, num_tokens: int) -> Self:
        """All of a stream of `num_tokens` but `others`."""
        starts = np.concatenate(([0], others.stops))
        return cls(starts=starts, stops=np.concatenate((others.starts, [num_tokens])))

    @property
    def num_tokens(self) -> int:
        return int((self.stops - self.starts).sum())

    def read_rows(self, tokens: NDArray[Any], rows: NDArray[np.int64], sequence_length: int) -> NDArray[Any]:
        """(R, C) ids of the (R,) rows: row r begins at token r * sequence_length of this stream."""
        ends = np.cumsum(self.stops - self.starts)  # in this stream, as the positions are
        positions = rows[:, None] * sequence_length + np.arange(sequence_length + 1)
        stretch = np.searchsorted(ends, positions, side="right")
        return tokens[positions - ends[stretch] + self.stops[stretch]]


def cut_shards(
    spec: RunSpec, tokenizer: Tokenizer, store: BlobStore, progress: Callable[[int], None] | None = None
) -> DataPlan:
    """Read spec.data.source, and put its shards, their index and the held-out rows into `store`.

    `progress` is called about every million tokens, and at the end, with the number of tokens read so far. Raises
    DataError when the text is missing, unreadable or too short for one shard and one held-out row; DiskFullError.
    """
    with naming_full_disks(store.folder):
        store.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.folder) as file:
            documents = read_documents(spec.data.source, spec.data.field)
            lengths = _write_tokens(file, documents, tokenizer, spec.data.max_tokens, progress or (lambda _: None))
            held_out = _hold_out(lengths, spec)
            dtype = token_dtype(tokenizer.vocabulary_size)
            tokens = np.asarray(np.memmap(file, dtype=dtype, mode="r"))
            return _put_rows(spec, tokenizer.vocabulary_size, store, tokens, held_out)


def _write_tokens(
    file: IO[bytes],
    documents: Iterable[str],
    tokenizer: Tokenizer,
    max_tokens: int | None,
    progress: Callable[[int], None],
) -> NDArray[np.int64]:
    """Append the documents' ids to the file, at most `max_tokens` in all; returns each document's length, (N,)."""
    dtype = token_dtype(tokenizer.vocabulary_size)
    lengths: list[int] = []
    num_tokens = reported_tokens = 0
    for document in documents:
        ids = np.append(tokenizer.encode_to_array(document), tokenizer.end_of_text_id).astype(dtype)
        if max_tokens is not None:
            ids = ids[: max_tokens - num_tokens]
        file.write(ids.tobytes())
        lengths.append(len(ids))
        num_tokens += len(ids)
        if num_tokens - reported_tokens >= _PROGRESS_TOKENS:
            progress(num_tokens)
            reported_tokens = num_tokens
        if num_tokens == max_tokens:
            break
    file.flush()
    progress(num_tokens)
    return np.array(lengths, dtype=np.int64)


def _hold_out(lengths: NDArray[np.int64], spec: RunSpec) -> _Stretches:
    """Choose what is held out: whole short documents and the ends of long ones, all over the text.

    A document's chance is proportional to its length over what is taken of it, so that each token's chance is about
    the same. The budget is spread over 64 stretches, or fewer where rows are long or documents few: of a single one it
    is the end. Raises DataError when the text is too short.
    """
    budget_tokens = _held_out_budget(int(lengths.sum()), spec)
    longest = max(ceil(budget_tokens / _STRETCHES), _STRETCH_ROWS * spec.data.sequence_length)
    while np.minimum(lengths, longest).sum() < budget_tokens:
        longest *= 2
    taken = np.minimum(lengths, longest)
    uniform = (_random_bits(len(lengths), _HELD_OUT_STREAM) >> np.uint64(11)) * 2.0**-53 + 2.0**-54
    order = np.argsort(-np.log(uniform) * (taken / lengths), kind="stable")  # Efraimidis and Spirakis, 2006
    before = np.cumsum(taken[order]) - taken[order]
    chosen = order[before < budget_tokens]
    taken[chosen[-1]] = budget_tokens - before[len(chosen) - 1]  # no more than the budget
    chosen.sort()
    stops = np.cumsum(lengths)[chosen]
    return _Stretches(starts=stops - taken[chosen], stops=stops)


def _held_out_budget(num_tokens: int, spec: RunSpec) -> int:
    """Tokens to hold out: whole rows, and the one id more that the last row predicts."""
    data = spec.data
    row_tokens, shard_tokens = data.sequence_length + 1, spec.shard_tokens + 1
    share_tokens = max(row_tokens, min(int(num_tokens * data.held_out_fraction), data.held_out_max_tokens))
    budget_tokens = share_tokens - (share_tokens - 1) % data.sequence_length
    if num_tokens - budget_tokens < shard_tokens:
        least_share = ceil(shard_tokens * data.held_out_fraction / (1 - data.held_out_fraction))
        needed_tokens = shard_tokens + max(row_tokens, min(least_share, data.held_out_max_tokens))
        limit = "" if data.max_tokens is None else "raise data.max_tokens, "
        raise DataError(
            f"data.source {data.source} gives {num_tokens:,} tokens; one shard and the held-out rows need "
            f"{needed_tokens:,}: {limit}give more text, or lower train.batch_sequences, data.shard_steps or "
            "data.sequence_length"
        )
    return budget_tokens


def _put_rows(
    spec: RunSpec, vocabulary_size: int, store: BlobStore, tokens: NDArray[Any], held_out: _Stretches
) -> DataPlan:
    sequence_length = spec.data.sequence_length
    rows_per_shard = spec.train.batch_sequences * spec.data.shard_steps
    training = _Stretches.but(held_out, len(tokens))
    num_rows = (training.num_tokens - 1) // sequence_length
    num_shards = num_rows // rows_per_shard

    def put(stretches: _Stretches, rows: NDArray[np.int64]) -> str:
        return store.put(encode_shard(stretches.read_rows(tokens, rows, sequence_length), vocabulary_size))

    dealt = np.argsort(_random_bits(num_rows, _DEALING_STREAM, spec.seed), kind="stable")
    shards = np.split(dealt[: num_shards * rows_per_shard], num_shards)
    shard_hashes = tuple(put(training, rows) for rows in shards)
    held_out_rows = (held_out.num_tokens - 1) // sequence_length
    return DataPlan(
        shard_hashes=shard_hashes,
        shard_index_hash=store.put(json.dumps(shard_hashes, separators=(",", ":")).encode()),
        held_out_hash=put(held_out, np.arange(held_out_rows)),
        num_tokens=num_shards * spec.shard_tokens,
        held_out_tokens=held_out_rows * sequence_length,
    )


def _random_bits(count: int, *stream: int) -> NDArray[np.uint64]:
    """64 random bits each, from a stream that no version of numpy may change (its shuffles may)."""
    return np.asarray(np.random.PCG64(stream).random_raw(count), dtype=np.uint64)
