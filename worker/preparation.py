"""Before a worker's first lease: the run's model is built here, what helps on this machine is chosen, it is timed."""

import math
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from protocol.documents import Genesis
from protocol.errors import VerificationError
from worker.compiling import choose_loss
from worker.device import measure_autocast, seeded
from worker.governor.preferences import CompileMode
from worker.optimizers import build_optimizer
from worker.trainer import Step, Trainer

BENCHMARK_S = 1.0
_STEPS_IF_AUTO = 100  # of a lease whose length follows the links, about


class Speed(NamedTuple):
    """Inner steps a second, and the share of a step's time that the optimizer's update takes."""

    steps_per_s: float
    optimizer_share: float


def prepare_trainer(
    genesis: Genesis, model_config: bytes, device: torch.device, compile_mode: CompileMode
) -> tuple[Trainer, Speed]:
    """The run's trainer, and how fast it is here.

    Raises VerificationError when the run's config gives another model here, DeviceMemoryError.
    """
    trainer = Trainer(genesis.spec, genesis.vocabulary_size, device, model_config=model_config)
    if trainer.num_parameters != genesis.num_parameters:
        raise VerificationError(
            f"the run's model has {genesis.num_parameters} parameters, the one that its config gives here "
            f"{trainer.num_parameters}"
        )
    tune(trainer, compile_mode)
    return trainer, measure_speed(trainer, BENCHMARK_S)


def tune(trainer: Trainer, compile_mode: CompileMode = "off") -> None:
    """Turn bfloat16 autocast on if it is faster here, off if not, and compile the model by the mode."""
    spec, loss = trainer.spec, trainer.task.loss
    trainer.model.train()
    batch = _random_rows(trainer, trainer.micro_batch)
    trainer.autocast_dtype = measure_autocast(loss, trainer.model, batch, trainer.device)
    steps = spec.round.inner_steps
    passes = math.ceil(spec.train.batch_sequences / trainer.micro_batch)
    passes *= steps if isinstance(steps, int) else _STEPS_IF_AUTO
    trainer.compiled_loss = choose_loss(
        compile_mode, loss, trainer.model, batch, trainer.device, trainer.autocast_dtype, passes
    )


def measure_speed(trainer: Trainer, seconds: float) -> Speed:
    """On random tokens: the median step of about so many seconds, after a warm-up step.

    Parameters and optimizer state are left as they were: the steps are made by a passing optimizer of the same kind at
    learning rate 0. Raises DeviceMemoryError.
    """
    scratch = build_optimizer(trainer.model, trainer.spec.train, trainer.optimizer_name)
    rows = _random_rows(trainer, trainer.spec.train.batch_sequences)
    trainer.model.train()
    steps: list[Step] = []
    with seeded(trainer.device, 0):
        trainer.make_step(rows, scratch, 0.0)
        deadline_s = time.perf_counter() + seconds
        while len(steps) < 2 or time.perf_counter() < deadline_s:
            steps.append(trainer.make_step(rows, scratch, 0.0))
    scratch.zero_grad()
    step_s = statistics.median(step.compute_s for step in steps)
    return Speed(1.0 / step_s, statistics.median(step.update_s / step.compute_s for step in steps))


def _random_rows(trainer: Trainer, num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, trainer.spec.data.sequence_length + 1)
    return torch.randint(trainer.vocabulary_size, shape, generator=generator).to(trainer.device)
