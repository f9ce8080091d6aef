"""How the coordinator looks in a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


@contextmanager
def shard_progress(quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress line while text is cut into shards; yields what takes the number of tokens so far."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("reading the text and making the model", total=None)
        yield lambda tokens: progress.update(task, description=f"cutting shards: {tokens:,} tokens")


def render_announcement(facts: dict[str, Any], name: str) -> None:
    """What the operator needs once peers can join. The invite stands on a line of its own, to be copied whole."""
    console = Console()
    begun = f"goes on after round {facts['round']}" if facts["round"] else "is ready"
    lines = [f"[bold]{name}[/bold] (run {facts['run_id']}) {begun}."]
    lines.append(f"Page    {facts['page']}")
    lines.append(f"Folder  {facts['folder']}")
    lines.append("")
    lines.append("Volunteers type:")
    console.print(Panel("\n".join(lines), expand=False))
    console.print(f"manyhands worker start {facts['invite']}", soft_wrap=True, highlight=False)


def render_status(status: dict[str, Any]) -> None:
    """Phase, loss and peers as a table."""
    console = Console()
    percent = 100 * status["tokens"] / max(1, status["tokens_target"])
    console.print(f"[bold]{status['name']}[/bold]  {status['phase']}: {status['reason']}")
    console.print(
        f"round {status['round']}   {status['tokens']:,} of {status['tokens_target']:,} tokens ({percent:.1f} %)   "
        f"loss {_number(status['train_loss'])}   held-out {_number(status['held_out_loss'])}"
    )
    console.print(f"exchange: {status['plan']}" if status["plan"] else "no round was opened yet")
    table = Table("peer", "role", "status", "steps/s", "tokens", "accepted", "refused", "doing", box=None)
    for peer in status["peers"]:
        table.add_row(
            peer["name"],
            peer["role"],
            f"paused: {peer['pause_reason']}" if peer["pause_reason"] else peer["status"],
            f"{peer['steps_per_s']:.2f}",
            f"{peer['credited_tokens']:,}",
            str(peer["accepted"]),
            str(peer["refused"]),
            peer["activity"],
        )
    console.print(table)
    console.print(f"page {status['page']}   ledger head {status['ledger_head'][:16]}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
