"""What a worker costs: tokens a second of worker.trainer.Trainer, as a worker runs it, against a plain PyTorch loop.

Both train the same transformers model with the same optimizer, batches, gradient clipping and threads. A worker's lease
is everything that `run_lease` does: θ into the model, a schedule, a look at `should_stop` and a report at each step,
the pseudo-gradient at the end, checked to be finite. The plain loop is written below, as anybody would.

Paired and alternating (plain, worker, worker, plain, …); the figure is the median of the pairs' ratios, so a machine
that slows down meets both. Beside it the quartiles of the ratios, which tell how quiet the machine was, the same by the
process's own processor seconds, which say more on a machine that does other things as well (not of a GPU's time), and
what a lease takes besides its steps. `ratio > 0.98` is what is asked for; a run on a machine whose load average was
over its cores, which the measurement itself keeps busy, is marked as not quiet.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.figures import parse_options, write_figures
from protocol import parameters
from protocol.run_spec import RunSpec, parse_run_spec
from worker.device import choose_device, count_cores, describe_device, set_threads, synchronize
from worker.tasks.causal_lm import quiet_transformers
from worker.trainer import Trainer

TARGET = 0.98
VOCABULARY = 256
LEARNING_RATE = 1e-3
SOMEBODY_ELSE = 0.25  # of a core


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, and how it is measured."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    batch: int
    tokens: int  # in a sequence
    lease_steps: int
    pairs: int


CASES = (
    Case(name="1m", hidden=128, intermediate=384, layers=5, batch=8, tokens=64, lease_steps=40, pairs=24),
    Case(name="20m", hidden=384, intermediate=1024, layers=11, batch=8, tokens=128, lease_steps=20, pairs=8),
)
QUICK_CASES = (
    Case(name="1m", hidden=128, intermediate=384, layers=5, batch=8, tokens=64, lease_steps=25, pairs=6),
    Case(name="20m", hidden=384, intermediate=1024, layers=11, batch=8, tokens=128, lease_steps=5, pairs=3),
)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(__doc__.splitlines()[0], argv)
    device = choose_device("auto")
    threads = set_threads()
    load = os.getloadavg()[0]
    print(f"{describe_device(device)}, {threads} threads, torch {torch.__version__}, load average {load:.1f}")
    headings = (
        f"{'plain tokens/s':>15} {'worker tokens/s':>16} {'ratio':>7} {'quartiles':>12} {'by CPU':>7}    lease   pairs"
    )
    print(f"{'model':>8} {'parameters':>12} {headings}")
    figures: dict[str, int | float | str] = {"load_average": round(load, 2), "threads": threads, "device": device.type}
    met = True
    for case in QUICK_CASES if options.quick else CASES:
        plain_runs, worker_runs, lease_s = measure(case, device)
        plain, worker = ([run.tokens / run.wall_s for run in runs] for runs in (plain_runs, worker_runs))
        ratios = [ours / theirs for ours, theirs in zip(worker, plain, strict=True)]
        ratio = statistics.median(ratios)
        cpu_ratio = statistics.median(
            theirs.cpu_s / ours.cpu_s for ours, theirs in zip(worker_runs, plain_runs, strict=True)
        )
        low, _, high = statistics.quantiles(ratios, n=4)
        met = met and ratio >= TARGET
        speeds = f"{statistics.median(plain):>15,.0f} {statistics.median(worker):>16,.0f}"
        each = " ".join(f"{value:.3f}" for value in ratios)
        print(
            f"{case.name:>8} {count_parameters(case):>12,} {speeds} {ratio:>7.3f} {low:>6.3f}-{high:.3f}"
            f" {cpu_ratio:>7.3f} {1e3 * lease_s:>5.0f} ms   {each}",
            flush=True,
        )
        figures |= {
            f"tokens_ratio_{case.name}": round(ratio, 4),
            f"tokens_ratio_low_{case.name}": round(low, 4),
            f"tokens_ratio_high_{case.name}": round(high, 4),
            f"tokens_cpu_ratio_{case.name}": round(cpu_ratio, 4),
            f"lease_cost_s_{case.name}": round(lease_s, 4),
            f"plain_tokens_per_s_{case.name}": round(statistics.median(plain), 1),
            f"worker_tokens_per_s_{case.name}": round(statistics.median(worker), 1),
        }
    load = max(load, os.getloadavg()[0])
    quiet = load < count_cores() + SOMEBODY_ELSE
    figures |= {"load_average_at_most": round(load, 2), "quiet": str(quiet).lower()}
    print(f"asked for: {TARGET}: {'met' if met else 'not met'}")
    if not quiet:
        print(f"the machine was not quiet: a load average of up to {load:.1f}")
    write_figures(options.json, figures)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One lease's steps."""

    tokens: int
    wall_s: float
    cpu_s: float


