"""The ladder: of all reasons to pause, the first that holds.

Pure: what it knows is its arguments, the time too. A reason that is entered is left only after its dwell, and where a
reading wavers under a lower threshold than the one that entered it, so that no worker flaps. A reading of None never
starts a pause, and changed preferences are judged afresh, without dwell.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.reasons import PauseReason
from worker.governor.rungs import LADDER, Finding, Moment, Rung, to_unix_s
from worker.governor.schedule import find_next_change


@dataclass(frozen=True, slots=True, kw_only=True)
class Latch:
    """Where one reason stands. Times are unix seconds."""

    holds: bool = False
    since_unix_s: float = -math.inf  # it holds since then
    seen_unix_s: float | None = None  # does not hold yet, but what would start it has been there since then


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderState:
    """What `decide` must remember; a fresh one is right for a fresh start."""

    latches: Mapping[PauseReason, Latch] = field(default_factory=dict)
    preferences: Preferences | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`reason` None: compute, `throttle` of the time, in (0, 1]. `until_unix_s`: when this ends, if that is known."""

    reason: PauseReason | None = None
    detail: str = ""
    until_unix_s: float | None = None
    throttle: float = 1.0


def decide(
    preferences: Preferences, readings: Readings, state: LadderState, now_unix_s: float, local: datetime
) -> tuple[LadderState, Decision]:
    """What to do now. `local` is the same moment in local time; its time zone, if it has one, dates the schedule."""
    moment = Moment(preferences=preferences, readings=readings, now_unix_s=now_unix_s, local=local)
    before = state.latches if preferences == state.preferences else {}
    latches: dict[PauseReason, Latch] = {}
    decision: Decision | None = None
    for rung in LADDER:
        finding = rung.judge(moment)
        if finding is None:
            continue
        latch = _advance(before.get(rung.reason, Latch()), rung, finding, now_unix_s)
        latches[rung.reason] = latch
        if latch.holds and decision is None:
            decision = Decision(
                reason=rung.reason,
                detail=finding.detail,
                until_unix_s=finding.until_unix_s,
                throttle=preferences.compute_share,
            )
    return LadderState(latches=latches, preferences=preferences), decision or _run(moment)


def _run(moment: Moment) -> Decision:
    closes = find_next_change(moment.preferences.windows, moment.local)
    return Decision(
        until_unix_s=to_unix_s(moment, closes) if closes else None,
        throttle=moment.preferences.compute_share,
    )


def _advance(latch: Latch, rung: Rung, finding: Finding, now_unix_s: float) -> Latch:
    if latch.holds:
        since_unix_s = min(latch.since_unix_s, now_unix_s)  # a clock that was set back must not prolong a pause
        if finding.leaves and now_unix_s - since_unix_s >= rung.dwell_s:
            return Latch()
        return Latch(holds=True, since_unix_s=since_unix_s)
    if not finding.enters:
        return Latch()
    seen_unix_s = min(latch.seen_unix_s if latch.seen_unix_s is not None else now_unix_s, now_unix_s)
    if now_unix_s - seen_unix_s >= rung.enter_after_s:
        return Latch(holds=True, since_unix_s=now_unix_s)
    return Latch(seen_unix_s=seen_unix_s)
