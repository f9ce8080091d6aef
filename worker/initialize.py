"""Makes a run's initial state: a process of its own, so that the coordinator never loads torch."""

from pathlib import Path

from protocol import parameters
from protocol.exchange.store import BlobStore
from protocol.replica import State
from protocol.run_spec import RunSpec
from worker.tasks import TASKS


def initialize_model(spec: RunSpec, vocabulary_size: int, blobs: Path) -> dict[str, object]:
    """Build the model of `spec`, put its state and its config into the store at `blobs`, and say what they are.

    Raises ConfigError when there is no such model.
    """
    task = TASKS["causal_lm"]
    model = task.build_model(spec, vocabulary_size, spec.seed)
    state = State(0, parameters.flatten(model))
    store = BlobStore(blobs)
    return {
        "num_parameters": state.theta.size,
        "digest": store.put(state.to_bytes()),
        "config_hash": store.put(task.config_json(model)),
    }
