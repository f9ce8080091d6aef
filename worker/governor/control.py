"""The volunteer's own pause: a small file that commands write and running workers read."""

import json
import math
import re
from pathlib import Path

from protocol.errors import ConfigError
from worker.governor.files import replace_file

_UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def pause(folder: Path, now_unix_s: float, for_s: float | None = None) -> None:
    """Pause every worker that keeps its things in `folder`, until `resume` or for so many seconds."""
    until = None if for_s is None else now_unix_s + for_s
    replace_file(_path(folder), json.dumps({"until_unix_s": until}) + "\n")


def resume(folder: Path) -> bool:
    """End the pause; whether there was one."""
    there = _path(folder).exists()
    _path(folder).unlink(missing_ok=True)
    return there


def read_pause(folder: Path) -> float | None:
    """Until when it is paused, in unix seconds, infinite for `until resume`; None: it is not, or nobody can read it."""
    try:
        until = json.loads(_path(folder).read_text(encoding="utf-8"))["until_unix_s"]
        return math.inf if until is None else float(until)
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None


def parse_duration(text: str) -> float:
    """Seconds of "2h", "30m", "1h30m" or "2d". Raises ConfigError."""
    found = _DURATION.fullmatch(text.strip().lower().replace(" ", ""))
    seconds = (
        sum(int(n) * unit_s for n, unit_s in zip(found.groups("0"), _UNITS_S.values(), strict=True)) if found else 0
    )
    if not 0 < seconds <= 366 * 86_400:
        raise ConfigError(f"{text!r} is no duration of up to a year; write 30m, 2h, 1h30m or 2d")
    return float(seconds)


def _path(folder: Path) -> Path:
    return folder / "pause.json"
