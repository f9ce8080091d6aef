"""What the demo found, as a table and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShare:
    """One worker's part in the run."""

    name: str
    tokens: int
    rounds: int
    bytes_sent: int
    digest: str  # of its replica at the end; empty for the one that was killed
    killed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The demo's figures. Losses are held-out, in nats a token."""

    loss_start: float
    loss_end: float
    loss_alone: float
    alone_steps: int
    alone_s: float
    trained_s: float
    num_parameters: int
    step_tokens: int
    rounds: int
    tokens: int
    workers: list[WorkerShare]
    verified_digest: str
    ledger_entries: int
    sample: str
    checkpoint: str
    folder: str
    page: str

    @property
    def digests_equal(self) -> bool:
        """Every live replica, and the replay from the payloads, hold the same parameters."""
        return {worker.digest for worker in self.workers if not worker.killed} == {self.verified_digest}

    def synchronous_bytes(self, worker: WorkerShare) -> float:
        """What the worker would have sent for its tokens with float32 gradients and a ring all-reduce every step."""
        peers = sum(not w.killed for w in self.workers)
        return 2 * (peers - 1) / peers * 4 * self.num_parameters * worker.tokens / self.step_tokens

    def to_json(self) -> dict[str, Any]:
        figures = asdict(self)
        for row, worker in zip(figures["workers"], self.workers, strict=True):
            row["bytes_synchronous"] = round(self.synchronous_bytes(worker))
        return {**figures, "digests_equal": self.digests_equal}


def print_report(report: DemoReport, console: Console) -> None:
    """The summary for people."""
    table = Table("worker", "tokens", "rounds", "sent", "synchronous*", "replica")
    for worker in report.workers:
        synchronous = report.synchronous_bytes(worker)
        ratio = f" ({synchronous / worker.bytes_sent:,.0f}x)" if worker.bytes_sent else ""
        table.add_row(
            worker.name,
            f"{worker.tokens:,}",
            str(worker.rounds),
            f"{worker.bytes_sent / 1e6:.2f} MB",
            f"{synchronous / 1e6:,.0f} MB{ratio}",
            "(killed)" if worker.killed else worker.digest[:12],
        )
    console.print(table)
    console.print("* float32 gradients, ring all-reduce at every step, for the same tokens\n", style="dim")
    console.print(
        f"held-out loss  {report.loss_start:.3f} at the start, [bold]{report.loss_end:.3f}[/bold] together after "
        f"{report.tokens:,} tokens in {report.rounds} rounds ({report.trained_s:.0f} s, all workers on this machine)"
    )
    console.print(
        f"               [bold]{report.loss_alone:.3f}[/bold] the fastest worker alone in its own "
        f"{report.alone_steps:,} inner steps (measured, {report.alone_s:.0f} s)"
    )
    same = "the same parameters, bit for bit" if report.digests_equal else "[red]DIFFERENT PARAMETERS[/red]"
    console.print(f"replicas       {same}; the ledger's {report.ledger_entries} entries verify")
    console.print(f"it writes      {report.sample!r}")
    console.print(f"checkpoint     {report.checkpoint}")
    console.print(f"page           {report.page} (while the coordinator runs: --keep)")
    console.print(f"look closer    manyhands verify {report.folder}", soft_wrap=True)
