"""How the coordinator looks in a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from coordinator.operations import ID_PREFIX
from coordinator.verdict import describe_span

WATCH_EVERY_S = 2.0
ID_CHARS = 8  # of a peer id, after what all of them begin with
_STYLES = {"healthy": "bold green", "degraded": "bold yellow", "stalled": "bold red"}


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
    lines.append(f"        {facts['page']}/sign-in with {facts['operator_token']} to operate it")
    lines.append(f"Folder  {facts['folder']}")
    lines.append("")
    lines.append("Volunteers type:")
    console.print(Panel("\n".join(lines), expand=False))
    console.print(f"manyhands worker start {facts['invite']}", soft_wrap=True, highlight=False)


def render_status(status: dict[str, Any]) -> None:
    """Verdict, phase, loss and peers."""
    Console().print(_lay_out(status, time.time()))


def watch_status(read_status: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None] | None) -> None:
    """Read the status every WATCH_EVERY_S until Ctrl-C; `show` it, or without one redraw it in place."""
    with suppress(KeyboardInterrupt):
        if show is not None:
            while True:
                show(read_status())
                time.sleep(WATCH_EVERY_S)
        with Live(_lay_out(read_status(), time.time()), auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                time.sleep(WATCH_EVERY_S)
                live.update(_lay_out(read_status(), time.time()), refresh=True)


def _lay_out(status: dict[str, Any], now_unix_s: float) -> RenderableType:
    """Peers' own words go in as Text, never as markup."""
    percent = 100 * status["tokens"] / max(1, status["tokens_target"])
    eta = f"   {describe_span(status['eta_s'])} to go" if status["eta_s"] and status["phase"] != "finished" else ""
    table = Table("peer", "id", "role", "status", "steps/s", "tokens", "accepted", "refused", "doing", box=None)
    for peer in status["peers"]:
        cells = (
            peer["name"],
            peer["peer"].removeprefix(ID_PREFIX)[:ID_CHARS],
            peer["role"],
            _describe_standing(peer),
            f"{peer['steps_per_s']:.2f}",
            f"{peer['credited_tokens']:,}",
            str(peer["accepted"]),
            str(peer["refused"]),
            peer["activity"],
        )
        table.add_row(*(_plain(cell) for cell in cells))
    return Group(
        _lay_out_verdict(status["verdict"], now_unix_s),
        _plain(f"{status['name']}  {status['phase']}: {status['reason']}"),
        f"round {status['round']}   {status['tokens']:,} of {status['tokens_target']:,} tokens ({percent:.1f} %){eta}",
        f"loss {_number(status['train_loss'])}   held-out {_number(status['held_out_loss'])}   "
        f"tokens/s {_whole(status['tokens_per_s'])}   last merge {_age(status['last_merge_unix_s'], now_unix_s)}",
        _plain(f"exchange: {status['plan']}" if status["plan"] else "no round was opened yet"),
        table,
        _plain(f"page {status['page']}   ledger head {status['ledger_head'][:16]}"),
    )


def _describe_standing(peer: dict[str, Any]) -> str:
    if peer["banned"]:
        return "banned"
    if peer["waiting_for_approval"]:
        return "waits for approval"
    return f"paused: {peer['pause_reason']}" if peer["pause_reason"] else str(peer["status"])


def render_invites(invites: list[dict[str, Any]]) -> None:
    """One line an invite, newest first."""
    now_unix_s = time.time()
    table = Table("id", "for", "issued", "joined", "uses left", "state", box=None)
    for invite in invites:
        state = "revoked" if invite["revoked"] else "expired" if invite["expired"] else "valid"
        if state == "valid" and invite["expires_unix_s"]:
            state = f"valid for {describe_span(invite['expires_unix_s'] - now_unix_s)}"
        issued = _age(invite["issued_unix_s"] or None, now_unix_s)
        left = f"{invite['uses_left']:,} of {invite['uses']:,}" if invite["uses"] else f"{invite['uses_left']:,}"
        cells = (invite["id"], invite["role"], issued, str(invite["joined"]), left, state)
        table.add_row(*(_plain(cell) for cell in cells))
    Console().print(table)


def _lay_out_verdict(verdict: dict[str, Any], now_unix_s: float) -> Text:
    line = Text.assemble((verdict["level"].upper(), _STYLES[verdict["level"]]), "  ", _plain(verdict["cause"]))
    if verdict["since_unix_s"] is not None:
        line.append(f"  ({_age(verdict['since_unix_s'], now_unix_s)})", "dim")
    for other in verdict["also"]:
        line.append_text(_plain(f"\n  also: {other}"))
    return line


def _plain(words: str) -> Text:
    """Text that cannot steer the terminal, whoever wrote it."""
    return Text("".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in words))


def _age(unix_s: float | None, now_unix_s: float) -> str:
    return "-" if unix_s is None else f"{describe_span(now_unix_s - unix_s)} ago"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
