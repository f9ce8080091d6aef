"""How many bytes this machine's workers sent and received in this calendar month."""

import fcntl
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from protocol.errors import ManyhandsError
from worker.governor.files import replace_file

SAVE_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes."""

    sent: int = 0
    received: int = 0

    @property
    def total(self) -> int:
        return self.sent + self.received

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.sent + other.sent, self.received + other.received)


class TrafficMeter:
    """A counter in `path` that several workers share. A crash loses what came since the last save.

    Threads may share one. A disk that cannot be written keeps the count in memory: counting is no reason to stop.
    """

    def __init__(self, path: Path, now_local: Callable[[], datetime] = datetime.now) -> None:
        self._path = path
        self._now_local = now_local
        self._lock = threading.Lock()
        self._month = self._this_month()
        self._unsaved = Traffic()
        self._saved = self._read()
        self._saved_at_s = time.monotonic()

    def add(self, sent: int, received: int) -> None:
        """Count bytes; does not touch the disk."""
        with self._lock:
            self._roll_over()
            self._unsaved += Traffic(sent, received)

    def this_month(self) -> Traffic:
        """What all workers counted, as far as they have saved it, and all of this one's. Saves every 10 s."""
        with self._lock:
            self._roll_over()
            if time.monotonic() - self._saved_at_s >= SAVE_AFTER_S:
                self._save()
            return self._saved + self._unsaved

    def save(self) -> None:
        """Write what is counted; for the worker's end."""
        with self._lock:
            self._roll_over()
            self._save()

    def _roll_over(self) -> None:
        month = self._this_month()
        if month != self._month:
            self._month, self._saved, self._unsaved = month, Traffic(), Traffic()

    def _save(self) -> None:
        """Add what is not saved to what the file has by now: other workers write it too."""
        self._saved_at_s = time.monotonic()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                total = self._read() + self._unsaved
                if self._unsaved.total:
                    content = {"month": self._month, "sent_bytes": total.sent, "received_bytes": total.received}
                    replace_file(self._path, json.dumps(content) + "\n")
        except (OSError, ManyhandsError):
            return
        self._saved, self._unsaved = total, Traffic()

    def _read(self) -> Traffic:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["month"] != self._month:
                return Traffic()
            return Traffic(int(content["sent_bytes"]), int(content["received_bytes"]))
        except (OSError, ValueError, TypeError, KeyError):
            return Traffic()

    def _this_month(self) -> str:
        return f"{self._now_local():%Y-%m}"
