"""How the same tokens are learnt by 2 to 128 workers: what batch and learning rate should do when there are many.

    python -m benchmarks.many_workers [--quick] [--json FILE]

The small model of benchmarks.learning on the same text, 1.2 M tokens in the whole run whatever the number of workers,
so that each of N has a N-th of the steps. Inner steps of 512 tokens, and of 64; codec, H and learning rate are `auto`
over 20 Mbit/s, as `manyhands init` has it, and that rate halved and doubled. One seed.
"""

import sys

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.figures import Figure, parse_options, write_figures
from benchmarks.learning_arms import (
    DOWN_OVER_UP,
    MIDDLE_MBPS,
    SCALE,
    SIZES,
    TEXTS,
    list_arms,
    make_base,
)
from benchmarks.learning_runs import Fleet, Outcome, change, load_problem, train_rounds
from protocol.parameters import count_parameters
from protocol.policy import choose_learning_rate
from worker.device import set_threads

TOKENS = 1_200_000
QUICK_TOKENS = 150_000
WORKERS = (2, 8, 32, 128)
TRIED = ((8, 0.5), (8, 1.0), (8, 2.0), (1, 1.0))  # sequences in an inner step; of the learning rate that `auto` takes
SEQUENCE_TOKENS = 64
TOKENS_PER_S = 512.0  # of each worker, on the virtual clock


def train(num_workers: int, batch: int, factor: float, tokens: int) -> tuple[Outcome, float, float]:
    """The outcome, the learning rate, and how many inner steps each worker has."""
    base = make_base(SIZES["0.1M"], TEXTS["stdlib"], 0)
    base = change(base, train={"batch_sequences": batch, "tokens": tokens, "optimizer": "muon"})
    problem = load_problem(change(base, **(list_arms(0)[f"auto_{MIDDLE_MBPS}"].rounds or {})))
    run_steps = tokens / (num_workers * base.step_tokens)
    rate = factor * choose_learning_rate(
        "muon",
        num_parameters=count_parameters(problem.build_model()),
        run_steps=run_steps,
        workers=num_workers,
    )
    problem = load_problem(change(problem.spec, train={"learning_rate": rate}))
    bps = MIDDLE_MBPS * 1e6 / SCALE
    steps_per_s = (TOKENS_PER_S / base.step_tokens,) * num_workers
    fleet = Fleet(steps_per_s=steps_per_s, upload_bps=bps, download_bps=DOWN_OVER_UP * bps)
    return train_rounds(problem, fleet), rate, run_steps


def main(argv: list[str] | None = None) -> int:
    options = parse_options(__doc__.splitlines()[0], argv)
    console = Console()
    set_threads()
    tokens = QUICK_TOKENS if options.quick else TOKENS
    cases = [(workers, batch, factor) for workers in WORKERS for batch, factor in TRIED]
    table = Table(title=f"{tokens:,} tokens in all")
    for heading in ("workers", "tokens a step", "steps each", "rounds", "learning rate", "held-out loss", "sent, MB"):
        table.add_column(heading)
    figures: dict[str, Figure] = {}
    for workers, batch, factor in track(cases, "training", console=console):
        outcome, rate, steps = train(workers, batch, factor, tokens)
        tokens_a_step = batch * SEQUENCE_TOKENS
        table.add_row(
            str(workers),
            str(tokens_a_step),
            f"{steps:,.0f}",
            str(outcome.rounds),
            f"{rate:.2g}" + (" (auto)" if factor == 1.0 else ""),
            f"{outcome.loss:.4f}",
            f"{outcome.sent_bytes / 1e6:,.3f}",
        )
        figures[f"loss_{workers}_workers_{tokens_a_step}_tokens_x{factor:g}"] = outcome.loss
    console.print(table)
    write_figures(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
