"""Held-out loss at equal tokens: alone, synchronous, DiLoCo, and manyhands over links of three speeds.

    python -m benchmarks.convergence [--quick] [--json FILE] [--text PATH] [--steps S] [--seeds N]

*Alone* is one worker with its S inner steps; every other arm trains four times the tokens. *Synchronous* is one
optimizer whose every step averages the gradients of four batches, exchanged as float32 by a ring all-reduce. *DiLoCo*
is four workers with AdamW that send float32 and take outer Nesterov steps: 0.7/0.9 as published, and with the milder
momentum that suits runs this short. *Ours* are four workers with Muon whose parameters are averaged every H steps,
trained as a real run trains them (benchmarks.training). With `auto`, codec and H follow from links of so many Mbit/s up
and five times that down, where a worker makes STEPS_PER_S inner steps a second.

Every arm gets the best of the settings that its row shows, chosen with the first seed. `gap`: the share of the way from
alone to synchronous, with AdamW (above 100 %: better than synchronous AdamW) and with Muon. One thread throughout.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.figures import Figure, write_figures
from benchmarks.training import DEVICE, Dataset, Link, Outcome, load_dataset, train_single, train_together
from protocol.run_spec import AUTO, RunSpec
from worker.device import set_threads
from worker.preparation import measure_speed
from worker.trainer import Trainer

NUM_WORKERS = 4
STEPS_PER_S = 50.0
UPLOADS_MBPS = (5, 20, 100)
DOWN_OVER_UP = 5
ADAMW_RATES = (3e-3, 6e-3)
MUON_RATES = (2e-2, 3e-2)
ADAMW_WARMUP = 0.3  # of the run: at 200 steps the best of 0.02, 0.1, 0.2, 0.3 and 0.4; Muon is best with the default
DILOCO_STEPS = (10, 30, 100)
MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
BENCHMARK_S = 3.0
TABLE_WIDTH = 110

Setting = dict[str, dict[str, Any]]  # sections of run.toml, over the base


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One row of the table: how it trains, and the settings that it may choose from, by their names in the table."""

    title: str
    grid: Mapping[str, Setting]
    num_workers: int = NUM_WORKERS
    rounds: bool = False  # else the workers average their gradients at every step
    link: Link | None = None

    def count_batches(self, num_steps: int, num_seeds: int) -> int:
        """Batches that it trains: every setting for the first seed, the best one for the others."""
        return num_steps * self.num_workers * (len(self.grid) + num_seeds - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an arm came to, in its best setting. losses: one a seed, in nats a token."""

    losses: tuple[float, ...]
    setting: str
    upload_bytes: float  # of one worker in the whole run
    plans: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


def plan_arms(*, quick: bool) -> dict[str, Arm]:
    """The arms, by the name that their figures have."""
    adamw, muon = _vary_rate("adamw", ADAMW_RATES, quick=quick), _vary_rate("muon", MUON_RATES, quick=quick)
    published, mild = ((30,), (10,)) if quick else (DILOCO_STEPS, DILOCO_STEPS[:2])  # the whole grid's best
    average = {"optimizer": "average", "learning_rate": 1.0, "momentum": 0.0}
    auto: Setting = {"exchange": {"codec": AUTO}, "round": {"inner_steps": AUTO}, "outer": average}
    sparse: Setting = {
        "exchange": {"codec": "sparse", "codec_options": {"k": 512}},
        "round": {"inner_steps": 5},
        "outer": average,
    }
    arms = {
        "alone": Arm(title="alone, adamw", grid=adamw, num_workers=1),
        "alone_muon": Arm(title="alone, muon", grid=muon, num_workers=1),
        "synchronous": Arm(title="synchronous, adamw", grid=adamw),
        "synchronous_muon": Arm(title="synchronous, muon", grid=muon),
        "diloco_published": Arm(title="DiLoCo float32, 0.7/0.9", grid=_vary_steps(adamw, published, 0.9), rounds=True),
        "diloco_mild": Arm(title="DiLoCo float32, 0.7/0.5", grid=_vary_steps(adamw, mild, 0.5), rounds=True),
        "sparse": Arm(title="ours, sparse k=512, H 5", grid=_add(muon, sparse), rounds=True),
    }
    for mbps in UPLOADS_MBPS:
        link = Link(upload_bps=mbps * 1e6, download_bps=DOWN_OVER_UP * mbps * 1e6)
        arms[f"auto_{mbps}"] = Arm(title=f"ours, auto, {mbps} Mbit/s", grid=_add(muon, auto), rounds=True, link=link)
    return arms


def _vary_rate(optimizer: str, rates: Sequence[float], *, quick: bool) -> dict[str, Setting]:
    warmup = {"warmup_fraction": ADAMW_WARMUP} if optimizer == "adamw" else {}
    return {
        f"{rate:g}": {"train": {"optimizer": optimizer, "learning_rate": rate, **warmup}}
        for rate in (rates[:1] if quick else rates)
    }


def _vary_steps(grid: Mapping[str, Setting], inner_steps: Sequence[int], momentum: float) -> dict[str, Setting]:
    """`grid` times these H, sent as float32, with DiLoCo's outer optimizer."""
    outer = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": momentum}
    return {
        f"{name} H {steps}": setting
        | {"exchange": {"codec": "float32"}, "round": {"inner_steps": steps}, "outer": outer}
        for steps in inner_steps
        for name, setting in grid.items()
    }


def _add(grid: Mapping[str, Setting], more: Setting) -> dict[str, Setting]:
    return {name: setting | more for name, setting in grid.items()}


def train_arm(
    arm: Arm, base: RunSpec, datasets: Sequence[Dataset], num_steps: int, on_batches: Callable[[int], None]
) -> Result:
    """Train an arm for S = num_steps, once for each dataset, which is its run's data under the seed of its place."""

    def train(setting: str, seed: int) -> Outcome:
        spec = change(base, seed=seed, **arm.grid[setting])
        spec = change(spec, train={"tokens": num_steps * arm.num_workers * base.step_tokens})
        if arm.rounds:
            speeds = (STEPS_PER_S,) * arm.num_workers
            return train_together(spec, datasets[seed], speeds, arm.link, lambda: on_batches(1))
        return train_single(spec, datasets[seed], arm.num_workers, lambda: on_batches(arm.num_workers))

    first = {setting: train(setting, 0) for setting in arm.grid}
    best = min(first, key=lambda setting: first[setting].loss)
    outcomes = [first[best], *(train(best, seed) for seed in range(1, len(datasets)))]
    ring_bytes = 2 * (arm.num_workers - 1) / arm.num_workers * 4 * outcomes[0].state.theta.size * num_steps
    sent = [max(outcome.upload_bytes) if arm.rounds else ring_bytes for outcome in outcomes]
    return Result(
        losses=tuple(outcome.loss for outcome in outcomes),
        setting=best,
        upload_bytes=statistics.fmean(sent),
        plans=first[best].plans,
    )


def change(spec: RunSpec, **sections: Any) -> RunSpec:
    """The spec with some values replaced: tables key by key, anything else as a whole. Checked as run.toml is."""
    values = spec.model_dump()
    for name, value in sections.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return RunSpec.model_validate(values)


def recovered(results: Mapping[str, Result], name: str, suffix: str = "") -> float:
    """The share of the gap between alone and synchronous that an arm closes; above 1 it is below synchronous.

    suffix: "" for the gap with AdamW, "_muon" for the one with Muon.
    """
    alone, synchronous = results[f"alone{suffix}"].loss, results[f"synchronous{suffix}"].loss
    return (alone - results[name].loss) / (alone - synchronous)


def figures_of(results: Mapping[str, Result]) -> dict[str, Figure]:
    """The flat figures: losses in nats a token; those that name no arm are of `auto` at 20 Mbit/s.

    loss_vs_diloco_fp32: over the better of the two DiLoCo arms.
    """
    diloco = min(results["diloco_published"].loss, results["diloco_mild"].loss)
    return {
        **{f"loss_{name}": result.loss for name, result in results.items()},
        **{f"losses_{name}": " ".join(f"{loss:.4f}" for loss in result.losses) for name, result in results.items()},
        **{f"upload_bytes_{name}": result.upload_bytes for name, result in results.items()},
        "gap_recovered": recovered(results, "auto_20"),
        **{f"gap_recovered_muon_{mbps}": recovered(results, f"auto_{mbps}", "_muon") for mbps in UPLOADS_MBPS},
        "loss_vs_diloco_fp32": results["auto_20"].loss / diloco,
        "loss_vs_diloco_fp32_published": results["auto_20"].loss / results["diloco_published"].loss,
    }


def measure_step_ms(base: RunSpec, vocabulary_size: int) -> dict[str, Figure]:
    """Milliseconds of one inner step by each optimizer: the median of three seconds."""
    names = ("adamw", "muon")
    speeds = {
        name: measure_speed(Trainer(change(base, train={"optimizer": name}), vocabulary_size, DEVICE), BENCHMARK_S)
        for name in names
    }
    return {f"{name}_ms_per_step": 1e3 / speeds[name].steps_per_s for name in names}


def show(console: Console, arms: Mapping[str, Arm], results: Mapping[str, Result]) -> None:
    table = Table("", "held-out loss", "gap adamw", "muon", "best setting", "uploads, MB")
    for name, result in results.items():
        spread = f" ± {statistics.stdev(result.losses):.3f}" if len(result.losses) > 1 else ""
        table.add_row(
            arms[name].title,
            f"{result.loss:.3f}{spread}",
            f"{recovered(results, name):.0%}",
            f"{recovered(results, name, '_muon'):.0%}",
            result.setting,
            f"{result.upload_bytes / 1e6:,.2f}" if arms[name].num_workers > 1 else "0",
        )
    console.print(table)
    for name, result in results.items():
        console.print(f"{arms[name].title}: best of {', '.join(arms[name].grid)}", highlight=False)
        for plan in result.plans if arms[name].link else ():
            console.print(f"  {plan}", highlight=False)


@contextmanager
def count_progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=total)
        yield lambda batches: progress.advance(task, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one rate and one H an arm: some minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as a flat JSON object")
    parser.add_argument("--text", default="stdlib", metavar="PATH", help="a file, a folder, or stdlib (default)")
    parser.add_argument("--steps", type=int, default=200, metavar="S", help="inner steps of one worker (200)")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds (3)")
    options = parser.parse_args()
    num_steps, num_seeds = (
        options.steps or (120 if options.quick else 200),
        options.seeds or (1 if options.quick else 3),
    )
    set_threads(1)  # as a worker of the demo; with more, steps this small mostly wait for each other on a busy machine
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    data = {"source": options.text, "max_tokens": 1_000_000, "sequence_length": 64}
    base = change(RunSpec(), data=data, model={"config": MODEL})
    datasets = [load_dataset(change(base, seed=seed)) for seed in range(num_seeds)]
    vocabulary_size = datasets[0].vocabulary_size
    step_ms = measure_step_ms(base, vocabulary_size)
    arms = plan_arms(quick=options.quick)
    with count_progress(console, sum(arm.count_batches(num_steps, num_seeds) for arm in arms.values())) as on_batches:
        results = {name: train_arm(arm, base, datasets, num_steps, on_batches) for name, arm in arms.items()}
    console.print(
        f"{Trainer(base, vocabulary_size, DEVICE).num_parameters:,} parameters, {NUM_WORKERS} workers with {num_steps} "
        f"steps of {base.step_tokens} tokens each, {num_seeds} seed(s), text: {options.text}"
    )
    show(console, arms, results)
    figures = figures_of(results) | step_ms
    for name, value in figures.items():
        shown = value if isinstance(value, str) else f"{value:.4f}"
        console.print(f"{name:<32}{shown}", highlight=False)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
