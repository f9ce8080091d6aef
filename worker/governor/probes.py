"""One look at the machine each: battery, processor, temperatures, network, memory, disk. None is unknown.

These may raise and may block; worker.governor.sensors calls them so that neither matters.
"""

import importlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from worker.governor.user_idle import ask

FAMILY_MAX_AGE_S = 20.0
_CPU_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "cputemp")
_METERED = {"1": True, "2": False, "3": True, "4": False}  # NMMetered: yes, no, and NetworkManager's two guesses


def read_battery() -> tuple[bool | None, float | None]:
    """(runs on battery, percent)."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return None, None
    return (None if battery.power_plugged is None else not battery.power_plugged), float(battery.percent)


def read_cpu_celsius() -> float | None:
    """The hottest part of the processor."""
    chips = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    hottest = [part.current for chip in _CPU_CHIPS for part in chips.get(chip, ()) if 0.0 < part.current < 150.0]
    return max(hottest, default=None)


def read_gpu_celsius() -> float | None:
    """The hottest NVIDIA GPU, when nvidia-ml-py is installed."""
    nvml = _load_nvml()
    if nvml is None:
        return None
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return max((float(nvml.nvmlDeviceGetTemperature(one, nvml.NVML_TEMPERATURE_GPU)) for one in handles), default=None)


@cache
def _load_nvml() -> Any:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    nvml.nvmlInit()
    return nvml


def read_metered() -> bool | None:
    """What NetworkManager says; unknown without it."""
    if sys.platform != "linux":
        return None
    service = "org.freedesktop.NetworkManager"
    answer = ask(
        "busctl", "--timeout=1", "get-property", service, "/org/freedesktop/NetworkManager", service, "Metered"
    )
    found = re.fullmatch(r"u (\d)", (answer or "").strip())
    return _METERED.get(found[1]) if found else None


def read_free_memory() -> int:
    """Bytes that programs can still get without swapping."""
    return int(psutil.virtual_memory().available)


def read_free_disk(folder: Path) -> int:
    """Bytes free for this user on the disk of `folder`, which need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def read_folder_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`; 0 when it is not there."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                total += (Path(parent) / name).lstat().st_size
    return total


class OtherPrograms:
    """The share of all cores that programs took since the last reading, without this machine's workers.

    own_pids: the workers' main processes; what they started is theirs too.
    """

    def __init__(self, own_pids: Callable[[], Iterable[int]]) -> None:
        self._own_pids = own_pids
        self._family: set[psutil.Process] = set()
        self._family_at_s = 0.0
        self._busy_s: float | None = None
        self._all_s = 0.0
        self._own_s: dict[psutil.Process, float] = {}

    def read(self) -> float | None:
        """0 to 1; None at the first reading."""
        self._find_family()
        own_s = _cpu_seconds(self._family)
        busy_s, all_s = _machine_seconds()
        before, self._busy_s = self._busy_s, busy_s
        elapsed_s, self._all_s = all_s - self._all_s, all_s
        # A process that is new in the family may be old in the machine: it counts from its next reading on.
        ours_s = sum(now_s - self._own_s[one] for one, now_s in own_s.items() if one in self._own_s)
        self._own_s = own_s
        if before is None or elapsed_s <= 0.0:
            return None
        return min(max((busy_s - before - ours_s) / elapsed_s, 0.0), 1.0)

    def _find_family(self) -> None:
        """Walking all processes costs milliseconds, so it is done now and then."""
        if self._family and time.monotonic() - self._family_at_s < FAMILY_MAX_AGE_S:
            return
        self._family, self._family_at_s = set(), time.monotonic()
        for pid in {os.getpid(), *self._own_pids()}:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                self._family |= {process, *process.children(recursive=True)}


def _cpu_seconds(processes: Iterable[psutil.Process]) -> dict[psutil.Process, float]:
    seconds = {}
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process] = float(times.user + times.system)
    return seconds


def _machine_seconds() -> tuple[float, float]:
    """CPU seconds (busy, all) of all cores together since the start of the machine."""
    times: Mapping[str, Any] = psutil.cpu_times()._asdict()
    counted = {name: value for name, value in times.items() if name not in ("guest", "guest_nice", "steal")}  # in user
    total = float(sum(counted.values()))
    return total - float(times["idle"]) - float(times.get("iowait", 0.0)), total
