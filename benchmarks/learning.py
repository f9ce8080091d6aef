"""Held-out loss, bytes and virtual time: alone, synchronous, published methods for slow links, and manyhands.

    python -m benchmarks.learning [--quick] [--json FILE] [--pictures FOLDER] [--text PATH] [--size NAME] [--steps S]
        [--runs FOLDER]

Four workers train a small language model (benchmarks.learning_runs), each S inner steps of 512 tokens on a computer
that makes one a second of virtual time with the smallest model, and fewer with larger ones. It stands for a model a
hundred times as large, so that latency counts as little as there: links of 5, 20 or 100 Mbit/s up and five times that
down have a hundredth of it; what is not said otherwise has 20. *Alone* is one worker with its S steps; all others train
four times the tokens. *Synchronous* averages four gradients at every step.

- DiLoCo (arXiv:2311.08105): AdamW, float32, outer Nesterov 0.7/0.9; H = 30, and 500 where a run has room for it.
- SparseLoCo (arXiv:2508.15706): AdamW, the largest 1/64 with error feedback of decay 0.95, outer SGD 1.0, H = 30.
- MuLoCo (arXiv:2505.23725): Muon, 2 bits with error feedback, H = 30, outer Nesterov 0.7 with the momentum that suits
  runs this short, 0.5.
- ours: Muon, rounds that begin at θ less part of the error feedback, momentum turned at merges, the plain average as
  outer step, codec and H by `auto`: what `manyhands init` writes. The methods above have none of these.

Every arm takes the best learning rate of one grid, by the first seed. Further rows are `auto` at 20 Mbit/s at the same
tokens: with workers of 100, 60, 30 and 10 % speed; with five workers, of which one after the other is away; with two
texts, mixed and each known to two workers alone (leases mix them: this is for comparison); with overlap. And what alone
reaches in the virtual time of each `auto`, and synchronous in that of `auto` at 20 Mbit/s. The JSON has the means over
seeds, sizes and texts, and each of them by its name.
"""

import argparse
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.figures import Figure, write_figures
from benchmarks.learning_arms import (
    MIDDLE_MBPS,
    NUM_WORKERS,
    RATES,
    SIZES,
    TEXTS,
    UPLOADS_MBPS,
    Arm,
    Result,
    Size,
    Trial,
    list_arms,
    make_base,
    run_trial,
    train_all,
)
from benchmarks.learning_pictures import Dot, Line, write_picture
from benchmarks.learning_runs import Outcome
from worker.device import set_threads

TABLE_WIDTH = 120


def figures_of(results: Mapping[str, Result]) -> dict[str, Figure]:
    """The flat figures. Those that name no arm are of `auto` at 20 Mbit/s; costs are relative increases of its loss."""
    ours, sync = results[f"auto_{MIDDLE_MBPS}"], results["sync_muon"]
    gap = results["alone_muon"].loss - sync.loss
    rivals = [results[name].loss for name in ("sparseloco", "muloco")]
    return {
        "loss_vs_sync_adamw": ours.loss / results["sync_adamw"].loss,
        "gap_recovered_muon": (results["alone_muon"].loss - ours.loss) / gap,
        "loss_vs_diloco": ours.loss / results["diloco"].loss,
        "loss_vs_best_low_byte_arm": ours.loss / min(rivals),
        "bytes_vs_sync": ours.sent_bytes / sync.sent_bytes,
        "overlap_cost": results["overlap"].loss / ours.loss - 1.0,
        "uneven_cost": results["uneven"].loss / ours.loss - 1.0,
        "breaks_cost": results["breaks"].loss / ours.loss - 1.0,
        "kinds_cost": results["kinds_apart"].loss / results["kinds_mixed"].loss - 1.0,
        "worst_auto_vs_alone": max(results[f"auto_{mbps}"].loss for mbps in UPLOADS_MBPS) / results["alone_muon"].loss,
        "worst_auto_vs_alone_in_time": max(
            results[f"auto_{mbps}"].loss / results[f"alone_muon_in_time_{mbps}"].loss for mbps in UPLOADS_MBPS
        ),
        **{
            f"gap_recovered_muon_{mbps}": (results["alone_muon"].loss - results[f"auto_{mbps}"].loss) / gap
            for mbps in UPLOADS_MBPS
        },
        **{f"loss_{name}": result.loss for name, result in results.items()},
        **{f"sent_bytes_{name}": result.sent_bytes for name, result in results.items()},
        **{f"virtual_hours_{name}": result.seconds / 3600.0 for name, result in results.items()},
    }


