"""What computes the inner steps of many peers: the interface, and the three that implement it.

| backend | computes | for |
|---|---|---|
| batched | all peers of a chunk at once (torch.func.vmap) | small models, many peers |
| sequential | one peer after the other, with the worker's own trainer | checking the others |
| ray | batched, on the machines of a Ray cluster | more than one machine |

A peer's inner optimizer keeps its state from lease to lease, and stays with the backend.

Shape letters: P peers, D parameters, S inner steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from protocol.errors import ConfigError
from protocol.run_spec import RunSpec
from simulations.learning.problem import Problem
from worker.optimizers import learning_rate_at

Vector = NDArray[np.float32]
BackendName = Literal["batched", "sequential", "ray"]


@dataclass(slots=True, kw_only=True)  # not frozen: see coordinator.core.effects
class Job:
    """The inner steps of one peer: some whole shards (indices), the first ones of a lease.

    tokens_before, round_tokens, lease_tokens, highest_rate: as in worker.trainer.Trainer.run_lease; the learning rate
    follows.
    turns: whether its momentum is turned towards the merge first.
    """

    peer: str
    shards: tuple[int, ...]
    tokens_before: int
    round_tokens: int
    lease_tokens: int
    turns: bool = False
    highest_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """The last merge, for the peers that `turn`: see InnerOptimizer.turn_momentum."""

    moved: Vector  # (D,)
    rate_sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What jobs came to, in their order."""

    pseudo_gradients: Vector  # (P, D): where each peer started minus where it ended
    mean_losses: NDArray[np.float64]  # (P,): nats a token


class Backend(Protocol):
    """Computes jobs. The same jobs in the same chunks give the same bits. Can be pickled, with the peers' states."""

    chunk: int  # peers in one call of `train`, at most

    def train(self, starts: Vector, jobs: Sequence[Job], merge: Merge | None = None) -> Trained:
        """Train every job's peer from its row of `starts`, float32 (P, D), or all from one (D,).

        Raises DivergedError as the worker's trainer does, and names the peer.
        """

    def forget(self, peer: str) -> None:
        """Its optimizer's state is not needed any more."""


def make_backend(name: BackendName, problem: Problem, *, chunk: int = 0, device: torch.device) -> Backend:
    """The backend of that name. chunk 0: as many peers as memory allows. Raises ConfigError."""
    if name == "batched":
        from simulations.learning.batched import BatchedBackend

        return BatchedBackend(problem, chunk=chunk, device=device)
    if name == "sequential":
        from simulations.learning.sequential import SequentialBackend

        return SequentialBackend(problem, device=device)
    if name == "ray":
        from simulations.learning.ray_backend import RayBackend

        return RayBackend(problem, chunk=chunk, device=device)
    raise ConfigError(f"backend `{name}` is not one of batched, sequential, ray")


def learning_rates(job: Job, spec: RunSpec) -> tuple[float, ...]:
    """The rate of each of the job's inner steps (S,), as Trainer.run_lease uses it."""
    num_steps = len(job.shards) * spec.data.shard_steps
    shares = (min(1.0, (step + 0.5) * spec.step_tokens / max(job.lease_tokens, 1)) for step in range(num_steps))
    return tuple(
        learning_rate_at(job.tokens_before + job.round_tokens * share, spec, job.highest_rate) for share in shares
    )
