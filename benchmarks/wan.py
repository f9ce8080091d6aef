"""How much of the time workers on home links compute, with and without overlap of exchange and inner steps.

    sudo python -m benchmarks.wan [--quick] [--json FILE]

A coordinator and five workers, real processes, each in a network namespace (benchmarks.wan_network): 20 Mbit/s up and
100 Mbit/s down for every worker, two of them behind NAT. There is no delay in these links but that of their queues.

Utilisation of a worker: the seconds spent in inner steps over the wall seconds from its first inner step to its last,
both after the first round. All workers share this machine's cores, so a step takes longer than it would alone; what
counts is whether one is being made. Round and exchange are sized so that float16 would take longer to exchange than
the round's inner steps take.
"""

import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.figures import Figure, parse_options, write_figures
from benchmarks.wan_network import find_obstacle, open_network
from benchmarks.wan_run import Run, Worker
from protocol.run_spec import RunSpec

UP_MBPS, DOWN_MBPS = 20, 100
WORKERS = {"ada": False, "ben": False, "cleo": False, "dora": True, "emil": True}  # whether it is behind NAT
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
INNER_STEPS = 32
ROUNDS, QUICK_ROUNDS = 16, 4  # that count; the first does not
ROUND_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one worker did after the first round. Bytes are those on its link, with all headers."""

    name: str
    behind_nat: bool
    utilisation: float
    round_s: float
    compute_s: float  # a round
    up_bytes: float  # a round
    down_bytes: float  # a round


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run."""

    overlap: bool
    shares: list[Share]
    num_parameters: int
    plan: str  # what was exchanged in the last round, and why
    digests_equal: bool  # of all workers, after every round in which two of them were seen

    def mean(self, name: str) -> float:
        return statistics.fmean(getattr(share, name) for share in self.shares)

    @property
    def float16_s(self) -> float:
        """Seconds in which a worker's link carries one float16 payload up and all others' down, both at once."""
        payload_bits = 16.0 * self.num_parameters
        return max(payload_bits / UP_MBPS, (len(self.shares) - 1) * payload_bits / DOWN_MBPS) / 1e6


def make_spec(overlap: bool, address: str) -> RunSpec:
    """A run that goes on for longer than it is watched, on a coordinator at this address."""
    return RunSpec.model_validate(
        {
            "name": "wan",
            "model": {"config": MODEL},
            "data": {"sequence_length": 64, "max_tokens": 200_000},
            "train": {"batch_sequences": 1, "optimizer": "adamw", "learning_rate": 1e-3, "tokens": 100_000_000},
            "round": {"inner_steps": INNER_STEPS, "min_peers": len(WORKERS), "heartbeat_timeout_s": 5.0},
            "exchange": {"overlap": overlap, "codec": "auto"},
            "coordinator": {"listen": f"{address}:7640"},
        }
    )


def measure(overlap: bool, num_rounds: int, console: Console) -> Outcome:
    """Play one run until every worker has computed again after the first round and `num_rounds` more."""
    with (
        tempfile.TemporaryDirectory(prefix="mhwan-", dir="/tmp") as folder,
        open_network(up_mbps=UP_MBPS, down_mbps=DOWN_MBPS) as network,
        show_progress(console, f"overlap = {str(overlap).lower()}", num_rounds + 1) as show_round,
    ):
        run = Run(network, Path(folder))
        run.start(partial(make_spec, overlap), WORKERS)
        for round_ in range(num_rounds + 2):
            run.wait_for(partial(run.have_computed_after, round_), ROUND_TIMEOUT_S)
            show_round(round_)
        equal = all(len(digests) == 1 for digests in run.digests.values())
        shares = [conclude(worker, num_rounds) for worker in run.workers]
        num_parameters, plan = run.read_facts()
        return Outcome(overlap=overlap, shares=shares, num_parameters=num_parameters, plan=plan, digests_equal=equal)


def conclude(worker: Worker, num_rounds: int) -> Share:
    """From the first step that it had made after one round to the first after `num_rounds` more."""
    first, last = (worker.first_after(merged) for merged in (1, num_rounds + 1))
    rounds = last.round - first.round
    wall_s = last.unix_s - first.unix_s
    compute_s = last.compute_s - first.compute_s
    return Share(
        name=worker.name,
        behind_nat=worker.host.behind_nat,
        utilisation=compute_s / wall_s,
        compute_s=compute_s / rounds,
        round_s=wall_s / rounds,
        up_bytes=(last.traffic.up_bytes - first.traffic.up_bytes) / rounds,
        down_bytes=(last.traffic.down_bytes - first.traffic.down_bytes) / rounds,
    )


def show(console: Console, outcome: Outcome) -> None:
    table = Table(title=f"overlap = {str(outcome.overlap).lower()}")
    table.add_column("worker", no_wrap=True)
    for column in ("utilisation", "round, s", "in steps, s", "up, MB", "down, MB"):
        table.add_column(column, justify="right")
    for share in outcome.shares:
        table.add_row(
            f"{share.name}, NAT" if share.behind_nat else share.name,
            f"{share.utilisation:.1%}",
            f"{share.round_s:.2f}",
            f"{share.compute_s:.2f}",
            f"{share.up_bytes / 1e6:.2f}",
            f"{share.down_bytes / 1e6:.2f}",
        )
    console.print(table)
    console.print(
        f"mean {outcome.mean('utilisation'):.1%}; digests {'equal' if outcome.digests_equal else 'NOT EQUAL'}; "
        f"float16 would exchange {outcome.num_parameters:,} parameters in {outcome.float16_s:.1f} s, "
        f"the inner steps of a round took {outcome.mean('compute_s'):.1f} s\n{outcome.plan}",
        highlight=False,
    )


def figures_of(outcome: Outcome, num_rounds: int) -> dict[str, Figure]:
    """Utilisation as a share, 0 to 1; seconds and bytes a round, mean over the workers."""
    suffix = "" if outcome.overlap else "_no_overlap"
    figures: dict[str, Figure] = {
        "utilisation": outcome.mean("utilisation"),
        "utilisation_least": min(share.utilisation for share in outcome.shares),
        **{f"utilisation_{share.name}": share.utilisation for share in outcome.shares},
        "round_s": outcome.mean("round_s"),
        "compute_s": outcome.mean("compute_s"),
        "up_bytes": outcome.mean("up_bytes"),
        "down_bytes": outcome.mean("down_bytes"),
        "digests_equal": float(outcome.digests_equal),
    }
    return {
        "num_parameters": outcome.num_parameters,
        "rounds": num_rounds,
        "float16_exchange_s": outcome.float16_s,
        **{name + suffix: value for name, value in figures.items()},
    }


@contextmanager
def show_progress(console: Console, title: str, num_rounds: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=num_rounds)
        yield lambda round_: progress.update(task, completed=round_)


def main() -> None:
    options = parse_options("Compute utilisation of workers on home links, with and without overlap. Needs root.")
    obstacle = find_obstacle()
    if obstacle is not None:
        sys.exit(f"benchmarks.wan: {obstacle}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: what was set up is taken down
    console = Console()
    num_rounds = QUICK_ROUNDS if options.quick else ROUNDS
    figures: dict[str, Figure] = {}
    for overlap in (False, True):
        outcome = measure(overlap, num_rounds, console)
        show(console, outcome)
        figures |= figures_of(outcome, num_rounds)
        write_figures(options.json, figures)


if __name__ == "__main__":
    main()
