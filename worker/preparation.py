"""Before a worker's first lease: the run's model is built here, what helps on this machine is chosen, it is timed."""

import torch

from protocol.documents import Genesis
from protocol.errors import VerificationError
from worker.governor.preferences import CompileMode
from worker.trainer import Speed, Trainer

BENCHMARK_S = 1.0


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
    trainer.tune(compile_mode)
    return trainer, trainer.benchmark(BENCHMARK_S)
