"""One worker without the others: what the demo compares with. Trained for real, with the same trainer and data."""

import json
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from coordinator.run_folder import RunFolder, find_genesis
from protocol.documents import Genesis
from protocol.errors import VerificationError
from protocol.policy import choose_learning_rate
from protocol.replica import State
from protocol.run_spec import AUTO, RunSpec
from protocol.shard_format import decode_shard
from protocol.tokenizer import load_tokenizer
from worker.device import choose_device, set_threads
from worker.preparation import measure_speed
from worker.trainer import StepReport, Trainer

EVALUATION_BATCH = 32
BENCHMARK_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AloneResult:
    """How far one worker came. held_out_loss in nats a token."""

    held_out_loss: float
    seconds: float


def measure_steps_per_s(spec: RunSpec) -> float:
    """Inner steps a second of one worker with one thread."""
    set_threads(1)
    trainer = Trainer(spec, load_tokenizer(spec.data.tokenizer).vocabulary_size, choose_device("cpu"))
    return measure_speed(trainer, BENCHMARK_S).steps_per_s


def train_alone(folder: RunFolder, num_steps: int, console: Console) -> AloneResult:
    """Train from the run's initial state for `num_steps` on the run's shards, with a schedule of that length.

    Uses every core, since nothing else runs. Raises VerificationError for a run without a genesis.
    """
    database = folder.open_database(folder.spec())
    signed = find_genesis(database)
    database.close()
    if signed is None:
        raise VerificationError(f"{folder.path} was never prepared")
    genesis = Genesis.model_validate_json(signed.body)
    spec = genesis.spec.model_copy(
        update={"train": genesis.spec.train.model_copy(update={"tokens": num_steps * genesis.spec.step_tokens})}
    )
    train = spec.train
    highest_rate = None
    if train.learning_rate == AUTO:
        highest_rate = choose_learning_rate(
            train.first_optimizer, num_parameters=genesis.num_parameters, run_steps=num_steps, workers=1
        )
    store = folder.store
    set_threads()
    trainer = Trainer(spec, genesis.vocabulary_size, choose_device("cpu"))
    hashes: list[str] = json.loads(store.read(genesis.shard_index_hash))
    num_shards = -(-num_steps // spec.data.shard_steps)
    shards = [
        decode_shard(store.read(hashes[index % len(hashes)]), genesis.vocabulary_size) for index in range(num_shards)
    ]
    state = State.from_bytes(store.read(genesis.initial_digest), 0, genesis.num_parameters, has_momentum=False)
    started = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("the fastest worker alone, for comparison", total=num_steps)

        def show(step: StepReport) -> None:
            progress.update(task, completed=step.inner_step)

        result = trainer.run_lease(
            state.theta,
            shards,
            tokens_before=0,
            round_tokens=spec.train.tokens,
            lease_tokens=spec.train.tokens,
            highest_rate=highest_rate,
            should_stop=lambda: False,
            on_step=show,
        )
    rows = decode_shard(store.read(genesis.held_out_hash), genesis.vocabulary_size)
    loss = trainer.evaluate(state.theta - result.pseudo_gradient, rows, EVALUATION_BATCH)
    return AloneResult(held_out_loss=loss, seconds=time.monotonic() - started)
