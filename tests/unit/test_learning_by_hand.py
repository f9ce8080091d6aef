"""A run of the benchmark beside the same run written out in plain PyTorch: the two curves of held-out loss are one.

Of this project the second takes the codec alone. What both are given: the initial weights, the rows, and who trained
which of them (the coordinator's leases).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.learning_runs import Fleet, change, load_problem, train_rounds
from protocol.codecs import codec_of, get_codec
from protocol.run_spec import RunSpec
from simulations.learner import Work
from simulations.learning.learner import TensorLearner
from simulations.learning.problem import Problem

WORDS = ["worker", "trains", "lease", "and", "sends", "what", "learned", "the", "peers", "round"]
NUM_WORKERS, NUM_STEPS, INNER_STEPS, BATCH, LENGTH = 3, 30, 6, 4, 32
TOKENS = NUM_WORKERS * NUM_STEPS * BATCH * LENGTH
RATE, WARMUP, FINAL, DECAY, CLIP = 4e-3, 0.1, 0.1, 0.1, 1.0
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture
def problem(tmp_path: Any) -> Iterator[Problem]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "words.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 12_000)))
    spec = RunSpec.model_validate(
        {
            "model": {"config": MODEL},
            "data": {"source": str(tmp_path / "words.txt"), "sequence_length": LENGTH, "held_out_max_tokens": 4096},
            "train": {"batch_sequences": BATCH, "learning_rate": RATE, "tokens": TOKENS, "warmup_fraction": WARMUP},
            "round": {"inner_steps": INNER_STEPS},
            "outer": {"optimizer": "average"},
            "checkpoint": {"every_rounds": 1},
        }
    )
    yield load_problem(spec)
    torch.set_num_threads(before)


def newton_schulz(m: Tensor) -> Tensor:
    o = m / m.norm()
    for _ in range(5):
        gram = o @ o.T if len(o) <= len(o.T) else o.T @ o
        gram = -4.7750 * gram + 2.0315 * gram @ gram
        o = 3.4445 * o + (gram @ o if len(o) <= len(o.T) else o @ gram)
    return o


class Muon(torch.optim.Muon):
    """torch's, which takes bfloat16, in float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(0.95).add_(p.grad, alpha=0.05)
                p.mul_(1 - group["lr"] * DECAY)
                p.sub_(group["lr"] * 0.2 * math.sqrt(max(p.shape)) * newton_schulz(0.05 * p.grad + 0.95 * m))


