"""Sensors: what the machine says about itself, without ever raising or keeping anybody waiting.

Every source is read in a daemon thread of its own when what is known is too old. One that hangs is left alone until it
comes back; what it said is used a little longer and is then unknown.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from worker.governor import probes
from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.traffic import TrafficMeter
from worker.governor.user_idle import UserIdle

T = TypeVar("T")
READ_TIMEOUT_S = 1.0  # for all sources together


class Sensors(Protocol):
    """Where readings come from: this machine, or a script in tests and simulations."""

    def read(self, preferences: Preferences | None = None) -> Readings:
        """What is known now; with preferences, only what they ask for need be known. Blocks a second at most."""


class SystemSensors:
    """This machine. `folder`: where the workers keep their things, for the disk; `own_pids`: of all workers here."""

    def __init__(
        self,
        folder: Path,
        traffic: TrafficMeter | None = None,
        own_pids: Callable[[], Iterable[int]] = lambda: (os.getpid(),),
    ) -> None:
        self._battery = _Source(probes.read_battery, 2.0)
        self._idle = _Source(UserIdle().read, 0.4)  # whoever comes back must not wait
        self._other = _Source(probes.OtherPrograms(own_pids).read, 2.0)
        self._cpu = _Source(probes.read_cpu_celsius, 5.0)
        self._gpu = _Source(probes.read_gpu_celsius, 5.0)
        self._metered = _Source(probes.read_metered, 20.0)
        self._traffic = _Source(lambda: traffic.this_month().total if traffic else None, 2.0)
        self._memory = _Source(probes.read_free_memory, 1.0)
        self._disk = _Source(lambda: probes.read_free_disk(folder), 5.0)
        self._store = _Source(lambda: probes.read_folder_bytes(folder), 60.0)

    def read(self, preferences: Preferences | None = None) -> Readings:
        """See Sensors. What the preferences do not ask for is not read, and None."""
        ask = preferences
        wanted: dict[_Source[Any], bool] = {
            self._battery: ask is None or ask.pause_on_battery or ask.battery_min_percent > 0,
            self._idle: ask is None or ask.pause_when_user_active,
            self._other: ask is None or ask.other_programs_max_percent > 0,
            self._cpu: ask is None or ask.cpu_max_celsius > 0,
            self._gpu: ask is None or ask.gpu_max_celsius > 0,
            self._metered: ask is None or ask.pause_on_metered,
            self._traffic: True,  # reading it is what saves it
            self._memory: ask is None or ask.memory_min_free_gb > 0,
            self._disk: ask is None or ask.disk_min_free_gb > 0,
            self._store: ask is None or ask.store_max_gb > 0,
        }
        started = [source for source, is_wanted in wanted.items() if is_wanted and source.refresh()]
        deadline_s = time.monotonic() + READ_TIMEOUT_S
        for source in started:
            source.wait(deadline_s - time.monotonic())
        on_battery, percent = self._battery.value or (None, None)
        return Readings(
            on_battery=on_battery,
            battery_percent=percent,
            user_idle_s=self._idle.value,
            other_cpu_share=self._other.value,
            cpu_celsius=self._cpu.value,
            gpu_celsius=self._gpu.value,
            metered=self._metered.value,
            traffic_bytes=self._traffic.value,
            free_memory_bytes=self._memory.value,
            free_disk_bytes=self._disk.value,
            store_bytes=self._store.value,
        )


@dataclass(frozen=True, slots=True)
class _Answer(Generic[T]):
    value: T
    at_s: float


class _Source(Generic[T]):
    """A value that is asked for again when it is older than `max_age_s`, and forgotten when nothing comes any more."""

    def __init__(self, probe: Callable[[], T | None], max_age_s: float) -> None:
        self._probe = probe
        self._max_age_s = max_age_s
        self._answer: _Answer[T | None] | None = None
        self._finished = threading.Event()
        self._finished.set()

    @property
    def value(self) -> T | None:
        answer = self._answer
        if answer is None or time.monotonic() - answer.at_s > 3 * self._max_age_s + 5.0:
            return None
        return answer.value

    def refresh(self) -> bool:
        """Start a reading when one is due; whether one was started."""
        answer = self._answer
        due = answer is None or time.monotonic() - answer.at_s >= self._max_age_s
        if not due or not self._finished.is_set():
            return False
        self._finished.clear()
        threading.Thread(target=self._read, name="sensor", daemon=True).start()
        return True

    def wait(self, timeout_s: float) -> None:
        """Until the reading is there, or so long."""
        self._finished.wait(max(timeout_s, 0.0))

    def _read(self) -> None:
        try:
            value = self._probe()
        except Exception:  # a driver's oddities: whatever it is, the answer is "unknown"
            value = None
        self._answer = _Answer(value, time.monotonic())
        self._finished.set()
