"""What is learned in a simulation: a task, its data, and the inner optimizer.

Every example is a row of integers (C,), C = data.sequence_length + 1: tokens for a language model, for a classifier the
inputs and then the label. So one set of batches, one trainer and one core serve both.

Shape letters: N shards, R rows in a shard, C columns.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from protocol.errors import ConfigError, DataError
from protocol.run_spec import RunSpec

Optimizer = Literal["adamw", "muon", "sgd"]


class LearningTask(Protocol):
    """The part of worker.tasks.Task that a simulation needs. Tasks are pickled: give them no open files."""

    def build_model(self, spec: RunSpec, vocabulary_size: int, seed: int) -> nn.Module:
        """The model, float32 on the CPU; random weights depend on `seed` alone. Raises ConfigError."""

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The mean loss of int32 or int64 rows (B, C), as a float32 scalar to differentiate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What peers train on, int32 (N, R, C), and what the state is evaluated on, int32 (*, C)."""

    vocabulary_size: int
    shards: NDArray[np.int32]
    held_out: NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """All that a backend needs to know. optimizer: that of the inner steps; `sgd` keeps no state."""

    spec: RunSpec
    task: LearningTask
    data: TrainingData
    optimizer: Optimizer

    def __post_init__(self) -> None:
        data = self.spec.data
        expected = (data.shard_steps * self.spec.train.batch_sequences, data.sequence_length + 1)
        if self.data.shards.shape[1:] != expected:
            raise ValueError(f"shards of shape {self.data.shards.shape[1:]}; this run's have {expected}")

    def build_model(self) -> nn.Module:
        """A new model with the run's initial weights."""
        return self.task.build_model(self.spec, self.data.vocabulary_size, self.spec.seed)


def make_problem(task: Literal["lm", "digits"], spec: RunSpec) -> Problem:
    """The problem of that name. Raises ConfigError where the spec does not fit it, DataError without enough data."""
    if task == "digits":
        from simulations.learning.digits import Digits, load_digits

        return Problem(spec=spec, task=Digits(), data=load_digits(spec), optimizer=spec.train.first_optimizer)
    from worker.tasks import TASKS  # imports transformers

    return Problem(spec=spec, task=TASKS["causal_lm"], data=load_text(spec), optimizer=spec.train.first_optimizer)


def load_text(spec: RunSpec) -> TrainingData:
    """Cut `spec.data.source` as a coordinator does, and read the shards back. Raises DataError, ConfigError."""
    from coordinator.shards import cut_shards
    from protocol.exchange.store import BlobStore
    from protocol.shard_format import decode_shard
    from protocol.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec.data.tokenizer)
    size = tokenizer.vocabulary_size
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        plan = cut_shards(spec, tokenizer, store)
        shards = [decode_shard(store.read(hash_), size).astype(np.int32) for hash_ in plan.shard_hashes]
        held_out = decode_shard(store.read(plan.held_out_hash), size).astype(np.int32)
    return TrainingData(vocabulary_size=size, shards=np.stack(shards), held_out=held_out)


def deal_rows(rows: NDArray[np.int32], held_out: int, spec: RunSpec) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Shuffle rows (*, C) by the spec's seed; returns shards (N, R, C) and `held_out` rows of their own.

    Raises ConfigError when the rows are not as wide as the spec says, DataError when they make no whole shard.
    """
    width, size = spec.data.sequence_length + 1, spec.data.shard_steps * spec.train.batch_sequences
    if rows.shape[1] != width:
        raise ConfigError(f"data.sequence_length = {width - 1}; this task's is {rows.shape[1] - 1}")
    num_shards = (len(rows) - held_out) // size
    if num_shards < 1:
        raise DataError(f"{len(rows) - held_out} examples do not fill one shard of {size}; lower data.shard_steps")
    order = np.random.Generator(np.random.PCG64(spec.seed)).permutation(len(rows))
    training = rows[order[held_out : held_out + num_shards * size]]
    return training.reshape(num_shards, size, width), rows[order[:held_out]]
