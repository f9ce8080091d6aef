"""Whether a run is healthy, and if not, why: one verdict made of the facts that Server.status() tells.

Pure. A cause is a sentence without its age, so that it stays the same while it holds: `since_unix_s` tells the age. The
causes' order is that of their rank, then the newest first; the level is the worst of all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

LOST_FOR_S = 60.0  # so long a lost worker is named
TROUBLE_FOR_S = 60.0
RESTART_FOR_S = (15.0, 120.0)  # a restart is named at least, and, while workers are missing, at most so long
HEARTBEATS_A_TIMEOUT = 5
MISSED_HEARTBEATS = 2.5
TRAINING_STALLS_AFTER_S, TRAINING_STALLS_AFTER_STEPS = 8.0, 5
OTHER_STALLS_AFTER_S = 30.0
VALIDATOR_STARTS_WITHIN_S = 60.0
DISK_FULL_BYTES, DISK_LOW_BYTES = 50 << 20, 1 << 30
MAX_NAMES = 3
MAX_NAME_CHARS = 40

Facts = Mapping[str, Any]


class Level(StrEnum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"  # it goes on, with less than it could have
    STALLED = "stalled"  # nothing is trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The level, its most important cause in one sentence, and the other causes."""

    level: Level
    cause: str
    since_unix_s: float | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Finding:
    level: Level
    cause: str
    since_unix_s: float | None = None


def judge(facts: Facts, now_unix_s: float) -> Verdict:
    """The verdict on `facts`: what Server.status() gives, less the verdict itself."""
    if facts["phase"] == "finished":
        return Verdict(level=Level.HEALTHY, cause=f"finished: {facts['reason']}")
    findings: list[_Finding] = []
    for rank in _RANKS:
        found = [finding for check in rank for finding in check(facts, now_unix_s)]
        findings += sorted(found, key=lambda finding: -(finding.since_unix_s or 0.0))
    if not findings:
        return Verdict(level=Level.HEALTHY, cause=_describe_work(facts, now_unix_s))
    is_stalled = any(finding.level is Level.STALLED for finding in findings)
    return Verdict(
        level=Level.STALLED if is_stalled else Level.DEGRADED,
        cause=findings[0].cause,
        since_unix_s=findings[0].since_unix_s,
        also=tuple(finding.cause for finding in findings[1:]),
    )


def describe_span(seconds: float) -> str:
    """A span of time in the two largest units that matter."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def _describe_work(facts: Facts, now_unix_s: float) -> str:
    if facts["phase"] != "train" or facts["round_expected_unix_s"] is None:
        return str(facts["reason"])
    workers = _connected_workers(facts)
    training = sum(peer["lease"] in ("open", "aside") for peer in workers)
    left_s = facts["round_expected_unix_s"] - now_unix_s
    merge = f"merge expected in {describe_span(left_s)}" if left_s >= 1.0 else "merge due"
    return f"round {facts['round']}: {training} of {len(workers)} workers train, {merge}"


# ---- one function a cause


def _find_full_disk(facts: Facts, _: float) -> Iterator[_Finding]:
    if facts["disk_free_bytes"] < DISK_FULL_BYTES:
        free = facts["disk_free_bytes"] >> 20
        yield _Finding(Level.STALLED, f"the disk of the run folder is full: {free} MB free; free some space")


def _find_operator_pause(facts: Facts, _: float) -> Iterator[_Finding]:
    if facts["phase"] == "paused":
        yield _Finding(Level.STALLED, "paused by the operator; `manyhands coordinator resume` goes on")


def _find_restart(facts: Facts, now_unix_s: float) -> Iterator[_Finding]:
    if not facts["restarted"]:
        return
    age_s = now_unix_s - facts["started_unix_s"]
    back, before = len(_connected_workers(facts)), facts["workers_before_restart"]
    named_s, missing_s = RESTART_FOR_S
    if age_s < named_s or (age_s < missing_s and back < before):
        came = f"; {min(back, before)} of {before} workers are back" if before else ""
        yield _Finding(Level.DEGRADED, f"the coordinator was restarted{came}", facts["started_unix_s"])


def _find_lost_workers(facts: Facts, now_unix_s: float) -> Iterator[_Finding]:
    lost = [
        peer
        for peer in facts["peers"]
        if peer["role"] == "worker" and peer["lost"] and now_unix_s - peer["lost"]["unix_s"] < LOST_FOR_S
    ]
    if not lost:
        return
    since = max(peer["lost"]["unix_s"] for peer in lost)
    if len(lost) > 1:
        yield _Finding(Level.DEGRADED, f"{len(lost)} workers were lost: {_join_names(lost)}", since)
        return
    loss = lost[0]["lost"]
    if loss["silent_s"] > 0.8 * facts["heartbeat_timeout_s"]:
        why = f"nothing was heard from it for {describe_span(loss['silent_s'])}"
    elif loss["held_lease"]:
        why = "its connection ended without goodbye while it held a lease"
    else:
        why = "its connection ended between two leases"
    yield _Finding(Level.DEGRADED, f"worker {_name(lost[0])} was lost: {why}", since)


def _find_silent_peers(facts: Facts, now_unix_s: float) -> Iterator[_Finding]:
    timeout_s = facts["heartbeat_timeout_s"]
    for role in ("worker", "validator"):
        silent = [peer for peer in facts["peers"] if peer["role"] == role and is_silent(peer, timeout_s)]
        if silent:
            since = now_unix_s - max(peer["heartbeat_age_s"] for peer in silent)
            words = f"{_who(role, silent)}: connected, but no heartbeats come"
            yield _Finding(Level.DEGRADED, words, since)


def _find_stuck_workers(facts: Facts, now_unix_s: float) -> Iterator[_Finding]:
    stuck = [peer for peer in _connected_workers(facts) if is_stuck(peer, facts["heartbeat_timeout_s"])]
    if stuck:
        since = now_unix_s - max(peer["unmoved_s"] for peer in stuck)
        yield _Finding(Level.DEGRADED, f"{_who('worker', stuck)}: connected and with work, but nothing moves", since)


def is_silent(peer: Facts, heartbeat_timeout_s: float) -> bool:
    """Whether the peer's session is there, and its heartbeats are not."""
    after_s = MISSED_HEARTBEATS * heartbeat_timeout_s / HEARTBEATS_A_TIMEOUT
    return bool(peer["connected"] and (peer["heartbeat_age_s"] or 0.0) > after_s)