class ByHand:
    """Workers that train in turn, each with its own optimizers and residual e; θ is a flat vector."""

    def __init__(self, problem: Problem, optimizer: str, codec: str) -> None:
        given = list(problem.build_model().parameters())
        size = problem.data.vocabulary_size
        self.model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL, vocab_size=size))
        self.theta = torch.cat([p.detach().flatten() for p in given])
        self.codec = get_codec(codec)
        self.residuals = [torch.zeros_like(self.theta) for _ in range(NUM_WORKERS)]
        self.optimizers = [self.make_optimizers(optimizer) for _ in range(NUM_WORKERS)]
        self.states: list[Any] = [[o.state_dict() for o in each] for each in self.optimizers]
        self.moved: Tensor | None = None  # by the last merge
        self.rate_sum = 0.0

    def make_optimizers(self, name: str) -> list[torch.optim.Optimizer]:
        named = dict(self.model.named_parameters())
        hidden = [p for n, p in named.items() if name == "muon" and p.ndim == 2 and n.startswith("model.layers")]
        rest = [p for p in named.values() if all(p is not h for h in hidden)]
        groups = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": DECAY},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
        if hidden:
            made.append(Muon(hidden, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
        return made

    def put(self, theta: Tensor) -> None:
        nn.utils.vector_to_parameters(theta.clone(), self.model.parameters())

    def loss(self, rows: Tensor) -> Tensor:
        logits = self.model(rows[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def rate(self, tokens: float) -> float:
        if tokens < WARMUP * TOKENS:
            return RATE * tokens / (WARMUP * TOKENS)
        progress = min(1.0, (tokens - WARMUP * TOKENS) / (TOKENS - WARMUP * TOKENS))
        return RATE * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))

    def train(self, worker: int, batches: Tensor, before: int, round_tokens: int) -> Tensor:
        """Its steps from θ - e/4; returns what it sends, decoded, which e has lost."""
        start = self.theta - 0.4 * self.residuals[worker]
        self.put(start)
        for optimizer, state in zip(self.optimizers[worker], self.states[worker], strict=True):
            optimizer.load_state_dict(state)
            if self.moved is not None and isinstance(optimizer, Muon):
                self.turn(optimizer, self.moved)
        for number, rows in enumerate(batches):
            self.model.zero_grad()
            self.loss(rows).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            for optimizer in self.optimizers[worker]:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(before + round_tokens * (number + 0.5) / len(batches))
                optimizer.step()
        self.states[worker] = [optimizer.state_dict() for optimizer in self.optimizers[worker]]
        residual = self.residuals[worker] + start - nn.utils.parameters_to_vector(self.model.parameters()).detach()
        payload = self.codec.encode(residual.numpy())
        decoded = np.zeros(len(residual), np.float32)
        codec_of(payload).accumulate(payload, 1.0, decoded)
        self.residuals[worker] = residual - torch.from_numpy(decoded)
        return torch.from_numpy(decoded)

    def turn(self, optimizer: Muon, moved: Tensor) -> None:
        """Replace most of the momentum M = O S, which is orthogonal times symmetric, by what was agreed on times S."""
        sizes = [p.numel() for p in self.model.parameters()]
        parts = dict(zip(self.model.parameters(), moved.split(sizes), strict=True))
        for parameter, state in optimizer.state.items():
            m, u = state["momentum_buffer"], parts[parameter].view_as(parameter)
            u = u / (self.rate_sum * 0.2 * math.sqrt(max(u.shape)))
            o = newton_schulz(m)
            m.copy_(0.2 * m + 0.8 * (m @ o.T @ u + u @ o.T @ m) / 2)

    def play_round(self, works: Sequence[Work], shards: Tensor) -> None:
        sent = [
            self.train(
                int(work.grant.peer.removeprefix("peer-")),
                shards[[index for _, index in work.grant.units]],
                work.grant.tokens_before,
                work.grant.round_tokens,
            )
            for work in works
        ]
        weights = [len(work.grant.units) for work in works]
        mean = sum((w * s for w, s in zip(weights, sent, strict=True)), torch.zeros_like(self.theta)) / sum(weights)
        self.theta, self.moved = self.theta - mean, mean
        middle = works[0].grant.tokens_before + sum(weights) * BATCH * LENGTH / 2  # a shard is a step here
        self.rate_sum = sum(w * w for w in weights) / sum(weights) * self.rate(middle)


@pytest.mark.parametrize(("optimizer", "codec"), [("muon", "int2"), ("adamw", "sign")])
def test_the_loss_curve_is_that_of_the_same_run_written_by_hand(
    problem: Problem, optimizer: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[Sequence[Work]] = []
    open_round = TensorLearner.open_round

    def note_round(self: TensorLearner, works: Sequence[Work]) -> None:
        rounds.append(works)
        open_round(self, works)

    monkeypatch.setattr(TensorLearner, "open_round", note_round)
    spec = change(problem.spec, train={"optimizer": optimizer}, exchange={"codec": codec})
    ours = Problem(spec=spec, task=problem.task, data=problem.data, optimizer=spec.train.optimizer)
    outcome = train_rounds(ours, Fleet(steps_per_s=(10.0,) * NUM_WORKERS, upload_bps=2e7, download_bps=1e8))

    hand = ByHand(ours, optimizer, codec)
    shards, held_out = (torch.from_numpy(rows).long() for rows in (problem.data.shards, problem.data.held_out))
    losses = []
    for works in rounds:
        hand.play_round(works, shards)
        hand.put(hand.theta)
        with torch.no_grad():
            losses.append(hand.loss(held_out).item())
    assert len(losses) == NUM_STEPS // INNER_STEPS
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose([point.loss for point in outcome.curve], losses, atol=1e-3)