def measure(case: Case, device: torch.device) -> tuple[list[Run], list[Run], float]:
    """Of each pair: the plain loop, and the worker's trainer; also the seconds of a lease without a step."""
    spec = make_spec(case)
    rows = np.random.default_rng(0).integers(VOCABULARY, size=(case.lease_steps * case.batch, case.tokens + 1))
    shards = np.split(rows.astype(np.int64), case.lease_steps)
    trainer = Trainer(spec, VOCABULARY, device)
    theta = parameters.flatten(trainer.model)
    model = make_model(case).to(device)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    batches = [torch.from_numpy(shard).to(device) for shard in shards]
    plain: list[Run] = []
    worker: list[Run] = []
    num_tokens = case.lease_steps * case.batch * case.tokens
    train_plainly(model, optimizer, batches[:2], device)
    train_as_worker(trainer, theta, shards[:2])
    for pair in range(case.pairs):
        for is_worker in (False, True) if pair % 2 == 0 else (True, False):
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            if is_worker:
                train_as_worker(trainer, theta, shards)
            else:
                train_plainly(model, optimizer, batches, device)
            run = Run(
                tokens=num_tokens,
                wall_s=time.perf_counter() - started_s,
                cpu_s=time.process_time() - started_cpu_s,
            )
            (worker if is_worker else plain).append(run)
    lease_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        train_as_worker(trainer, theta, shards, should_stop=lambda: True)
        lease_s.append(time.perf_counter() - started_s)
    return plain, worker, statistics.median(lease_s)


def train_plainly(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], device: torch.device
) -> list[float]:
    """The loop that one would write: the losses of the steps."""
    losses = []
    model.train()
    for rows in batches:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=rows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    synchronize(device)
    return losses


def train_as_worker(
    trainer: Trainer,
    theta: NDArray[np.float32],
    shards: list[NDArray[np.int64]],
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """A whole lease."""
    tokens = len(shards) * trainer.spec.shard_tokens
    trainer.run_lease(
        theta,
        shards,
        tokens_before=0,
        round_tokens=tokens,
        lease_tokens=tokens,
        should_stop=should_stop,
        on_step=lambda _: None,
    )


def make_spec(case: Case) -> RunSpec:
    """A run whose inner steps are those of the plain loop."""
    return parse_run_spec(
        {
            "model": {"architecture": "llama", "config": model_fields(case)},
            "data": {"sequence_length": case.tokens},
            "train": {"batch_sequences": case.batch, "optimizer": "adamw", "learning_rate": LEARNING_RATE},
        }
    )


def make_model(case: Case) -> nn.Module:
    """The same model, from transformers alone."""
    config: Any = transformers.LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **model_fields(case))
    with quiet_transformers():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def model_fields(case: Case) -> dict[str, int]:
    return {
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }


def count_parameters(case: Case) -> int:
    return parameters.count_parameters(make_model(case))


if __name__ == "__main__":
    sys.exit(main())