def is_stuck(peer: Facts, heartbeat_timeout_s: float) -> bool:
    """Whether nothing moves at a peer that has work and says nothing of a pause."""
    if peer["lease"] != "open" or peer["pause_reason"] or peer["unmoved_s"] is None:
        return False
    if not peer["activity"].startswith("training"):
        return bool(peer["unmoved_s"] > OTHER_STALLS_AFTER_S)
    steps_s = TRAINING_STALLS_AFTER_STEPS / peer["steps_per_s"] if peer["steps_per_s"] else OTHER_STALLS_AFTER_S
    heartbeats_s = MISSED_HEARTBEATS * heartbeat_timeout_s / HEARTBEATS_A_TIMEOUT
    return bool(peer["unmoved_s"] > max(TRAINING_STALLS_AFTER_S, steps_s, heartbeats_s))


def _find_lost_validator(facts: Facts, now_unix_s: float) -> Iterator[_Finding]:
    validators = [peer for peer in facts["peers"] if peer["role"] == "validator"]
    if not facts["validator_expected"] or any(peer["connected"] for peer in validators):
        return
    losses = [peer["lost"]["unix_s"] for peer in validators if peer["lost"]]
    if losses:
        words = "the validator is gone: its process ended and is started again; nothing is evaluated meanwhile"
        yield _Finding(Level.DEGRADED, words, max(losses))
    elif now_unix_s - facts["started_unix_s"] > VALIDATOR_STARTS_WITHIN_S:
        yield _Finding(Level.DEGRADED, "the validator has not joined; nothing is evaluated", facts["started_unix_s"])


def _find_missing_workers(facts: Facts, _: float) -> Iterator[_Finding]:
    workers = _connected_workers(facts)
    paused = [peer for peer in workers if peer["pause_reason"]]
    if facts["phase"] == "warmup":
        yield _Finding(Level.DEGRADED, f"warming up: {facts['reason']}")
    elif paused and len(paused) == len(workers):
        reasons = ", ".join(sorted({peer["pause_reason"].replace("_", " ") for peer in paused})[:MAX_NAMES])
        who = "the only worker is" if len(paused) == 1 else f"all {len(paused)} workers are"
        yield _Finding(Level.STALLED, f"{who} paused ({reasons})")
    elif facts["phase"] == "waiting_for_peers" and len(workers) - len(paused) < facts["min_peers"]:
        yield _Finding(Level.STALLED, f"too few workers: {facts['reason']}")


def _find_troubles(facts: Facts, now_unix_s: float) -> Iterator[_Finding]:
    for trouble in facts["troubles"]:
        since, reason, who = trouble["unix_s"], trouble["reason"], _name(trouble)
        if trouble["kind"] == "void":  # until a round is merged
            times = f" {trouble['count']} times" if trouble["count"] > 1 else ""
            level = Level.STALLED if trouble["count"] >= 3 else Level.DEGRADED
            yield _Finding(level, f"round {trouble['round']} was void{times}: {reason}", since)
        elif now_unix_s - since < TROUBLE_FOR_S:
            what = "a contribution was refused" if trouble["kind"] == "refused" else "fetches the state again"
            yield _Finding(Level.DEGRADED, f"worker {who}, round {trouble['round']}: {what}: {reason}", since)


def _find_low_disk(facts: Facts, _: float) -> Iterator[_Finding]:
    if DISK_FULL_BYTES <= facts["disk_free_bytes"] < DISK_LOW_BYTES:
        free = facts["disk_free_bytes"] >> 20
        yield _Finding(Level.DEGRADED, f"little room is left on the disk of the run folder: {free} MB")


_RANKS: Sequence[Sequence[Callable[[Facts, float], Iterator[_Finding]]]] = (
    (_find_full_disk,),
    (_find_operator_pause,),
    (_find_restart,),
    (_find_lost_workers, _find_silent_peers, _find_stuck_workers, _find_lost_validator),
    (_find_missing_workers,),
    (_find_troubles,),
    (_find_low_disk,),
)


def _connected_workers(facts: Facts) -> list[Facts]:
    return [peer for peer in facts["peers"] if peer["role"] == "worker" and peer["connected"]]


def _who(role: str, peers: Sequence[Facts]) -> str:
    if role == "validator":
        return "the validator stalls"
    return (
        f"worker {_name(peers[0])} stalls" if len(peers) == 1 else f"{len(peers)} workers stall ({_join_names(peers)})"
    )


def _join_names(peers: Sequence[Facts]) -> str:
    names = [_name(peer) for peer in peers[:MAX_NAMES]]
    more = len(peers) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _name(peer: Facts) -> str:
    """A peer's own words, short enough for a sentence and without control characters."""
    name = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in peer["name"])
    return name[:MAX_NAME_CHARS] or peer["peer"][-8:]
