"""What a check found, and how all findings are shown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Level(StrEnum):
    """How a finding is to be taken. Only a problem keeps the machine from computing."""

    OK = "ok"
    ATTENTION = "attention"
    PROBLEM = "problem"
    UNKNOWN = "unknown"  # it could not be found out, and the text says why


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding: what was looked at, what it is, and what to do about it where something should be done."""

    topic: str
    level: Level
    text: str
    advice: str = ""
    figures: dict[str, float | int | str] = field(default_factory=dict)  # the same for programs


def can_compute(findings: Sequence[Finding]) -> bool:
    """Whether no problem is among the findings."""
    return not any(finding.level is Level.PROBLEM for finding in findings)


def render_json(findings: Sequence[Finding]) -> str:
    """One JSON object: whether it can compute, and the findings."""
    rows = [{**asdict(finding), "level": finding.level} for finding in findings]
    return json.dumps({"can_compute": can_compute(findings), "findings": rows})


def show(findings: Sequence[Finding], console: Console) -> None:
    """The findings as a table, and one line of conclusion."""
    styles = {Level.OK: "green", Level.ATTENTION: "yellow", Level.PROBLEM: "bold red", Level.UNKNOWN: "dim"}
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        text = Text(finding.text)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", style="italic")
        table.add_row(Text(finding.level.value, style=styles[finding.level]), finding.topic, text)
    console.print(table)
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    conclusion = "this machine can compute" if not problems else f"{problems} in the way: see `problem` above"
    console.print(f"\n{conclusion}", style="bold")
