"""What an inner step is; one module a task.

A worker runs only the tasks installed on it: no code comes over the wire.
"""

from typing import Protocol

from torch import Tensor, nn

from protocol.run_spec import RunSpec
from worker.tasks.causal_lm import CausalLM


class Task(Protocol):
    """What the trainer needs to know of a task."""

    def build_model(self, spec: RunSpec, vocabulary_size: int, seed: int) -> nn.Module:
        """The model that the spec describes, float32 on the CPU; random weights depend on `seed` alone.

        Raises ConfigError when the spec describes none.
        """

    def build_from_config(self, config_json: bytes, seed: int) -> nn.Module:
        """The same from what `config_json` gave, with random weights. Raises VerificationError if that is no model."""

    def config_json(self, model: nn.Module) -> bytes:
        """What another machine needs to build this model, weights aside: canonical JSON."""

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The mean loss of int32 or int64 rows (B, T + 1), as a float32 scalar to differentiate."""


TASKS: dict[str, Task] = {"causal_lm": CausalLM()}
