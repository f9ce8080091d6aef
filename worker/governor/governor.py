"""The governor: asks the sensors, lets the ladder decide, and holds what it decided for whoever computes.

`poll` and `run` belong to one event loop; `paused`, `throttle` and `wait_while_paused` may be used from any thread.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import structlog

from protocol.errors import ConfigError
from worker.governor import control
from worker.governor.ladder import Decision, LadderState, decide
from worker.governor.preferences import Preferences, load_preferences
from worker.governor.readings import Readings
from worker.governor.sensors import Sensors

log = structlog.get_logger()
POLL_S = 0.5
_LOOK_S = 0.1  # a paused thread looks this often whether it should stop


class Governor:
    """One a worker. `folder` holds the control file; its pause counts at once.

    on_change: called in the event loop when the reason, or the throttle, is another one. on_preferences: called there
    with the preferences, at the first poll and when they changed, before on_change.
    """

    def __init__(
        self,
        preferences_path: Path,
        folder: Path,
        sensors: Sensors,
        *,
        clock: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
        on_change: Callable[[Decision], None] = lambda _: None,
        on_preferences: Callable[[Preferences], None] = lambda _: None,
    ) -> None:
        self._path, self._folder, self._sensors = preferences_path, folder, sensors
        self._clock, self._poll_s = clock, poll_s
        self._on_change, self._on_preferences = on_change, on_preferences
        self._file_version: tuple[int, int] | None = None
        self._told: Preferences | None = None
        self._state = LadderState()
        self._may_compute = threading.Event()
        self._may_compute.set()
        self.preferences = Preferences()
        self.readings = Readings()
        self.decision = Decision()

    @property
    def paused(self) -> bool:
        """Whether nothing should be computed now."""
        return not self._may_compute.is_set()

    @property
    def throttle(self) -> float:
        """The share of the time to compute, in (0, 1]."""
        return self.decision.throttle

    def wait_while_paused(self, should_stop: Callable[[], bool]) -> bool:
        """For the thread that computes: return True as soon as it may, False when it should stop first."""
        while not should_stop():
            if self._may_compute.wait(_LOOK_S):
                return True
        return False

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(self._poll_s)

    async def poll(self) -> Decision:
        """Look once and decide. Before the first inner step, so that nothing is computed that should not be."""
        preferences, readings = await asyncio.to_thread(self._look)
        now_unix_s = self._clock()
        local = datetime.fromtimestamp(now_unix_s).astimezone()
        self._state, decision = decide(preferences, readings, self._state, now_unix_s, local)
        self.preferences, self.readings = preferences, readings
        if preferences != self._told:
            self._told = preferences
            self._on_preferences(preferences)
        self._hold(decision)
        return decision

    def _hold(self, decision: Decision) -> None:
        before, self.decision = self.decision, decision
        if decision.reason is None:
            self._may_compute.set()
        else:
            self._may_compute.clear()
        if decision.reason != before.reason:
            if decision.reason is None:
                log.info("computing again", after=str(before.reason))
            else:
                log.info(
                    "paused", reason=str(decision.reason), detail=decision.detail, until_unix_s=decision.until_unix_s
                )
        if (decision.reason, decision.throttle) != (before.reason, before.throttle):
            self._on_change(decision)

    def _look(self) -> tuple[Preferences, Readings]:
        preferences = self._load()
        readings = self._sensors.read(preferences)
        return preferences, replace(readings, user_pause_until_unix_s=control.read_pause(self._folder))

    def _load(self) -> Preferences:
        """The preferences as the file has them; the last good ones while it cannot be used."""
        try:
            found = self._path.stat()
            version = (found.st_mtime_ns, found.st_ino)
        except OSError:
            version = (0, 0)
        if version == self._file_version:
            return self.preferences
        self._file_version = version
        try:
            return load_preferences(self._path)
        except ConfigError as error:
            log.warning("the settings cannot be used; the last good ones hold", error=str(error))
            return self.preferences
