"""Held-out loss alone, together and synchronous, at equal steps and equal tokens, and the bytes that it takes.

    python -m benchmarks.convergence [--quick] [--json FILE] [--text PATH] [--steps S] [--seeds N]

*Alone* is one worker with its own S inner steps. *manyhands* are N workers with S steps each on average, trained as a
real run trains them (benchmarks.training). *Synchronous* is one optimizer whose every step averages the gradients of N
batches: the same tokens, every gradient exchanged at every step as float32, by a ring all-reduce. Alone and synchronous
get the best learning rate of the grid that is printed, manyhands that of run.toml's defaults, which it runs with
throughout; its workers begin with the same seed. `gap` is the share of the way from alone to synchronous, both AdamW.

--quick takes a model a third of the size, fewer steps, rates and arms.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.figures import Figure, write_figures
from benchmarks.training import DEVICE, Dataset, Outcome, load_dataset, train_single, train_together
from protocol.run_spec import RunSpec
from worker.device import set_threads
from worker.trainer import Trainer

ADAMW_RATES = (1.5e-3, 3e-3, 6e-3)
MUON_RATES = (4e-3, 8e-3)
EVEN, UNEVEN, MANY = (1.0,) * 3, (1.0, 0.6, 0.3), (1.0,) * 8  # inner steps a second, relative; UNEVEN is the demo's
SMALL: dict[str, Any] = {
    "model": {
        "config": {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        }
    }
}
BENCHMARK_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One row of the table: how it trains, and at which learning rates it may."""

    title: str
    optimizer: str
    rates: tuple[float, ...]
    batches: int = 1  # of the run's batch in one step, without rounds
    speeds: tuple[float, ...] = ()  # of manyhands' workers

    @property
    def width(self) -> int:
        """Batches trained for each of the S steps."""
        return len(self.speeds) or self.batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an arm came to, at its best rate. losses: one a seed, in nats a token."""

    losses: tuple[float, ...]
    learning_rate: float
    upload_bytes: float  # of the worker that sends most, in the whole run

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


def plan_arms(spec: RunSpec, *, quick: bool) -> dict[str, Arm]:
    """The arms by the name that their figures have. The other optimizer than the spec's is tried for honesty."""
    adamw, muon = (ADAMW_RATES[:2], MUON_RATES[:1]) if quick else (ADAMW_RATES, MUON_RATES)
    chosen, rate = spec.train.optimizer, (spec.train.learning_rate,)
    other, other_rates = ("adamw", adamw[:1]) if chosen == "muon" else ("muon", muon[:1])
    arms = {
        "alone": Arm(title="alone, adamw", optimizer="adamw", rates=adamw),
        "alone_muon": Arm(title="alone, muon", optimizer="muon", rates=muon),
        "synchronous": Arm(title="synchronous, 3 batches, adamw", optimizer="adamw", rates=adamw, batches=3),
        "synchronous_muon": Arm(title="synchronous, 3 batches, muon", optimizer="muon", rates=muon, batches=3),
        "manyhands": Arm(title=f"manyhands, 3 workers, {chosen}", optimizer=chosen, rates=rate, speeds=EVEN),
        "manyhands_uneven": Arm(
            title=f"manyhands, 100/60/30 % speed, {chosen}", optimizer=chosen, rates=rate, speeds=UNEVEN
        ),
        f"manyhands_{other}": Arm(
            title=f"manyhands, 3 workers, {other}", optimizer=other, rates=other_rates, speeds=EVEN
        ),
    }
    if not quick:
        arms["synchronous_8"] = Arm(
            title="synchronous, 8 batches, adamw", optimizer="adamw", rates=adamw[1:], batches=len(MANY)
        )
        arms["manyhands_8"] = Arm(title=f"manyhands, 8 workers, {chosen}", optimizer=chosen, rates=rate, speeds=MANY)
    return arms


def count_batches(arms: dict[str, Arm], num_steps: int, num_seeds: int) -> int:
    """Batches that all arms train together: every rate for the first seed, the best one for the others."""
    return sum(num_steps * arm.width * (len(arm.rates) + num_seeds - 1) for arm in arms.values())


def train_arm(
    arm: Arm, base: RunSpec, datasets: Sequence[Dataset], num_steps: int, on_batches: Callable[[int], None]
) -> Result:
    """Train an arm for S = num_steps, once for each dataset, which is its run's data under the seed of its place."""

    def train(rate: float, seed: int) -> Outcome:
        tokens = num_steps * arm.width * base.step_tokens
        spec = change(base, seed=seed, train={"tokens": tokens, "optimizer": arm.optimizer, "learning_rate": rate})
        if arm.speeds:
            return train_together(spec, datasets[seed], arm.speeds, lambda: on_batches(1))
        return train_single(spec, datasets[seed], arm.batches, lambda: on_batches(arm.batches))

    first = {rate: train(rate, 0) for rate in arm.rates}
    best = min(first, key=lambda rate: first[rate].loss)
    outcomes = [first[best], *(train(best, seed) for seed in range(1, len(datasets)))]
    ring_bytes = 2 * (arm.batches - 1) / arm.batches * 4 * outcomes[0].state.theta.size * num_steps
    sent = [max(outcome.upload_bytes) if arm.speeds else ring_bytes for outcome in outcomes]
    return Result(
        losses=tuple(outcome.loss for outcome in outcomes),
        learning_rate=best,
        upload_bytes=statistics.fmean(sent),
    )


