"""Weekly windows of local time, such as "mon-fri 22:00-07:00", "sat-sun" or "tue thu 12:00-13:30".

A window over midnight belongs to the day on which it begins. All is by the clock on the wall: when clocks change, the
hours of a window stay. Pure; the time is an argument.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_TIMES = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
EXAMPLE = '"mon-fri 22:00-07:00" or "sat-sun"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The same hours on some days of the week (0: Monday). `end_minute` is over 1440 when it ends on the next day."""

    days: frozenset[int]
    start_minute: int = 0
    end_minute: int = _DAY_MINUTES


def parse_window(text: str) -> Window:
    """Raises ValueError with what a window looks like."""
    days: set[int] = set()
    hours: tuple[int, int] | None = None
    for word in text.lower().split():
        if ":" not in word:
            days |= _parse_days(word)
        elif hours is None:
            hours = _parse_hours(word)
        else:
            raise ValueError(f"{text!r}: one stretch of time in each window; write two windows")
    if not days and hours is None:
        raise ValueError(f"an empty window; write {EXAMPLE}")
    start, end = hours or (0, _DAY_MINUTES)
    return Window(days=frozenset(days or range(7)), start_minute=start, end_minute=end)


def is_open(windows: Sequence[Window], local: datetime) -> bool:
    """Whether one of the windows holds `local`; no windows at all: always."""
    today, minute = local.weekday(), local.hour * 60 + local.minute
    yesterday = (today - 1) % 7
    return not windows or any(
        (today in window.days and window.start_minute <= minute < window.end_minute)
        or (yesterday in window.days and minute + _DAY_MINUTES < window.end_minute)
        for window in windows
    )


def find_next_change(windows: Sequence[Window], local: datetime) -> datetime | None:
    """When, after `local` and in its time zone, the windows open or close next; None: never."""
    clock = local.replace(tzinfo=None)
    midnight = datetime.combine(clock.date(), time())
    edges = {
        midnight + timedelta(days=day, minutes=minute)
        for day in range(-1, 9)
        for window in windows
        if (midnight + timedelta(days=day)).weekday() in window.days
        for minute in (window.start_minute, window.end_minute)
    }
    now_open = is_open(windows, clock)
    for edge in sorted(edges):
        if edge > clock and is_open(windows, edge) != now_open:
            return edge.replace(tzinfo=local.tzinfo)
    return None


def _parse_days(word: str) -> set[int]:
    first, _, last = word.partition("-")
    if first not in _DAYS or (last or first) not in _DAYS:
        raise ValueError(f"{word!r} is neither a day nor a time; write {EXAMPLE}")
    start, end = _DAYS.index(first), _DAYS.index(last or first)
    return {(start + step) % 7 for step in range((end - start) % 7 + 1)}


def _parse_hours(word: str) -> tuple[int, int]:
    found = _TIMES.fullmatch(word)
    if found is None:
        raise ValueError(f"{word!r} is no time; write {EXAMPLE}")
    start_hour, start_minute, end_hour, end_minute = map(int, found.groups())
    start, end = 60 * start_hour + start_minute, 60 * end_hour + end_minute
    if max(start_minute, end_minute) > 59 or start >= _DAY_MINUTES or end > _DAY_MINUTES:
        raise ValueError(f"{word!r}: times go from 00:00 to 24:00")
    if start == end:
        raise ValueError(f"{word!r} ends when it begins; leave the time out for a whole day")
    return start, end if end > start else end + _DAY_MINUTES
