"""Letting other programs go first: niceness and disk priority of this process, all its threads, and what it starts.

On Linux both belong to threads, so they are set for each; new threads and processes inherit them. Only a process with
the right to do so may become less nice again.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from worker.governor.preferences import IoPriority

_WINDOWS_CLASSES = ((0, "NORMAL_PRIORITY_CLASS"), (10, "BELOW_NORMAL_PRIORITY_CLASS"), (20, "IDLE_PRIORITY_CLASS"))
_LINUX_IO: dict[IoPriority, tuple[int, int]] = {"normal": (2, 4), "low": (2, 7), "idle": (3, 0)}  # class, level


class Priority:
    """What this process had is noted at the beginning, for `undo`."""

    def __init__(self) -> None:
        process = psutil.Process()
        self._nice = process.nice()
        self._io: Any = process.ionice() if hasattr(process, "ionice") else None

    def apply(self, niceness: int, io_priority: IoPriority) -> bool:
        """niceness: 0 to 19. Whether the system allowed all of it."""
        if sys.platform == "win32":
            name = next(name for limit, name in _WINDOWS_CLASSES if niceness <= limit)
            return self._set(getattr(psutil, name), None)
        return self._set(max(niceness, int(self._nice)), _LINUX_IO[io_priority])

    def undo(self) -> bool:
        """As it was before; whether the system allowed it."""
        return self._set(self._nice, self._io)

    def _set(self, nice: Any, io: Any) -> bool:
        allowed = True
        for one in _threads():
            with suppress(psutil.NoSuchProcess):
                try:
                    if one.nice() != nice:
                        one.nice(nice)
                    if io is not None and hasattr(one, "ionice"):
                        one.ionice(*io)
                except (psutil.AccessDenied, PermissionError):
                    allowed = False
        return allowed


def _threads() -> Iterator[psutil.Process]:
    """On Linux a thread's id does for a process's."""
    tasks = Path("/proc/self/task")
    for pid in sorted(int(path.name) for path in tasks.iterdir()) if tasks.is_dir() else [os.getpid()]:
        with suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid)
