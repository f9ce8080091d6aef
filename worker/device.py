"""What this machine computes on, and what helps there: measured, not assumed.

It chooses a device, says in words what it is, sets torch's threads, and finds out whether bfloat16 autocast is faster
(on many CPUs it is slower). It does not decide when to compute; that is the governor's work.
"""

import contextlib
import ctypes
import difflib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from protocol.errors import ConfigError

_MAX_NAME_LENGTH = 64  # what a join request may carry
_AUTOCAST_GAIN = 0.9  # autocast is taken when its step needs at most this share of the time: bfloat16 costs accuracy
_MEASURE_BUDGET_S = 1.0
_NAMES = ("auto", "cpu", "cuda", "mps")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, MPS; the CPU's allocators


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` prefers CUDA (ROCm is CUDA to torch), then Apple's MPS, then the CPU.

    Raises ConfigError for an unknown name and for a device that this machine, or this torch, does not have.
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"device `{name}` is not known; did you mean `{near}`?")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        raise ConfigError(f"device `{name}`: torch {torch.__version__} finds none here; use `auto` or `cpu`")
    return torch.device(name)


def describe_device(device: torch.device | None = None) -> str:
    """The device in words, at most 64 characters: "NVIDIA H100 PCIe, 80 GB", "AMD EPYC 7B13, 8 cores"."""
    device = device or choose_device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        more = f", {properties.total_memory / 1e9:.0f} GB"
        name = properties.name
    else:
        more = f", {count_cores()} cores" if device.type == "cpu" else ""
        name = _processor_name()
    printable = "".join(character for character in " ".join(name.split()) if character.isprintable())
    return printable[: _MAX_NAME_LENGTH - len(more)] + more


def count_cores() -> int:
    """Cores that this process may use, hyper-threads not counted where that can be told."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def set_threads(num_threads: int | None = None) -> int:
    """Let torch compute with so many threads (None: one a core) and return how many.

    It holds for the calling thread, and for threads that use torch for the first time afterwards.
    """
    chosen = num_threads or count_cores()
    torch.set_num_threads(chosen)
    return chosen


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch's says that a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)
    )


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw torch's random numbers from `seed` inside the block, and leave the global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast could use on the device, None if it can use none; `measure_autocast` tells if it helps.

    float16 is left out: it would need loss scaling.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return torch.bfloat16


def measure_autocast(
    loss: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, batch: Tensor, device: torch.device
) -> torch.dtype | None:
    """The autocast dtype if forward and backward are at least a tenth faster with it, else None.

    One warm-up and up to three timed passes each, alternately, within about a second. Parameters are left as they were
    and gradients are cleared.
    """
    dtype = autocast_dtype(device)
    if dtype is None:
        return None
    best_s = {False: float("inf"), True: float("inf")}
    started_s = time.perf_counter()
    with seeded(device, 0):
        for turn in range(4):
            for enabled in (False, True):
                try:
                    elapsed_s = time_pass(loss, model, batch, device, dtype if enabled else None)
                except (RuntimeError, NotImplementedError):  # an operation that lacks the dtype on this device
                    if enabled:
                        return None
                    raise
                if turn > 0:
                    best_s[enabled] = min(best_s[enabled], elapsed_s)
            if turn > 0 and time.perf_counter() - started_s > _MEASURE_BUDGET_S:
                break
    return dtype if best_s[True] <= _AUTOCAST_GAIN * best_s[False] else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype` on the device; None: compute in the parameters' own dtype."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def time_pass(
    loss: Callable[[nn.Module, Tensor], Tensor],
    model: nn.Module,
    batch: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
) -> float:
    """Seconds of a forward and backward pass, gradients cleared after it."""
    started_s = time.perf_counter()
    try:
        with autocast(device, dtype):
            value = loss(model, batch)
        value.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        synchronize(device)
    finally:
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - started_s


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def give_memory_back() -> None:
    """Return what was freed to the system: glibc keeps it otherwise, some 70 MB after `measure_autocast`."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _processor_name() -> str:
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2]
    return platform.processor() or platform.machine() or "CPU"
