"""The machine's own part of the doctor: versions, device and speed, memory, disk, power. Needs no coordinator."""

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from worker.compiling import find_obstacle
from worker.device import count_cores, describe_device, synchronize
from worker.doctor.findings import Finding, Level
from worker.governor.preferences import CompileMode

SHOWN_PACKAGES = ("torch", "numpy", "hivemind")
MATMUL_SIZE = 1024
MATMUL_S = 1.0
WORKER_BYTES = 550_000_000  # of a worker without its model, libp2p included (benchmarks.worker_start)
MIN_DISK_BYTES, GOOD_DISK_BYTES = 500_000_000, 6_000_000_000  # a worker keeps at most 4 GiB of blobs
NVIDIA, AMD = "0x10de", "0x1002"


def check_python() -> Finding:
    """The interpreter."""
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):  # noqa: UP036 - somebody may have forced the installation
        return Finding(topic="python", level=Level.PROBLEM, text=text, advice="install Python 3.11 or later")
    return Finding(topic="python", level=Level.OK, text=text)


def check_packages() -> Finding:
    """All that manyhands depends on, against the versions that it asks for."""
    wrong: list[str] = []
    for line in requires("manyhands") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    shown = f"manyhands {version('manyhands')}, " + ", ".join(f"{name} {version(name)}" for name in SHOWN_PACKAGES)
    if wrong:
        advice = "`pip install --upgrade manyhands` in this environment brings what is needed"
        return Finding(topic="packages", level=Level.PROBLEM, text=f"{'; '.join(wrong)} ({shown})", advice=advice)
    return Finding(topic="packages", level=Level.OK, text=shown)


def check_device(device: torch.device) -> Finding:
    """What computes, and how fast it multiplies matrices."""
    gflops = measure_gflops(device)
    text = f"{device.type}: {describe_device(device)}; {gflops:,.0f} GFLOP/s in float32"
    if device.type == "cpu":
        text += f" with {torch.get_num_threads()} threads"
    figures: dict[str, float | int | str] = {"gflops": round(gflops, 1), "device": device.type, "cores": count_cores()}
    return Finding(topic="device", level=Level.OK, text=text, figures=figures)


def measure_gflops(device: torch.device, seconds: float = MATMUL_S) -> float:
    """Billions of float32 operations a second in products of 1024 x 1024 matrices, over about so long."""
    left, right = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE, device=device)
    left @ right
    synchronize(device)
    started_s, num_products = time.perf_counter(), 0
    while time.perf_counter() - started_s < seconds:
        left @ right
        synchronize(device)
        num_products += 1
    return num_products * 2 * MATMUL_SIZE**3 / (time.perf_counter() - started_s) / 1e9


def check_gpu(device: torch.device) -> Finding:
    """Whether there is a GPU, and whether torch can use it."""
    if device.type == "cuda":
        return Finding(topic="gpu", level=Level.OK, text=f"in use; driver {_nvidia_driver() or 'unknown'}")
    if device.type == "mps":
        return Finding(topic="gpu", level=Level.OK, text="Apple's, in use by MPS")
    vendors = _display_vendors()
    if NVIDIA in vendors or Path("/proc/driver/nvidia/version").exists():
        driver = _nvidia_driver()
        advice = (
            f"torch {torch.__version__} cannot use it: install torch built for CUDA (https://pytorch.org/get-started)"
            if driver
            else "install NVIDIA's driver; `nvidia-smi` must then list the card"
        )
        text = f"an NVIDIA card is here, driver {driver or 'not found'}, but it is not used"
        return Finding(topic="gpu", level=Level.ATTENTION, text=text, advice=advice)
    if AMD in vendors:
        text = "an AMD graphics chip is here, and not used"
        return Finding(
            topic="gpu", level=Level.ATTENTION, text=text, advice="torch built for ROCm can use many of them"
        )
    return Finding(topic="gpu", level=Level.OK, text="none found; the CPU computes")


def check_compiling(device: torch.device, mode: CompileMode) -> Finding:
    """What becomes of the setting `compile` here. Nothing is compiled."""
    obstacle = find_obstacle(device)
    if obstacle:
        text = f"not possible: {obstacle}"
        if mode == "off":
            return Finding(topic="compile", level=Level.OK, text=text)
        advice = "the model is computed as ever; `manyhands worker set compile off` says so"
        return Finding(topic="compile", level=Level.ATTENTION, text=text, advice=advice)
    texts = {
        "off": "off; `manyhands worker set compile auto` tries where a lease is long whether it pays",
        "auto": "tried at the start where a lease is long, and taken where it pays; `worker logs` tells",
        "on": "taken where it works; `worker logs` tells",
    }
    return Finding(topic="compile", level=Level.OK, text=texts[mode])


def available_bytes() -> int:
    """Memory that can be had without swapping; in a container its limit counts."""
    available = psutil.virtual_memory().available
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return min(available, max(0, limit - used)) if limit is not None and used is not None else available


def check_memory(needed_bytes: int = WORKER_BYTES) -> Finding:
    """Memory that is free, against what a worker needs."""
    total, free = psutil.virtual_memory().total, available_bytes()
    text = (
        f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB; the worker itself takes up to {needed_bytes / 1e9:.2f} GB"
    )
    figures: dict[str, float | int | str] = {"free_bytes": free, "total_bytes": total}
    if free < needed_bytes:
        advice = "close other programs, or take a machine with more memory"
        return Finding(topic="memory", level=Level.PROBLEM, text=text, advice=advice, figures=figures)
    if free < 2 * needed_bytes:
        advice = "enough for small models only; close other programs"
        return Finding(topic="memory", level=Level.ATTENTION, text=text, advice=advice, figures=figures)
    return Finding(topic="memory", level=Level.OK, text=text, figures=figures)


def check_disk(home: Path) -> Finding:
    """Room where the worker keeps its data, and whether it may write there. Nothing is written."""
    place = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free at {home}"
    figures: dict[str, float | int | str] = {"free_bytes": free}
    elsewhere = "`--home FOLDER` keeps the worker's data elsewhere"
    if not os.access(place, os.W_OK):
        text = f"{place} cannot be written to"
        return Finding(topic="disk", level=Level.PROBLEM, text=text, advice=elsewhere, figures=figures)
    if free < MIN_DISK_BYTES:
        return Finding(
            topic="disk", level=Level.PROBLEM, text=text, advice=f"make room, or {elsewhere}", figures=figures
        )
    if free < GOOD_DISK_BYTES:
        advice = f"a worker keeps up to 4 GB; make room, or {elsewhere}"
        return Finding(topic="disk", level=Level.ATTENTION, text=text, advice=advice, figures=figures)
    return Finding(topic="disk", level=Level.OK, text=text, figures=figures)


def check_power() -> Finding:
    """Mains or battery."""
    read = getattr(psutil, "sensors_battery", None)
    battery = read() if read is not None else None
    if battery is None:
        return Finding(topic="power", level=Level.OK, text="no battery: this machine is on mains")
    text = f"battery at {battery.percent:.0f} %, " + ("plugged in" if battery.power_plugged else "not plugged in")
    if battery.power_plugged is False:
        return Finding(topic="power", level=Level.ATTENTION, text=text, advice="plug it in: training drains a battery")
    return Finding(topic="power", level=Level.OK, text=text)


def _display_vendors() -> set[str]:
    """PCI vendors of the display controllers, where the system tells."""
    vendors = set()
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            if (device / "class").read_text().startswith("0x03"):
                vendors.add((device / "vendor").read_text().strip())
        except OSError:
            continue
    return vendors


def _nvidia_driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(answer.stdout.split()), "")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return None