def describe_row(name: str, result: Result, arms: Mapping[str, Arm]) -> tuple[str, ...]:
    titles = {
        "uneven": "ours at 20, speeds 100/60/30/10 %",
        "overlap": "ours at 20, overlap",
        "breaks": "ours at 20, five workers, each away for a fifth",
        "kinds_mixed": "ours at 20, two texts mixed",
        "kinds_apart": "ours at 20, two workers have one, two the other",
        f"sync_adamw_in_time_{MIDDLE_MBPS}": f"synchronous, AdamW, in the time of ours at {MIDDLE_MBPS}",
        f"sync_muon_in_time_{MIDDLE_MBPS}": f"synchronous, Muon, in the time of ours at {MIDDLE_MBPS}",
        **{f"alone_muon_in_time_{mbps}": f"alone, Muon, in the time of ours at {mbps}" for mbps in UPLOADS_MBPS},
    }
    spread = f" ± {statistics.stdev(result.losses):.3f}" if len(result.losses) > 1 else ""
    return (
        arms[name].title if name in arms else titles[name],
        f"{result.loss:.4f}{spread}",
        f"{result.rate:g}",
        f"{result.sent_bytes / 1e6:,.3f}",
        str(result.outcomes[0].rounds or ""),
        f"{result.seconds:,.1f}",
    )


def show(console: Console, title: str, arms: Mapping[str, Arm], results: Mapping[str, Result]) -> None:
    table = Table("", "held-out loss", "rate", "sent, MB", "rounds", "virtual s", title=title)
    for name, result in results.items():
        table.add_row(*describe_row(name, result, arms))
    console.print(table)
    for mbps in UPLOADS_MBPS:
        for plan in results[f"auto_{mbps}"].outcomes[0].plans:
            console.print(f"{mbps} Mbit/s: {plan}", highlight=False)


def draw(folder: Path, arms: Mapping[str, Arm], results: Mapping[str, Result]) -> None:
    """learning-bytes.svg, the frontier; learning-time.svg, loss over virtual time."""
    names = [name for name in arms if name in results]
    dots = [
        Dot(name=arms[name].title, x=results[name].sent_bytes / 1e6, y=results[name].loss, ours=name.startswith("auto"))
        for name in names
        if arms[name].num_workers > 1
    ]
    levels = [(arms[name].title, results[name].loss) for name in names if arms[name].num_workers == 1]
    write_picture(folder / "learning-bytes.svg", dots=dots, levels=levels, x_name="megabytes that one worker sends")
    lines = [
        Line(
            name=arms[name].title,
            x=tuple(point.seconds for point in results[name].outcomes[0].curve),
            y=tuple(point.loss for point in results[name].outcomes[0].curve),
            ours=name.startswith("auto"),
        )
        for name in names
    ]
    write_picture(folder / "learning-time.svg", lines=lines, x_name="seconds of virtual time, the links' included")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size, one text, one seed, short runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as a flat JSON object")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the two pictures of the first table")
    parser.add_argument("--text", metavar="PATH", help=f"a file or folder instead of {' and '.join(TEXTS)}")
    parser.add_argument("--size", choices=SIZES, help="one size only")
    parser.add_argument("--steps", type=int, metavar="S", help="inner steps of one worker")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (one a core)")
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="FOLDER",
        help="keep every run there, and do none twice; for one version of the code",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds (3)")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    for folder in (options.pictures, options.runs):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print("learning rates:", {name: list(rates) for name, rates in RATES.items()}, highlight=False)
    texts = {options.text: options.text} if options.text else TEXTS
    texts = dict(list(texts.items())[:1]) if options.quick else texts
    sizes = [options.size] if options.size else ["0.1M"] if options.quick else ["0.4M", "3M"]
    num_seeds = options.seeds or (1 if options.quick else 3)
    tables: dict[str, dict[str, Figure]] = {}
    for size in sizes:
        for text, path in texts.items():
            results = _train_table(console, SIZES[size], f"{size} {text}", path, num_seeds, options)
            if options.pictures is not None and not tables:
                draw(options.pictures, list_arms(0), results)
            tables[f"{size}_{text}"] = figures_of(results)
    write_figures(options.json, _average(tables))


def _train_table(
    console: Console, size: Size, title: str, text: str, num_seeds: int, options: argparse.Namespace
) -> dict[str, Result]:
    num_steps = options.steps or (size.quick_steps if options.quick else size.steps)
    bases = [make_base(size, text, seed) for seed in range(num_seeds)]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), initializer=set_threads, initargs=(1,)) as pool:

        def run_all(trials: Sequence[Trial]) -> Iterable[Outcome]:
            return track(
                pool.map(partial(run_trial, folder=options.runs), trials),
                f"{title}: {len(trials)} runs",
                len(trials),
                console=console,
            )

        results = train_all(bases, num_steps, run_all)
    heading = f"{title}: {NUM_WORKERS} workers, {num_steps} inner steps each, {num_seeds} seed(s)"
    show(console, heading, list_arms(num_steps), results)
    for name, value in figures_of(results).items():
        console.print(f"{name:<36}{value:.5g}", highlight=False)
    return results


def _average(tables: Mapping[str, Mapping[str, Figure]]) -> dict[str, Figure]:
    """The mean of every figure under its own name, and, of more than one table, each under its name and the table's."""
    names = list(next(iter(tables.values())))
    means: dict[str, Figure] = {
        name: statistics.fmean(float(table[name]) for table in tables.values()) for name in names
    }
    if len(tables) == 1:
        return means
    return means | {f"{name}_{title}": value for title, table in tables.items() for name, value in table.items()}


if __name__ == "__main__":
    main()
