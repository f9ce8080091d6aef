"""The rungs of the ladder: for each reason, what would start a pause and what would end one.

Pure. Between the two thresholds of a rung nothing changes, so that a reading that wavers does not flap.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.reasons import PauseReason
from worker.governor.schedule import find_next_change, is_open

GB = 1e9
BATTERY_MARGIN_PERCENT = 5.0
OTHER_PROGRAMS_LEAVE_FACTOR = 0.7  # of the share that pauses
TEMPERATURE_MARGIN_CELSIUS = 8.0
FREE_SPACE_LEAVE_FACTOR = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is known; `local` is `now_unix_s` in local time."""

    preferences: Preferences
    readings: Readings
    now_unix_s: float
    local: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one rung sees: whether it would start a pause, whether it would end one (between thresholds: neither)."""

    enters: bool
    leaves: bool
    detail: str
    until_unix_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One reason: how it is judged (None: turned off), how long it must last to pause, and how long a pause lasts."""

    reason: PauseReason
    judge: Callable[[Moment], Finding | None]
    enter_after_s: float = 0.0
    dwell_s: float = 0.0


_UNKNOWN = Finding(enters=False, leaves=True, detail="its sensor no longer answers")


def _judge_user_pause(moment: Moment) -> Finding | None:
    until = moment.readings.user_pause_until_unix_s
    if until is None:
        return None
    paused = moment.now_unix_s < until
    detail = "until you resume it" if math.isinf(until) else "for the time that you gave"
    return Finding(enters=paused, leaves=not paused, detail=detail, until_unix_s=None if math.isinf(until) else until)


def _judge_battery(moment: Moment) -> Finding | None:
    preferences, readings = moment.preferences, moment.readings
    level, least = readings.battery_percent, preferences.battery_min_percent
    if not preferences.pause_on_battery and not least:
        return None
    enough = min(least + BATTERY_MARGIN_PERCENT, 100.0)
    unplugged = preferences.pause_on_battery and readings.on_battery is True
    low = level is not None and level < least
    filling = level is not None and least > 0 and level < enough
    charge = f"battery at {level:.0f} %" if level is not None else "battery"
    return Finding(
        enters=unplugged or low,
        leaves=not unplugged and not filling,
        detail=f"{charge}, {'not plugged in' if unplugged else f'goes on at {enough:.0f} %'}",
    )


def _judge_user_active(moment: Moment) -> Finding | None:
    idle_s = moment.readings.user_idle_s
    if not moment.preferences.pause_when_user_active:
        return None
    if idle_s is None:
        return _UNKNOWN
    active = idle_s < 60.0 * moment.preferences.user_idle_minutes
    detail = f"last touched {_duration(idle_s)} ago, goes on after {moment.preferences.user_idle_minutes:g} min"
    until = moment.now_unix_s + 60.0 * moment.preferences.user_idle_minutes - idle_s
    return Finding(enters=active, leaves=not active, detail=detail, until_unix_s=until)


def _judge_other_programs(moment: Moment) -> Finding | None:
    share, limit = moment.readings.other_cpu_share, moment.preferences.other_programs_max_percent / 100.0
    if not limit:
        return None
    if share is None:
        return _UNKNOWN
    detail = f"they take {share:.0%} of the CPU, over your {limit:.0%}"
    if share <= limit:
        detail = f"they took over {limit:.0%} of the CPU, now {share:.0%}"
    return Finding(enters=share > limit, leaves=share <= limit * OTHER_PROGRAMS_LEAVE_FACTOR, detail=detail)


def _judge_temperature(moment: Moment) -> Finding | None:
    preferences, readings = moment.preferences, moment.readings
    pairs = (
        ("CPU", readings.cpu_celsius, preferences.cpu_max_celsius),
        ("GPU", readings.gpu_celsius, preferences.gpu_max_celsius),
    )
    watched = [(name, value, limit) for name, value, limit in pairs if limit]
    if not watched:
        return None
    known = [(name, value, limit) for name, value, limit in watched if value is not None]
    if not known:
        return _UNKNOWN
    name, value, limit = max(known, key=lambda entry: entry[1] - entry[2])
    cool = limit - TEMPERATURE_MARGIN_CELSIUS
    return Finding(
        enters=value > limit,
        leaves=value <= cool,
        detail=f"{name} at {value:.0f} °C, limit {limit:.0f} °C, goes on at {cool:.0f} °C",
    )


