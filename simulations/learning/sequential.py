"""One peer after the other, each with worker.trainer.Trainer: what the other backends are checked against.

One trainer serves all peers; the state of each peer's inner optimizer waits in a file of its own.
"""

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from protocol.errors import DivergedError
from protocol.parameters import count_parameters
from protocol.signing import sha256_hex
from simulations.learning.backend import Job, Merge, Trained, Vector
from simulations.learning.problem import Problem
from worker.optimizers import InnerOptimizer, build_optimizer
from worker.tasks import Task
from worker.trainer import LeaseResult, Trainer

CHUNK = 16  # pseudo-gradients that are held at a time


class SequentialBackend:
    """See simulations.learning.backend.Backend."""

    def __init__(self, problem: Problem, *, device: torch.device) -> None:
        self.chunk = CHUNK
        self._problem = problem
        self._device = device
        task = cast(Task, problem.task)  # of which the trainer uses no more than LearningTask has
        self._trainer = Trainer(problem.spec, problem.data.vocabulary_size, device, task=task)
        self._folder = tempfile.TemporaryDirectory()
        weakref.finalize(self, self._folder.cleanup)

    def train(self, starts: Vector, jobs: Sequence[Job], merge: Merge | None = None) -> Trained:
        """See Backend."""
        shape = (len(jobs), count_parameters(self._trainer.model))
        pairs = zip(np.broadcast_to(starts, shape), jobs, strict=True)
        results = [self._train(start, job, merge if job.turns else None) for start, job in pairs]
        return Trained(
            pseudo_gradients=np.stack([result.pseudo_gradient for result in results]),
            mean_losses=np.array([result.mean_loss for result in results]),
        )

    def forget(self, peer: str) -> None:
        """See Backend."""
        self._path(peer).unlink(missing_ok=True)

    def _train(self, start: Vector, job: Job, merge: Merge | None) -> LeaseResult:
        trainer, path = self._trainer, self._path(job.peer)
        trainer.optimizer = self._new_optimizer()
        keeps_state = self._problem.optimizer != "sgd"
        if keeps_state and path.exists():
            trainer.optimizer.load(path)
        if merge is not None:
            trainer.optimizer.turn_momentum(merge.moved, merge.rate_sum)
        try:
            result = trainer.run_lease(
                start,
                [self._problem.data.shards[index].astype(np.int64) for index in job.shards],
                tokens_before=job.tokens_before,
                round_tokens=job.round_tokens,
                lease_tokens=job.lease_tokens,
                highest_rate=job.highest_rate,
                should_stop=lambda: False,
                on_step=lambda _: None,
            )
        except DivergedError as error:
            raise DivergedError(f"{job.peer}: {error}") from error
        if keeps_state:
            trainer.optimizer.save(path)
        return result

    def _new_optimizer(self) -> InnerOptimizer:
        model, name = self._trainer.model, self._problem.optimizer
        if name == "sgd":
            return InnerOptimizer([torch.optim.SGD(model.parameters())], model)
        return build_optimizer(model, self._problem.spec.train, name)

    def _path(self, peer: str) -> Path:
        return Path(self._folder.name) / f"{sha256_hex(peer.encode())}.safetensors"

    def __getstate__(self) -> dict[str, Any]:
        files = {path.name: path.read_bytes() for path in Path(self._folder.name).iterdir()}
        return {"problem": self._problem, "device": self._device, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.pop("files")
        SequentialBackend.__init__(self, **state)
        for name, data in files.items():
            (Path(self._folder.name) / name).write_bytes(data)
