"""What the page says at one moment, worded once for all who look at it. Pure: status and history in, text out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.dashboard.history import RoundHistory
from coordinator.verdict import describe_span

UNKNOWN = "\N{EN DASH}"
PHASES = {
    "waiting_for_peers": "Waiting for peers",
    "warmup": "Warming up",
    "train": "Training",
    "merge": "Merging",
    "paused": "Paused",
    "finished": "Finished",
}
_WORKING = ("train", "merge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state at one moment, and what every page says of it."""

    status: Mapping[str, Any]  # what Server.status() gave
    now_unix_s: float
    name: str
    run_id: str
    level: str
    level_words: str
    cause: str
    since: str
    also: str
    announcement: str  # for screen readers: says nothing new while the level and what is wrong stay the same
    phase_words: str
    round: str
    clock: str
    eta: str
    tokens: str
    percent: float
    percent_words: str
    speed: str
    last_merge: str
    train_loss: str
    held_out_loss: str
    ledger_head: str


def describe(status: Mapping[str, Any], history: RoundHistory, now_unix_s: float) -> Snapshot:
    """The words for Server.status() and the rounds so far."""
    percent = min(100.0, 100.0 * status["tokens"] / status["tokens_target"])
    tokens_per_s = history.tokens_per_s() if status["phase"] in _WORKING else None
    verdict = status["verdict"]
    merged_s = history.last_merge_unix_s
    return Snapshot(
        status=status,
        now_unix_s=now_unix_s,
        name=status["name"],
        run_id=status["run_id"],
        level=verdict["level"],
        level_words=verdict["level"].capitalize(),
        cause=verdict["cause"],
        since="" if verdict["since_unix_s"] is None else describe_age(now_unix_s - verdict["since_unix_s"]),
        also=f"Also: {'; '.join(verdict['also'])}" if verdict["also"] else "",
        announcement=verdict["level"] + ("" if verdict["level"] == "healthy" else f": {verdict['cause']}"),
        phase_words=PHASES.get(status["phase"], status["phase"]),
        round=f"{status['round']:,}",
        clock=_describe_clock(status, now_unix_s),
        eta=UNKNOWN if tokens_per_s is None or status["eta_s"] is None else describe_span(status["eta_s"]),
        tokens=f"{status['tokens']:,} of {status['tokens_target']:,}",
        percent=round(percent, 1),
        percent_words=f"{percent:.1f} %",
        speed=UNKNOWN if tokens_per_s is None else f"{tokens_per_s:,.0f}",
        last_merge=UNKNOWN if merged_s is None else describe_age(now_unix_s - merged_s),
        train_loss=_loss(status["train_loss"]),
        held_out_loss=_loss(history.last_held_out_loss),
        ledger_head=status["ledger_head"],
    )


def describe_age(seconds: float) -> str:
    """How long ago, in the two largest units that matter."""
    return f"{describe_span(seconds)} ago"


def _describe_clock(status: Mapping[str, Any], now_unix_s: float) -> str:
    """How far the open round is."""
    if status["round_opened_unix_s"] is None:
        return ""
    gone_s = now_unix_s - status["round_opened_unix_s"]
    expected_s = status["round_expected_unix_s"] - status["round_opened_unix_s"]
    return f"{describe_span(gone_s)} of about {describe_span(max(1.0, expected_s))}"


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"
