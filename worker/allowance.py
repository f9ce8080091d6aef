"""What the machine's owner allows a worker: when, how fast, and how much room. The governor's word, turned into deeds.

Without settings (`--always`) everything is allowed but what the command line limits. It is the worker.lease_work.Pace
of the worker's leases.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from protocol.exchange.throttle import Throttle
from worker.background import list_pids, running_pid
from worker.governor.governor import Governor
from worker.governor.ladder import Decision
from worker.governor.preferences import CompileMode, Preferences
from worker.governor.priority import Priority
from worker.governor.reasons import PauseReason
from worker.governor.sensors import Sensors, SystemSensors
from worker.governor.traffic import TrafficMeter
from worker.home import RunHome, list_runs

log = structlog.get_logger()
MAX_STORE_BYTES = 4 << 30  # of one run's blobs, however much is allowed
STORE_SHARE = 0.8  # of what is allowed; logs, saved work and what arrives between two prunings take the rest
LEAST_STORE_SHARE = 0.1  # whatever other runs hold: the state and the lease's shards have to be somewhere
SPARING_NETWORK = (PauseReason.METERED, PauseReason.TRAFFIC_CAP)


class Allowance:
    """Of one worker. on_decision: called in the event loop when there is another reason to pause, or none, or throttle.

    make_sensors: None: this machine's.
    """

    def __init__(
        self,
        run: RunHome,
        *,
        preferences_path: Path | None,
        throttle: float,
        threads: int | None,
        make_sensors: Callable[[TrafficMeter], Sensors] | None,
        on_decision: Callable[[Decision], None],
    ) -> None:
        self.downloads = Throttle(None)
        self.uploads = Throttle(None)  # the owner puts its node's here
        self.online = asyncio.Event()  # the network may be used
        self.online.set()
        self.offline = asyncio.Event()  # it is to be spared
        self._run = run
        self._throttle = throttle
        self._threads = threads
        self._on_decision = on_decision
        self._traffic = TrafficMeter(run.home / "traffic.json")
        self._counted = 0, 0  # bytes that the traffic meter knows of
        self._priority = Priority()
        self._governor: Governor | None = None
        if preferences_path is not None:
            self._governor = Governor(
                preferences_path,
                run.home,
                make_sensors(self._traffic) if make_sensors else self._system_sensors(),
                on_change=self._take_decision,
                on_preferences=self._take_preferences,
            )

    @property
    def paused(self) -> bool:
        return self._governor is not None and self._governor.paused

    @property
    def throttle(self) -> float:
        return min(self._throttle, self._governor.throttle if self._governor else 1.0)

    @property
    def preferences(self) -> Preferences | None:
        return self._governor.preferences if self._governor else None

    @property
    def compile_mode(self) -> CompileMode:
        return self.preferences.compile if self.preferences else "off"

    def choose_threads(self) -> int | None:
        """Of the CPU; None: one a core."""
        return self._threads or (self.preferences.cpu_threads or None if self.preferences else None)

    def wait_while_paused(self, should_stop: Callable[[], bool]) -> bool:
        """See worker.lease_work.Pace."""
        return self._governor.wait_while_paused(should_stop) if self._governor else not should_stop()

    async def begin(self) -> None:
        """Look once, so that nothing is computed that should not be."""
        if self._governor is not None:
            await self._governor.poll()

    async def run(self) -> None:
        """Look again and again until cancelled."""
        if self._governor is None:
            await asyncio.Event().wait()
        else:
            await self._governor.run()

    def count_traffic(self, bytes_sent: int, bytes_received: int) -> None:
        """Tell the meter of the traffic since the worker's start."""
        self._traffic.add(bytes_sent - self._counted[0], bytes_received - self._counted[1])
        self._counted = bytes_sent, bytes_received

    def save_traffic(self) -> None:
        self._traffic.save()

    def max_store_bytes(self) -> int:
        """Of this run's blobs: an equal share, with the other runs at work here, of what is allowed for everything.

        What runs that are not at work have left on the disk counts: it is there. Reads folders.
        """
        allowed_gb = self.preferences.store_max_gb if self.preferences else 0.0
        if not allowed_gb:
            return MAX_STORE_BYTES
        allowed, num_running, idle_bytes = STORE_SHARE * 1e9 * allowed_gb, 1, 0
        for other in list_runs(self._run.home):
            if other.run_id == self._run.run_id:
                continue
            if running_pid(other) is None:
                idle_bytes += other.store.total_bytes()
            else:
                num_running += 1
        share = max(allowed - idle_bytes, LEAST_STORE_SHARE * allowed) / num_running
        return min(MAX_STORE_BYTES, int(share))

    def _system_sensors(self) -> Sensors:
        return SystemSensors(self._run.home, self._traffic, lambda: list_pids(self._run.home))

    def _take_decision(self, decision: Decision) -> None:
        if decision.reason in SPARING_NETWORK:
            self.online.clear()
            self.offline.set()
        else:
            self.offline.clear()
            self.online.set()
        self._on_decision(decision)

    def _take_preferences(self, preferences: Preferences) -> None:
        self.uploads.limit(preferences.upload_bps)
        self.downloads.limit(preferences.download_bps)
        if not self._priority.apply(preferences.niceness, preferences.io_priority):
            log.warning("the system does not let this process change its priority")
