"""How a worker looks in a terminal, and status.json beside it."""

import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from worker.governor.reasons import PauseReason
from worker.home import RunHome
from worker.status import WorkerStatus

WRITE_EVERY_S = 0.5
_SENTENCES = {reason.value: reason.sentence for reason in PauseReason}


class LiveView:
    """Shows a worker's status while it runs: on a terminal redrawn in place, and in status.json always."""

    def __init__(self, home: RunHome, *, as_json: bool) -> None:
        self._home = home
        self._console = Console()
        self._as_json = as_json
        self._live = (
            Live(console=self._console, refresh_per_second=4) if self._console.is_terminal and not as_json else None
        )
        self._last_write_s = 0.0
        self._last_activity = ""
        self._status: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self._home.write_status({**self._status, "activity": "stopped"})

    def update(self, status: WorkerStatus) -> None:
        """Called by the worker whenever something changed."""
        was_paused_for = self._status.get("pause_reason")
        self._status = status.to_json()
        now = time.monotonic()
        if now - self._last_write_s > WRITE_EVERY_S or was_paused_for != status.pause_reason:
            self._last_write_s = now
            self._home.write_status(self._status)
        if self._live is not None:
            self._live.update(_render(self._status))

    def summarize(self) -> None:
        """The last line: what this session gave."""
        if self._as_json:
            print(json.dumps(self._status))  # noqa: T201 - it is what --json is for
            return
        self._console.print(
            f"{self._status.get('steps_trained', 0)} inner steps, {self._status.get('credited_tokens', 0):,} tokens "
            f"credited in {self._status.get('accepted', 0)} rounds. Thank you."
        )


def render_statuses(statuses: list[dict[str, Any]]) -> None:
    """`worker status` as a table."""
    console = Console()
    if not statuses:
        console.print("no worker has run here yet; `manyhands worker start INVITE` joins a run")
        return
    table = Table("run", "state", "round", "loss", "steps/s", "tokens credited", box=None)
    for status in statuses:
        table.add_row(
            f"{status.get('run', '')} ({status['run_id'][:8]})",
            describe_state(status) if status["running"] else "not running",
            str(status.get("round", "")),
            f"{status.get('loss', 0.0):.4f}",
            f"{status.get('steps_per_s', 0.0):.2f}",
            f"{status.get('credited_tokens', 0):,}",
        )
    console.print(table)


def describe_state(status: Mapping[str, Any]) -> str:
    """What it does, or why it does nothing."""
    reason = status.get("pause_reason")
    if not reason:
        return str(status.get("activity", ""))
    detail = status.get("pause_detail")
    return f"paused: {_SENTENCES[reason]}" + (f" ({detail})" if detail else "")


def _render(status: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = {
        "run": status["run"],
        "doing": describe_state(status),
        "round": f"{status['round']}, inner step {status['inner_step']}",
        "loss": f"{status['loss']:.4f}",
        "speed": f"{status['steps_per_s']:.2f} steps/s, {status['tokens_per_s']:,.0f} tokens/s",
        "credit": f"{status['credited_tokens']:,} tokens in {status['accepted']} rounds",
        "sent": f"{status['bytes_sent'] / 1e6:.2f} MB",
    }
    for label, value in rows.items():
        table.add_row(f"[dim]{label}[/dim]", str(value))
    return table
