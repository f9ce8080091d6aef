"""All peers of a chunk at once: torch.func.vmap over the peers, on one flat row of parameters each.

The step of a small model is a few dozen tiny operations, and vmap's own work costs more than they do. So the batched
step is recorded once for every number of peers (simulations.learning.record) and the record is run; a model that
cannot be recorded, because it looks at its numbers on the way, goes through vmap every time. Chunks are padded to few
different sizes, so that few records are made.

With Muon two GPU backends do not agree for long: its bfloat16 turns differences of 1e-7 into ones of 1e-3, and so does
the worker's trainer when its own start is moved by as little. On equal gradients the steps are equal.

Peers make different numbers of inner steps: they are sorted, most steps first, so that those who still have steps to
make come first, and the others' rows are not touched any more.

Invariants: results do not depend on what was computed before; dropout's random numbers follow from the jobs.

Shape letters: P peers, D parameters, S inner steps, B sequences in a step, C columns.
"""

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from protocol.errors import DivergedError
from protocol.parameters import count_parameters, parameter_layout
from simulations.learning.backend import Job, Merge, Trained, Vector, learning_rates
from simulations.learning.inner import StackedOptimizer
from simulations.learning.problem import Problem
from simulations.learning.record import Step, draws_numbers, record_step
from simulations.learning.stores import PeerVectors
from worker.device import seeded