def _judge_schedule(moment: Moment) -> Finding | None:
    windows = moment.preferences.windows
    if not windows:
        return None
    now_open = is_open(windows, moment.local)
    change = None if now_open else find_next_change(windows, moment.local)
    return Finding(
        enters=not now_open,
        leaves=now_open,
        detail=f"goes on {change:%a %H:%M}" if change else "outside its windows",
        until_unix_s=to_unix_s(moment, change) if change else None,
    )


def _judge_metered(moment: Moment) -> Finding | None:
    if not moment.preferences.pause_on_metered:
        return None
    metered = moment.readings.metered is True
    return Finding(enters=metered, leaves=not metered, detail="the system says that it is paid by volume")


def _judge_traffic(moment: Moment) -> Finding | None:
    cap_gb, used = moment.preferences.monthly_traffic_gb, moment.readings.traffic_bytes
    if not cap_gb:
        return None
    if used is None:
        return _UNKNOWN
    over = used >= cap_gb * GB
    first = moment.local.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    next_month = (first + timedelta(days=32)).replace(day=1)
    return Finding(
        enters=over,
        leaves=not over,
        detail=f"{used / GB:.2f} of {cap_gb:g} GB, goes on {next_month:%d %b}",
        until_unix_s=to_unix_s(moment, next_month),
    )


def _judge_memory(moment: Moment) -> Finding | None:
    return _judge_space(moment.readings.free_memory_bytes, moment.preferences.memory_min_free_gb, "of memory")


def _judge_disk(moment: Moment) -> Finding | None:
    free = _judge_space(moment.readings.free_disk_bytes, moment.preferences.disk_min_free_gb, "of the disk")
    cap_gb, store = moment.preferences.store_max_gb, moment.readings.store_bytes
    if cap_gb and store is not None and store > cap_gb * GB and not (free and free.enters):
        detail = f"the worker keeps {store / GB:.1f} GB, over your {cap_gb:g} GB"
        return Finding(enters=True, leaves=False, detail=detail)
    return free or (_UNKNOWN if cap_gb else None)


def _judge_space(free_bytes: int | None, least_gb: float, of_what: str) -> Finding | None:
    if not least_gb:
        return None
    if free_bytes is None:
        return _UNKNOWN
    enough_gb = least_gb * FREE_SPACE_LEAVE_FACTOR
    return Finding(
        enters=free_bytes < least_gb * GB,
        leaves=free_bytes >= enough_gb * GB,
        detail=f"{free_bytes / GB:.2f} GB {of_what} free, goes on at {enough_gb:.2g} GB",
    )


LADDER: Sequence[Rung] = (
    Rung(reason=PauseReason.USER_PAUSE, judge=_judge_user_pause),
    Rung(reason=PauseReason.BATTERY, judge=_judge_battery),
    Rung(reason=PauseReason.USER_ACTIVE, judge=_judge_user_active, dwell_s=15.0),
    Rung(reason=PauseReason.OTHER_PROGRAMS, judge=_judge_other_programs, enter_after_s=5.0, dwell_s=60.0),
    Rung(reason=PauseReason.TEMPERATURE, judge=_judge_temperature, dwell_s=120.0),
    Rung(reason=PauseReason.SCHEDULE, judge=_judge_schedule),
    Rung(reason=PauseReason.METERED, judge=_judge_metered),
    Rung(reason=PauseReason.TRAFFIC_CAP, judge=_judge_traffic),
    Rung(reason=PauseReason.MEMORY, judge=_judge_memory, dwell_s=30.0),
    Rung(reason=PauseReason.DISK, judge=_judge_disk, dwell_s=30.0),
)


def to_unix_s(moment: Moment, later: datetime) -> float:
    """Without a time zone, or over a change of clocks in a fixed one, this is the time by the clock on the wall."""
    if moment.local.tzinfo is None:
        return moment.now_unix_s + (later - moment.local).total_seconds()
    return later.timestamp()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