def change(spec: RunSpec, **sections: Any) -> RunSpec:
    """The spec with some values replaced: tables key by key, anything else as a whole. Checked as run.toml is."""
    values = spec.model_dump()
    for name, value in sections.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return RunSpec.model_validate(values)


def recovered(alone: Result, result: Result, synchronous: Result) -> float:
    """The share of the gap between alone and synchronous that `result` closes; above 1 it is below synchronous."""
    return (alone.loss - result.loss) / (alone.loss - synchronous.loss)


def figures_of(results: dict[str, Result], spec: RunSpec) -> dict[str, Figure]:
    """The flat figures; losses in nats a token."""
    suffix = "_muon" if spec.train.optimizer == "muon" else ""
    alone, synchronous, together = results["alone"], results["synchronous"], results["manyhands"]
    same_alone, same_synchronous = results[f"alone{suffix}"], results[f"synchronous{suffix}"]
    return {
        **{f"loss_{name}": result.loss for name, result in results.items()},
        "gap_recovered": recovered(alone, together, synchronous),
        "gap_recovered_same_optimizer": recovered(same_alone, together, same_synchronous),
        "upload_bytes": together.upload_bytes,
        "upload_share_of_synchronous": together.upload_bytes / synchronous.upload_bytes,
    }


def measure_step_ms(base: RunSpec, vocabulary_size: int) -> dict[str, Figure]:
    """Milliseconds of one inner step by each optimizer: the median of three seconds."""
    names = ("adamw", "muon")
    speeds = {
        name: Trainer(change(base, train={"optimizer": name}), vocabulary_size, DEVICE).benchmark(BENCHMARK_S)
        for name in names
    }
    return {f"{name}_ms_per_step": 1e3 / speeds[name] for name in names}


def show(console: Console, arms: dict[str, Arm], results: dict[str, Result]) -> None:
    table = Table("", "held-out loss", "gap", "learning rate (of)", "one worker uploads")
    for name, result in results.items():
        arm = arms[name]
        synchronous = results["synchronous_8" if arm.width == len(MANY) else "synchronous"]
        each = f" ({' '.join(f'{loss:.3f}' for loss in result.losses)})" if len(result.losses) > 1 else ""
        table.add_row(
            arm.title,
            f"{result.loss:.4f}{each}",
            f"{100 * recovered(results['alone'], result, synchronous):.0f} %",
            f"{result.learning_rate:g} ({', '.join(f'{rate:g}' for rate in arm.rates)})",
            f"{result.upload_bytes / 1e6:,.2f} MB" if result.upload_bytes else "nothing",
        )
    console.print(table)


def describe(spec: RunSpec, num_parameters: int, num_steps: int, num_seeds: int) -> str:
    """What all arms have in common, and manyhands' settings."""
    outer = f"{spec.outer.optimizer} {spec.outer.learning_rate}/{spec.outer.momentum}"
    return (
        f"{num_parameters:,} parameters, {num_steps} steps a worker, {spec.step_tokens} tokens each, {num_seeds} "
        f"seed(s), text: {spec.data.source}\nmanyhands: {spec.train.optimizer} at {spec.train.learning_rate:g}, "
        f"H = {spec.round.inner_steps}, {spec.exchange.codec}, outer {outer}"
    )


@contextmanager
def count_progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=total)
        yield lambda batches: progress.advance(task, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer rates and arms: a few minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as a flat JSON object")
    parser.add_argument("--text", default="stdlib", metavar="PATH", help="a file, a folder, or stdlib (default)")
    parser.add_argument("--steps", type=int, default=300, metavar="S", help="inner steps of one worker (300)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds (1)")
    options = parser.parse_args()
    set_threads(1)  # as a worker of the demo; with more, steps this small mostly wait for each other on a busy machine
    console = Console()
    most_tokens = 1_000_000 if options.quick else 3_000_000
    base = change(RunSpec(), data={"source": options.text, "max_tokens": most_tokens}, **SMALL if options.quick else {})
    datasets = [load_dataset(change(base, seed=seed)) for seed in range(options.seeds)]
    step_ms = measure_step_ms(base, datasets[0].vocabulary_size)
    arms = plan_arms(base, quick=options.quick)
    with count_progress(console, count_batches(arms, options.steps, options.seeds)) as on_batches:
        results = {name: train_arm(arm, base, datasets, options.steps, on_batches) for name, arm in arms.items()}
    num_parameters = Trainer(base, datasets[0].vocabulary_size, DEVICE).num_parameters
    console.print(describe(base, num_parameters, options.steps, options.seeds))
    show(console, arms, results)
    figures = figures_of(results, base) | step_ms
    for name, value in figures.items():
        console.print(f"{name:<32}{value:.4f}", highlight=False)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