MEMORY_BYTES = 1 << 29  # that the tensors of a chunk may take, unless a chunk is given
CACHE_BYTES = 1 << 26  # on a CPU more peers at once are no faster, unless there are
CACHE_PEERS = 8  # fewer than so many
MAX_CHUNK = 4096
MAX_BAD_STEPS = 3  # in a row, as in worker.trainer
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class BatchedBackend:
    """See simulations.learning.backend.Backend. chunk 0: what fits into `memory_bytes`."""

    def __init__(
        self, problem: Problem, *, chunk: int = 0, device: torch.device, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._problem = problem
        self._device = device
        model: Any = problem.build_model().to(device).train()
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")  # vmap has no rule for the backward pass of the fused one on CPUs
        self._vmapped = _batch_step(problem, model)
        self._recorded: dict[int, Step] = {}
        self._can_record = True
        self._is_random = True  # until a record shows that it is not
        self._gradients = torch.empty(0)
        self._num_parameters = count_parameters(model)
        self._clip = problem.spec.train.gradient_clip
        self._optimizer = StackedOptimizer(problem.optimizer, model, problem.spec.train)
        self._states = PeerVectors(self._optimizer.state_size)
        self.chunk = chunk or self._fit_chunk(model, memory_bytes)

    def train(self, starts: Vector, jobs: Sequence[Job], merge: Merge | None = None) -> Trained:
        """See Backend."""
        order = sorted(range(len(jobs)), key=lambda place: -len(jobs[place].shards))
        ordered = [jobs[place] for place in order]
        with torch.no_grad(), seeded(self._device, _seed(ordered)) if self._is_random else nullcontext():
            starts_pd = self._to_device(starts if starts.ndim == 1 else starts[order])
            ends_pd, losses_sp = self._make_steps(starts_pd, ordered, merge)
            gradients_pd = torch.sub(starts_pd, ends_pd, out=ends_pd).cpu().numpy()
        means = _mean_losses(losses_sp, ordered)
        if not np.isfinite(gradients_pd).all():
            raise DivergedError("the lease of a peer gave no finite result; lower train.learning_rate")
        if order == sorted(order):
            return Trained(pseudo_gradients=gradients_pd, mean_losses=means)
        back = np.argsort(order)
        return Trained(pseudo_gradients=gradients_pd[back], mean_losses=means[back])

    def forget(self, peer: str) -> None:
        """See Backend."""
        self._states.clear(peer)

    def _make_steps(
        self, starts: Tensor, jobs: Sequence[Job], merge: Merge | None
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """Where the jobs' peers end, (P, D), and the loss of every step, (S, P), NaN where none was made.

        jobs: those with most steps first.
        """
        spec, num_peers = self._problem.spec, len(jobs)
        counts = np.array([len(job.shards) for job in jobs]) * spec.data.shard_steps
        num_steps = int(counts[0])
        num_active = (counts > np.arange(num_steps)[:, None]).sum(axis=1).tolist()
        rows = self._gather_rows(jobs)
        rates = self._to_device(self._gather_rates(jobs, num_steps))
        parameters = self._pad(starts.expand(num_peers, -1))
        peers = [job.peer for job in jobs]
        state = self._to_device(self._states.read(peers))
        if merge is not None:
            turning = torch.tensor([job.turns for job in jobs], device=self._device)
            turned = state[turning]
            self._optimizer.turn_momentum(turned, self._to_device(merge.moved), merge.rate_sum)
            state[turning] = turned
        losses = np.full((num_steps, num_peers), np.nan)
        for step, active in enumerate(num_active):
            gradients, loss = self._compute(parameters, rows(step), active)
            losses[step, :active] = self._update(
                parameters[:active], gradients, loss, state[:active], rates[step, :active]
            )
            if step + 1 >= MAX_BAD_STEPS:
                bad = np.isnan(losses[step + 1 - MAX_BAD_STEPS : step + 1, :active]).all(axis=0)
                if bad.any():
                    raise DivergedError(f"{peers[int(bad.argmax())]} came to no finite loss; lower train.learning_rate")
        if self._optimizer.state_size:
            self._states.write(peers, state.cpu().numpy())
        return parameters[:num_peers], losses

    def _update(
        self, parameters: Tensor, gradients: Tensor, losses: Tensor, state: Tensor, rates: Tensor
    ) -> NDArray[np.float32]:
        """Clip and step, in place, where loss and gradient are finite; returns the losses, (P,), NaN elsewhere."""
        norms = torch.linalg.vector_norm(gradients, dim=1)
        losses_p, norms_p = torch.stack((losses, norms)).cpu().numpy()  # waits for a GPU once
        is_good: NDArray[np.bool_] = np.isfinite(losses_p) & np.isfinite(norms_p)
        if (norms_p > self._clip - _CLIP_EPSILON).any():
            gradients.mul_((self._clip / (norms + _CLIP_EPSILON)).clamp_(max=1.0)[:, None])
        if is_good.all():
            self._optimizer.step(parameters, gradients, state, rates)
        else:
            where = torch.from_numpy(is_good.nonzero()[0]).to(self._device)
            some, some_state = parameters[where], state[where]
            self._optimizer.step(some, gradients[where], some_state, rates[where])
            parameters[where], state[where] = some, some_state
        return np.where(is_good, losses_p, np.nan)

    def _compute(self, parameters: Tensor, rows: Tensor, active: int) -> tuple[Tensor, Tensor]:
        """The gradients (P, D) and losses (P,) of the first `active` peers' rows, (*, B, C)."""
        size = _padded(active) if self._can_record else active
        parameters, rows = parameters[:size], rows[:size]
        if self._can_record and size not in self._recorded:
            with seeded(self._device, 0):  # recording draws random numbers, which are not the step's
                record = record_step(self._vmapped, parameters, rows)
            if record is None:
                self._can_record = False
            else:  # `forward`: without a module's checks
                self._recorded[size] = torch.inference_mode()(record.forward)
                self._is_random = draws_numbers(record)
        gradients, losses = self._recorded.get(size, self._vmapped)(parameters, rows)
        if not isinstance(gradients, Tensor):  # put together in memory that is there: new memory would cost more
            if len(self._gradients) < size:
                self._gradients = parameters.new_empty(parameters.shape)
            gradients = torch.cat(list(gradients), dim=1, out=self._gradients[:size])
        return gradients[:active], losses[:active]

    def _gather_rows(self, jobs: Sequence[Job]) -> Callable[[int], Tensor]:
        """A step's rows, int32 (P, B, C); some are never used: where a peer makes no step, and what `_pad` adds."""
        spec, shards = self._problem.spec, self._problem.data.shards
        by_step = shards.reshape(len(shards), spec.data.shard_steps, spec.train.batch_sequences, -1)
        places = np.zeros((_padded(len(jobs)), len(jobs[0].shards)), np.int64)
        for place, job in enumerate(jobs):
            places[place, : len(job.shards)] = job.shards

        def gather(step: int) -> Tensor:
            shard, part = divmod(step, spec.data.shard_steps)
            return torch.from_numpy(by_step[places[:, shard], part]).to(self._device)

        return gather

    def _pad(self, parameters: Tensor) -> Tensor:
        """A copy with rows more, so that a recorded step of any number of peers finds as many rows as it takes."""
        padded = parameters.new_empty(_padded(len(parameters)), self._num_parameters)
        padded[: len(parameters)] = parameters
        padded[len(parameters) :] = 0.0
        return padded

    def _gather_rates(self, jobs: Sequence[Job], num_steps: int) -> Vector:
        """float32 (S, P, 1). Most peers of a round share their rates, which are computed once."""
        alike: dict[tuple[float | None, ...], list[int]] = {}
        for place, job in enumerate(jobs):
            key = (len(job.shards), job.tokens_before, job.round_tokens, job.lease_tokens, job.highest_rate)
            alike.setdefault(key, []).append(place)
        rates = np.zeros((num_steps, len(jobs), 1), np.float32)
        for places in alike.values():
            known = learning_rates(jobs[places[0]], self._problem.spec)
            rates[: len(known), places, 0] = np.array(known, np.float32)[:, None]
        return rates

    def _fit_chunk(self, model: nn.Module, memory_bytes: int) -> int:
        spec = self._problem.spec
        rows = torch.from_numpy(self._problem.data.shards[0, : spec.train.batch_sequences]).to(self._device)
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._problem.task.loss(model, rows)
        # a row of each: start, end, gradient, two while it is updated, pseudo-gradient, error feedback
        vectors = 7 * self._num_parameters + 2 * self._optimizer.state_size
        per_peer = 4 * vectors + 2 * sum(saved.values())  # what backward passes on takes about as much again
        useful = MAX_CHUNK if self._device.type != "cpu" else max(CACHE_PEERS, CACHE_BYTES // per_peer)
        return max(1, min(MAX_CHUNK, useful, memory_bytes // per_peer))

    def _to_device(self, values: Vector) -> Tensor:
        return torch.tensor(values, device=self._device)

    def __getstate__(self) -> dict[str, Any]:
        return {"problem": self._problem, "chunk": self.chunk, "device": self._device, "states": self._states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state.pop("states")
        BatchedBackend.__init__(self, **state)
        self._states = states


class _Loss(nn.Module):
    """The task's loss as the output of a module, for `functional_call`."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._task = problem.task

    def forward(self, rows: Tensor) -> Tensor:
        return self._task.loss(self.model, rows)


def _batch_step(problem: Problem, model: nn.Module) -> Step:
    module = _Loss(problem, model)
    slots = parameter_layout(module)
    sizes = [slot.size for slot in slots]

    def loss(parameters: Tensor, rows: Tensor) -> Tensor:
        """Of one peer: parameters (D,), rows (B, C)."""
        parts = zip(slots, torch.split(parameters, sizes), strict=True)
        named = {slot.name: part.view(slot.shape) for slot, part in parts}
        value: Tensor = functional_call(module, named, (rows,))
        return value

    step: Step = vmap(grad_and_value(loss), randomness="different")
    return step


def _padded(num_peers: int) -> int:
    """At most a sixteenth more: sixteen sizes from a power of two to the next."""
    unit = 1 << max(0, num_peers.bit_length() - 5)
    return -(-num_peers // unit) * unit


def _mean_losses(losses_sp: NDArray[np.float64], jobs: Sequence[Job]) -> NDArray[np.float64]:
    made = np.isfinite(losses_sp)
    if not made.any(axis=0).all():
        peer = jobs[int(np.argmin(made.any(axis=0)))].peer
        raise DivergedError(f"the lease of {peer} gave no finite result; lower train.learning_rate")
    means: NDArray[np.float64] = np.where(made, losses_sp, 0.0).sum(axis=0) / made.sum(axis=0)
    return means


def _seed(jobs: Sequence[Job]) -> int:
    return zlib.crc32(repr([(job.peer, job.shards, job.tokens_before) for job in jobs]).encode())
