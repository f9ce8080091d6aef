"""Makes a run's initial state: a process of its own, so that the coordinator never loads torch."""

from pathlib import Path

import torch
from torch import nn

from protocol import parameters
from protocol.errors import ConfigError
from protocol.exchange.store import BlobStore
from protocol.replica import State
from protocol.run_spec import RunSpec
from worker.tasks import TASKS, Task


def initialize_model(spec: RunSpec, vocabulary_size: int, blobs: Path) -> dict[str, object]:
    """Build the model of `spec`, put its state and its config into the store at `blobs`, and say what they are.

    Raises ConfigError when there is no such model, or it cannot compute a loss.
    """
    task = TASKS["causal_lm"]
    model = task.build_model(spec, vocabulary_size, spec.seed)
    _try_once(task, model, spec.data.sequence_length)
    state = State(0, parameters.flatten(model))
    store = BlobStore(blobs)
    return {
        "num_parameters": state.theta.size,
        "digest": store.put(state.to_bytes()),
        "config_hash": store.put(task.config_json(model)),
    }


def _try_once(task: Task, model: nn.Module, sequence_length: int) -> None:
    """Some configs build a model that fails when it is used; better here than on every volunteer's machine."""
    try:
        with torch.no_grad():
            loss = task.loss(model, torch.zeros((1, sequence_length + 1), dtype=torch.int64))
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.config describes a model that does not run: {reason}") from error
    if not torch.isfinite(loss):
        raise ConfigError("model.config describes a model whose first loss is not finite")
