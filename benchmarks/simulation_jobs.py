"""The jobs of benchmarks.simulation, as the baselines define them, and a round of one without a coordinator.

`mlp`: 1,000 clients of 50 digits, 64-32-10, batches of 10. `char`: 64 clients, a transformer of 2 layers of 64, 5 steps
of 4 x 64 characters. Shards are clients; the seed is the baselines'.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coordinator.core.effects import CloseRound, Credit, GrantLease
from protocol.run_spec import RunSpec, parse_run_spec
from simulations.learner import Sent, Work
from simulations.learning import digits
from simulations.learning.learner import TensorLearner
from simulations.learning.problem import Problem, TrainingData

SEED = 1234  # of the baselines


def mlp_problem() -> tuple[Problem, list[list[int]], int]:
    """The problem, who trains in each round, and examples a client."""
    with np.load(Path(digits.__file__).parent / "digits.npz") as archive:
        rows = np.column_stack((archive["pixels"], archive["labels"])).astype(np.int32)
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(rows))
    held_out, training = order[: digits.HELD_OUT], order[digits.HELD_OUT :]
    shards = rows[rng.choice(training, size=(1000, 50))]
    data = TrainingData(vocabulary_size=digits.WHITE + 1, shards=shards, held_out=rows[held_out])
    spec = _spec(batch_sequences=10, sequence_length=64, learning_rate=0.1)
    return Problem(spec=spec, task=digits.Digits(), data=data, optimizer="sgd"), _schedule(1000, 100, 20), 50


def char_problem() -> tuple[Problem, list[list[int]], int]:
    """The problem, who trains in each round, and examples a client."""
    clients, vocabulary = 64, 128
    successors = np.random.default_rng(SEED).integers(0, vocabulary, size=(vocabulary, 4))
    texts = [_chain(client, 20 if client < clients else 64, successors) for client in range(clients + 1)]
    data = TrainingData(vocabulary_size=vocabulary, shards=np.stack(texts[:-1]), held_out=texts[-1])
    spec = _spec(batch_sequences=4, sequence_length=64, learning_rate=0.5)
    return Problem(spec=spec, task=_CharTask(), data=data, optimizer="sgd"), _schedule(clients, clients, 5), 20


def _chain(client: int, count: int, successors: Any) -> Any:
    """int32 (count, 65): characters, each mostly one of the four successors of the last, with a client's own habits."""
    rng = np.random.default_rng([SEED, client])
    habits = rng.dirichlet([2.0] * 4)
    rows = np.empty((count, 65), np.int64)
    rows[:, 0] = rng.integers(0, len(successors), count)
    for place in range(64):
        choice = rng.choice(4, size=count, p=habits)
        follows = rng.random(count) < 0.95
        rows[:, place + 1] = np.where(
            follows, successors[rows[:, place], choice], rng.integers(0, len(successors), count)
        )
    return rows.astype(np.int32)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = (rows, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(width, dim=-1))
        scores = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(width // self.heads)) + mask
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class _CharTransformer(nn.Module):
    def __init__(self, vocabulary: int, length: int = 64, width: int = 64) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([_Block(width, 4) for _ in range(2)])
        self.lnf, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.register_buffer("mask", torch.full((length, length), -math.inf).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos.weight
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.lnf(x))


class _CharTask:
    def build_model(self, spec: Any, vocabulary_size: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return _CharTransformer(vocabulary_size)

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten().long())


def _spec(*, batch_sequences: int, sequence_length: int, learning_rate: float) -> RunSpec:
    """FedAvg: a constant rate, no clipping that bites, the plain mean of what was trained in five steps."""
    return parse_run_spec(
        {
            "seed": SEED,
            "data": {"sequence_length": sequence_length, "shard_steps": 5},
            "train": {
                "batch_sequences": batch_sequences,
                "learning_rate": learning_rate,
                "warmup_fraction": 0.0,
                "final_learning_rate_fraction": 1.0,
                "gradient_clip": 1e9,
            },
            "exchange": {"codec": "float32"},
            "outer": {"optimizer": "average"},
            "aggregation": {"rule": "mean"},
        }
    )


def _schedule(clients: int, per_round: int, rounds: int) -> list[list[int]]:
    rng = np.random.default_rng(SEED + 1)
    return [rng.choice(clients, size=per_round, replace=False).tolist() for _ in range(rounds)]


def play_round(learner: TensorLearner, number: int, leases: Mapping[str, int], codec: str, tokens: int) -> None:
    """One round in which every peer of `leases` trains its shard, and all are credited `tokens`."""
    base_digest, round_tokens = learner.digest, tokens * len(leases)
    grants = [
        GrantLease(
            peer=peer,
            lease_id=place,
            round=number,
            base_digest=base_digest,
            units=((number, shard),),
            deadline_in_s=0.0,
            tokens_before=number * round_tokens,
            round_tokens=round_tokens,
            codec=codec,
            codec_options=(),
            contribute=True,
            ahead=(),
        )
        for place, (peer, shard) in enumerate(leases.items())
    ]
    learner.open_round([Work(grant=grant, num_units=1) for grant in grants])
    credits_ = [_credit(grant, learner.contribute(grant.peer), tokens) for grant in grants]
    learner.close_round(
        CloseRound(
            round=number,
            base_digest=base_digest,
            credits=tuple(sorted(credits_, key=lambda credit: credit.payload_hash)),
            divisor=float(round_tokens),
            groups=(),
            leased_peers=len(credits_),
            closed_because="all are here",
            inner_steps=1,
            plan="",
            tokens_after=(number + 1) * round_tokens,
            opened_s=0.0,
        )
    )


def _credit(grant: GrantLease, sent: Sent, tokens: int) -> Credit:
    return Credit(
        peer=grant.peer,
        name=grant.peer,
        lease_id=grant.lease_id,
        units=grant.units,
        tokens=tokens,
        contribution_hash=sent.payload_hash,
        payload_hash=sent.payload_hash,
        payload_bytes=sent.payload_bytes,
        codec=grant.codec,
        mean_loss=sent.mean_loss,
        norm=sent.norm,
        weight=float(tokens),
        clip=1.0,
    )
