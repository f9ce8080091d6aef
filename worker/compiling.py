"""torch.compile where it pays: measured, not assumed, and never a reason for a worker to fail.

Compiling needs a C++ compiler on a CPU and Triton on CUDA, and takes from seconds to minutes at the start of a worker,
whose memory grows by some 150 MB. `auto` tries it only where a lease is long, and takes it when the time that it saves
in one lease is more than compiling took; `on` takes it wherever it works; `off` leaves torch's compiler alone. Whatever
goes wrong, then or later, the loss is computed as ever and the log says why.
"""

import importlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from worker.device import time_pass
from worker.governor.preferences import CompileMode

log = structlog.get_logger()
Loss = Callable[[nn.Module, Tensor], Tensor]
TRIED_FROM_S = 120.0  # `auto` leaves shorter leases alone: compiling takes about a minute
NUM_PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of compiling. Seconds of a forward and backward pass, compiled and not; compile_s: of the first one."""

    compiled: Loss | None = None
    problem: str = ""
    compile_s: float = 0.0
    plain_s: float = 0.0
    compiled_s: float = 0.0


def find_obstacle(device: torch.device) -> str:
    """Why nothing can be compiled for the device on this machine, in words; empty when nothing is known to be amiss."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"
    if device.type != "cpu":
        return f"torch does not compile for {device.type} well"
    if sys.platform == "win32":
        return "on Windows torch needs Visual C++ in its environment"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    return "" if shutil.which(compiler) is not None else f"there is no C++ compiler ({compiler})"


def choose_loss(
    mode: CompileMode,
    loss: Loss,
    model: nn.Module,
    batch: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    lease_passes: int,
) -> Loss | None:
    """The compiled loss if the mode asks for it and it works, or pays; else None, and the log says why.

    batch: rows as `loss` takes them, of the size that will be computed. lease_passes: such passes in a lease.
    Parameters are left as they were and gradients are cleared.
    """
    if mode == "off":
        return None
    why_not = find_obstacle(device)
    if mode == "auto" and not why_not:
        time_pass(loss, model, batch, device, dtype)  # the first one takes longer
        lease_s = lease_passes * time_pass(loss, model, batch, device, dtype)
        why_not = f"a lease takes {lease_s:.0f} s, too short to pay for compiling" if lease_s < TRIED_FROM_S else ""
    trial = Trial(problem=why_not) if why_not else try_compiling(loss, model, batch, device, dtype)
    saved_s = lease_passes * (trial.plain_s - trial.compiled_s)
    pays = trial.compiled is not None and (mode == "on" or saved_s > trial.compile_s)
    log.info(
        "the model is compiled" if pays else "the model is not compiled",
        reason=trial.problem or f"it saves {saved_s:.0f} s a lease",
        compile_s=round(trial.compile_s, 1),
        plain_s=round(trial.plain_s, 4),
        compiled_s=round(trial.compiled_s, 4),
    )
    return trial.compiled if pays else None


def try_compiling(
    loss: Loss, model: nn.Module, batch: Tensor, device: torch.device, dtype: torch.dtype | None
) -> Trial:
    """Compile, and measure it against the plain loss, alternately. Raises what the plain loss raises."""
    try:
        # in this process alone: torch would start one for every core, and keep them
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.compile_threads = 1
        compiled: Loss = torch.compile(loss, dynamic=False)
        started_s = time.perf_counter()
        time_pass(compiled, model, batch, device, dtype)
        compile_s = time.perf_counter() - started_s
    except Exception as error:  # compilers raise anything
        return Trial(problem=describe_failure(error))
    plain_s, compiled_s = float("inf"), float("inf")
    for _ in range(NUM_PASSES):
        plain_s = min(plain_s, time_pass(loss, model, batch, device, dtype))
        compiled_s = min(compiled_s, time_pass(compiled, model, batch, device, dtype))
    return Trial(compiled=compiled, compile_s=compile_s, plain_s=plain_s, compiled_s=compiled_s)


def describe_failure(error: Exception) -> str:
    """The first line of what a compiler raised, whose texts run over pages."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
