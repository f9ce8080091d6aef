"""What all viewers share: one poll of the state, each reading of the records once, nothing while nobody looks."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from coordinator.dashboard.access import Access
from coordinator.dashboard.history import RoundHistory
from coordinator.dashboard.snapshot import Snapshot, describe
from coordinator.server import Server

log = structlog.get_logger()
POLL_EVERY_S = 1.0
KEEP_READINGS = 64
T = TypeVar("T")
Updater = Callable[[Snapshot], Awaitable[None]]


@dataclass(slots=True)
class _Reading:
    """Something read from the records, and when; whoever asks while it is read waits for the answer."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    answer: Any = None
    read_s: float = float("-inf")


class Board:
    """Readings and viewers of one run."""

    def __init__(self, server: Server, access: Access) -> None:
        self.server = server
        self.access = access
        self.history = RoundHistory(server.database.readers)
        self._viewers: dict[Updater, None] = {}
        self._snapshot: Snapshot | None = None
        self._read_s = 0.0
        self._polling = asyncio.Lock()
        self._readings: dict[tuple[Any, ...], _Reading] = {}

    async def read(self) -> Snapshot:
        """The state in words, at most one poll old."""
        async with self._polling:
            if self._snapshot is None or time.monotonic() - self._read_s > POLL_EVERY_S / 2:
                await self.history.refresh()
                self._snapshot = describe(self.server.status(), self.history, time.time())
                self._read_s = time.monotonic()
            return self._snapshot

    async def share(self, read: Callable[..., T], *arguments: Any, every_s: float = 2.0) -> T:
        """`read(*arguments)`, called in a thread at most once in `every_s` for all who ask.

        The same object is given until then, so that a page sees by identity whether there is news.
        """
        key = (read, *arguments)
        reading = self._readings.pop(key, None) or _Reading()
        self._readings[key] = reading
        while len(self._readings) > KEEP_READINGS:
            del self._readings[next(iter(self._readings))]
        async with reading.lock:
            if time.monotonic() - reading.read_s >= every_s:
                answer = await asyncio.to_thread(read, *arguments)
                reading.read_s = time.monotonic()
                if answer != reading.answer:
                    reading.answer = answer
            shared: T = reading.answer
            return shared

    def add(self, viewer: Updater) -> None:
        """Have `viewer` called with each new snapshot until it is removed."""
        self._viewers[viewer] = None

    def remove(self, viewer: Updater) -> None:
        self._viewers.pop(viewer, None)

    async def keep_showing(self) -> None:
        """Until cancelled: what changed, to all who look."""
        while True:
            await asyncio.sleep(POLL_EVERY_S)
            if not self._viewers:
                continue
            try:
                snapshot = await self.read()
            except Exception:
                log.exception("the state could not be read for the page")
                continue
            for viewer in list(self._viewers):
                try:
                    await viewer(snapshot)
                except Exception:
                    log.exception("a page could not be brought up to date")
