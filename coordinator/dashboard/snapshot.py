"""What the page says at one moment, worded once for all who look at it. Pure: status and history in, text out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.dashboard.history import RoundHistory
from coordinator.verdict import describe_span

MAX_PEERS = 100
MAX_ACTIVITY_CHARS = 60
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

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """One line of the peers table."""

    name: str
    role: str
    status: str
    activity: str
    device: str
    steps_per_s: str
    tokens: str
    accepted: str
    refused: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything on the page that changes."""

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
    train: Points  # (tokens, loss)
    held_out: Points
    peers_heading: str
    peers_note: str
    peers: tuple[PeerRow, ...]
    ledger_head: str


def describe(status: Mapping[str, Any], history: RoundHistory, now_unix_s: float) -> Snapshot:
    """The page's words for Server.status() and the rounds so far."""
    percent = min(100.0, 100.0 * status["tokens"] / status["tokens_target"])
    tokens_per_s = history.tokens_per_s() if status["phase"] in _WORKING else None
    verdict = status["verdict"]
    merged_s = history.last_merge_unix_s
    peers = status["peers"]
    gone = sum(peer["status"] == "gone" for peer in peers)
    hidden = max(0, len(peers) - MAX_PEERS)
    return Snapshot(
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
        train=_rounded(history.train.points),
        held_out=_rounded(history.held_out.points),
        peers_heading=f"Peers ({len(peers) - gone})",
        peers_note=f"and {hidden:,} more; /api/status lists all" if hidden else "",
        peers=tuple(_describe_peer(peer) for peer in sorted(peers, key=_is_gone)[:MAX_PEERS]),
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


def _describe_peer(peer: Mapping[str, Any]) -> PeerRow:
    return PeerRow(
        name=peer["name"] or peer["peer"][-8:],
        role=peer["role"],
        status=f"paused: {peer['pause_reason'].replace('_', ' ')}" if peer["pause_reason"] else peer["status"],
        activity=peer["activity"][:MAX_ACTIVITY_CHARS] or UNKNOWN,
        device=peer["device"] or UNKNOWN,
        steps_per_s=f"{peer['steps_per_s']:.1f}" if peer["steps_per_s"] else UNKNOWN,
        tokens=f"{peer['credited_tokens']:,}",
        accepted=f"{peer['accepted']:,}",
        refused=f"{peer['refused']:,}",
    )


def _is_gone(peer: Mapping[str, Any]) -> bool:
    return bool(peer["status"] == "gone")


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _rounded(points: Sequence[tuple[float, float]]) -> Points:
    return tuple((x, round(y, 4)) for x, y in points)
