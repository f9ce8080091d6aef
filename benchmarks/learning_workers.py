"""2, 8, 32 and 128 workers that train the same tokens together: what batch and learning rate many of them should take.

    python -m benchmarks.learning_workers [--quick] [--json FILE]

The smallest model of benchmarks.learning on its first text, by `auto` over links of 20 Mbit/s, and synchronously with
gradients averaged at every step; Muon in both, 614,400 tokens in all (quick: a quarter). Twice the workers make half as
many steps each, unless a step takes fewer sequences. Every row takes the best of one grid of learning rates; the last
column has what the rule gives, `learning_rate = "auto"`. One seed: differences of 0.01 mean nothing.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.figures import Figure, parse_options, write_figures
from benchmarks.learning_arms import MIDDLE_MBPS, SIZES, TEXTS, Arm, Rate, Trial, list_arms, make_base, run_trial
from benchmarks.learning_runs import Outcome, change
from protocol.run_spec import AUTO
from worker.device import set_threads

CASES = ((2, 8), (8, 8), (32, 8), (32, 2), (128, 8), (128, 2), (128, 1))  # workers, and sequences in a step of each
TOTAL_SEQUENCES = 9600  # of 64 tokens
RATES = (1e-2, 2e-2, 4e-2)
OURS, SYNC = f"auto_{MIDDLE_MBPS}", "sync_muon"
WIDTH = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """So many workers with so many sequences in a step, and the steps that each of them makes."""

    workers: int
    sequences: int
    num_steps: int

    @property
    def name(self) -> str:
        return f"{self.workers}_workers_{self.sequences}_sequences"

    def trials(self) -> list[Trial]:
        """Both arms at every rate, then ours at the rule's."""
        base = change(
            make_base(SIZES["0.1M"], next(iter(TEXTS.values())), 0), train={"batch_sequences": self.sequences}
        )
        arms = list_arms(self.num_steps)
        tried: list[tuple[Arm, Rate]] = [(arms[name], rate) for name in (SYNC, OURS) for rate in RATES]
        return [
            Trial(arm=replace(arm, num_workers=self.workers), base=base, rate=rate, num_steps=self.num_steps)
            for arm, rate in [*tried, (arms[OURS], AUTO)]
        ]


def describe(case: Case, outcomes: Sequence[Outcome]) -> tuple[dict[str, Figure], tuple[str, ...]]:
    """The figures and the table's row of a case, from the outcomes of its trials."""
    count = len(RATES)
    sync, sync_rate = min(zip(outcomes[:count], RATES, strict=True), key=lambda pair: pair[0].loss)
    ours, our_rate = min(zip(outcomes[count : 2 * count], RATES, strict=True), key=lambda pair: pair[0].loss)
    by_rule = outcomes[-1]
    figures: dict[str, Figure] = {
        "loss_sync": sync.loss,
        "loss_ours": ours.loss,
        "loss_ours_by_rule": by_rule.loss,
        "rate_sync": sync_rate,
        "rate_ours": our_rate,
        "bytes_vs_sync": ours.sent_bytes / sync.sent_bytes,
        "virtual_s": ours.seconds,
        "virtual_s_sync": sync.seconds,
    }
    row = (
        str(case.workers),
        str(case.sequences),
        str(case.num_steps),
        f"{sync.loss:.3f} ({sync_rate:g})",
        f"{ours.loss:.3f} ({our_rate:g})",
        str(ours.rounds),
        f"1/{sync.sent_bytes / ours.sent_bytes:.0f}",
        f"{ours.seconds:,.0f}",
        f"{by_rule.loss:.3f}",
    )
    return {f"{name}_{case.name}": value for name, value in figures.items()}, row


def main() -> None:
    options = parse_options((__doc__ or "").splitlines()[0])
    total = TOTAL_SEQUENCES // 4 if options.quick else TOTAL_SEQUENCES
    cases = [
        Case(workers=workers, sequences=sequences, num_steps=total // (workers * sequences))
        for workers, sequences in CASES
    ]
    trials = [case.trials() for case in cases]
    console = Console()
    console.width = max(console.width, WIDTH)
    table = Table(title=f"{total * 64:,} tokens in all; held-out loss (best rate of {', '.join(map(str, RATES))})")
    for heading in (
        "workers",
        "sequences",
        "steps each",
        "synchronous",
        "ours",
        "rounds",
        "bytes",
        "virtual s",
        "by rule",
    ):
        table.add_column(heading)
    flat = [trial for each in trials for trial in each]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=set_threads, initargs=(1,)) as pool:
        outcomes = iter(list(track(pool.map(run_trial, flat), f"{len(flat)} runs", len(flat), console=console)))
    figures: dict[str, Figure] = {}
    for case, own in zip(cases, trials, strict=True):
        made, row = describe(case, [next(outcomes) for _ in own])
        figures |= made
        table.add_row(*row)
    console.print(table)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
