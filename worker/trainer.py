"""Trainer: the inner steps of a lease, and evaluation.

Invariants: the model is scratch, the state that peers agree on is θ, handed in with every lease; the inner optimizer's
state stays from lease to lease. Given the same θ, optimizer state, shards and number of threads on the same machine, a
lease gives the same pseudo-gradient bit for bit; the random numbers of dropout follow from the shards. Only whole
shards count as done, but the steps made in a shard that was cut short do shape the pseudo-gradient.

It runs in one plain thread (calls must not overlap), touches no asyncio, and does not decide when to compute.

Shape letters: B sequences in an inner step, R sequences in a shard, T tokens a sequence, D parameters.
"""

import math
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol import parameters
from protocol.errors import DeviceMemoryError, DivergedError, VerificationError
from protocol.run_spec import RunSpec
from worker.compiling import Loss, describe_failure
from worker.device import autocast, is_out_of_memory, seeded, synchronize
from worker.optimizers import InnerOptimizer, build_optimizer, learning_rate_at
from worker.tasks import TASKS, Task

log = structlog.get_logger()
_MAX_BAD_STEPS = 3  # in a row
_DIVERGED = "the lease gave no finite result; lower train.learning_rate"
_SLEEP_S = 0.1  # a throttled worker looks this often whether it should stop


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One inner step, just made. loss in nats a token; both it and the norm may be NaN when the step was skipped."""

    inner_step: int  # from 1
    num_inner_steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: bool
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What inner steps came to. Losses are in nats a token, NaN when no step was made."""

    shards_done: int
    inner_steps: int  # made, those in an unfinished shard included
    tokens: int  # of whole shards
    mean_loss: float
    last_loss: float
    compute_s: float
    steps_per_s: float  # by the wall clock: throttled when the worker is


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseResult(TrainResult):
    """What a lease came to."""

    pseudo_gradient: NDArray[np.float32]  # (D,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One inner step, alone. skipped: without a finite loss and gradient the parameters stay as they were."""

    loss: float
    gradient_norm: float
    skipped: bool
    compute_s: float
    update_s: float  # of it, the optimizer's update


class Trainer:
    """A model, its inner optimizer, and the device they live on.

    micro_batch: sequences computed at once, at most; it is halved whenever memory runs out. model_config: what the
    task's `config_json` gave on another machine, used in place of `spec.model`, whose initial weights are only there.
    Raises ConfigError or VerificationError when there is no such model.
    """

    def __init__(
        self,
        spec: RunSpec,
        vocabulary_size: int,
        device: torch.device,
        *,
        micro_batch: int | None = None,
        model_config: bytes | None = None,
        task: Task = TASKS["causal_lm"],
    ) -> None:
        self.spec = spec
        self.task = task
        self.device = device
        self.vocabulary_size = vocabulary_size
        self.micro_batch = min(micro_batch or spec.train.batch_sequences, spec.train.batch_sequences)
        self.autocast_dtype: torch.dtype | None = None
        self.compiled_loss: Loss | None = None
        if model_config is None:
            model = task.build_model(spec, vocabulary_size, spec.seed)
        else:
            model = task.build_from_config(model_config, spec.seed)
        self.model = model.to(device)
        self.optimizer_name: str = spec.train.first_optimizer
        self.optimizer = build_optimizer(self.model, spec.train)

    def use_optimizer(self, name: str) -> None:
        """Go on with this inner optimizer; another one than now begins without state. Raises ConfigError."""
        if name != self.optimizer_name:
            self.optimizer = build_optimizer(self.model, self.spec.train, name)
            self.optimizer_name = name

    @property
    def num_parameters(self) -> int:
        """D."""
        return parameters.count_parameters(self.model)

    def run_lease(
        self,
        theta: NDArray[np.float32],
        shards: Sequence[NDArray[np.int64]],
        *,
        tokens_before: int,
        round_tokens: int,
        lease_tokens: int,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
        throttle: float = 1.0,
        highest_rate: float | None = None,
    ) -> LeaseResult:
        """Train from θ, float32 (D,), on the lease's shards, each int64 (R, T + 1) with R = shard_steps · B.

        tokens_before, round_tokens: where the run stands and what all peers train in this round; the learning rate
        moves through it as this lease moves through its `lease_tokens`. should_stop is asked before every step and
        while sleeping. throttle: the share of the time, in (0, 1], to compute; the rest is slept. highest_rate: of the
        schedule, None where the run's own holds.

        Raises VerificationError when θ or a shard does not fit the run, DivergedError after three steps in a row, or
        a whole lease, without a finite loss and gradient, DeviceMemoryError when one sequence is too much.
        """
        parameters.assign(self.model, theta)
        result = self.train(
            shards,
            tokens_before=tokens_before,
            round_tokens=round_tokens,
            lease_tokens=lease_tokens,
            should_stop=should_stop,
            on_step=on_step,
            throttle=throttle,
            highest_rate=highest_rate,
        )
        delta = parameters.pseudo_gradient(theta, self.model)
        if not np.isfinite(delta).all():
            raise DivergedError(_DIVERGED)
        return LeaseResult(**asdict(result), pseudo_gradient=delta)

    def train(
        self,
        shards: Sequence[NDArray[np.int64]],
        *,
        tokens_before: int,
        round_tokens: int,
        lease_tokens: int,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
        throttle: float = 1.0,
        steps_done: int = 0,
        highest_rate: float | None = None,
    ) -> TrainResult:
        """Train from where the model stands, else as `run_lease`; the model is left where it has come to.

        steps_done: inner steps of these shards that were made before; they are counted, but not made again.
        """
        if not 0.0 < throttle <= 1.0:
            raise ValueError(f"throttle is a share of the time above 0 and at most 1, not {throttle}")
        batches = self._cut(shards)
        self.model.train()

        def learning_rate(steps_done: int) -> float:
            share = min(1.0, (steps_done + 0.5) * self.spec.step_tokens / max(lease_tokens, 1))
            return learning_rate_at(tokens_before + round_tokens * share, self.spec, highest_rate)

        started_s = time.perf_counter()
        with seeded(self.device, _hash(shards)):
            progress = _Progress(steps=steps_done)
            self._train(progress, batches, learning_rate, should_stop, on_step, 1.0 / throttle - 1.0)
        self.optimizer.zero_grad()  # not after each step: the C library would give the memory back, and get it anew
        return self._conclude(progress, progress.steps - steps_done, time.perf_counter() - started_s)

    def evaluate(self, theta: NDArray[np.float32] | None, rows: NDArray[np.int64], batch: int) -> float:
        """The mean loss in nats a token of int64 rows (N, T + 1), `batch` at a time, without dropout, in float32.

        θ None: of the model as it is; else θ is put into the model and stays there. Raises VerificationError when θ
        does not fit, ValueError without rows.
        """
        if len(rows) == 0 or batch < 1:
            raise ValueError("evaluation needs at least one row and a batch of at least one")
        if theta is not None:
            parameters.assign(self.model, theta)
        was_training = self.model.training
        self.model.eval()
        total = 0.0
        try:
            with torch.no_grad():
                for start in range(0, len(rows), batch):
                    part = self._to_device(rows[start : start + batch])
                    total += self.task.loss(self.model, part).item() * len(part)
        finally:
            self.model.train(was_training)
        return total / len(rows)

    def _train(
        self,
        progress: "_Progress",
        batches: Sequence[Tensor],
        learning_rate: Callable[[int], float],
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
        sleep_per_compute: float,
    ) -> None:
        for batch in batches[progress.steps :]:
            if should_stop():
                break
            rate = learning_rate(progress.steps)
            step = self.make_step(batch, self.optimizer, rate)
            progress.add(step)
            on_step(
                StepReport(
                    inner_step=progress.steps,
                    num_inner_steps=len(batches),
                    loss=step.loss,
                    gradient_norm=step.gradient_norm,
                    learning_rate=rate,
                    skipped=step.skipped,
                    compute_s=step.compute_s,
                )
            )
            _sleep(step.compute_s * sleep_per_compute, should_stop)

    def make_step(self, rows: Tensor, optimizer: InnerOptimizer, learning_rate: float) -> Step:
        """One inner step on rows (B, T + 1). Raises DeviceMemoryError."""
        started_s = time.perf_counter()
        loss, norm = self._compute_gradient(rows, optimizer)
        updating_s = time.perf_counter()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            try:
                optimizer.step(learning_rate)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise DeviceMemoryError(f"{self.device} has no room for the optimizer's state") from error
                raise
        synchronize(self.device)
        now_s = time.perf_counter()
        return Step(
            loss=loss,
            gradient_norm=norm,
            skipped=skipped,
            compute_s=now_s - started_s,
            update_s=now_s - updating_s,
        )

    def _compute_gradient(self, rows: Tensor, optimizer: InnerOptimizer) -> tuple[float, float]:
        while True:
            optimizer.zero_grad()
            try:
                return self._accumulate(rows)
            except Exception as error:  # a compiler's may be any
                if self.compiled_loss is not None and not is_out_of_memory(error):
                    log.warning("the model is no longer compiled", reason=describe_failure(error))
                    self.compiled_loss = None
                    continue
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch == 1:
                    message = f"{self.device} has no room for one sequence of {rows.shape[1] - 1} tokens"
                    raise DeviceMemoryError(message) from error
            # outside the handler, which keeps the failed pass's tensors alive
            self.micro_batch = max(1, self.micro_batch // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, rows: Tensor) -> tuple[float, float]:
        total = torch.zeros((), device=self.device)
        compute_loss = self.compiled_loss or self.task.loss
        for part in torch.split(rows, self.micro_batch):
            with autocast(self.device, self.autocast_dtype):
                loss = compute_loss(self.model, part) * (len(part) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.train.gradient_clip)
        return total.item(), norm.item()

    def _conclude(self, progress: "_Progress", steps_now: int, wall_s: float) -> TrainResult:
        if steps_now and not progress.losses:
            raise DivergedError(_DIVERGED)
        shards_done = progress.steps // self.spec.data.shard_steps
        return TrainResult(
            shards_done=shards_done,
            inner_steps=progress.steps,
            tokens=shards_done * self.spec.shard_tokens,
            mean_loss=statistics.fmean(progress.losses) if progress.losses else math.nan,
            last_loss=progress.losses[-1] if progress.losses else math.nan,
            compute_s=progress.compute_s,
            steps_per_s=steps_now / wall_s if steps_now else 0.0,
        )

    def _cut(self, shards: Sequence[NDArray[np.int64]]) -> list[Tensor]:
        """The shards' rows as one tensor (B, T + 1) an inner step."""
        batch = self.spec.train.batch_sequences
        expected = (self.spec.data.shard_steps * batch, self.spec.data.sequence_length + 1)
        for shard in shards:
            if shard.shape != expected:
                raise VerificationError(f"a shard of shape {shard.shape}; this run's have {expected}")
        return [part for shard in shards for part in torch.split(self._to_device(shard), batch)]

    def _to_device(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)


@dataclass(slots=True)
class _Progress:
    """What the steps of a lease came to so far."""

    steps: int = 0
    compute_s: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps that were not skipped
    bad_steps: int = 0  # in a row

    def add(self, step: Step) -> None:
        self.steps += 1
        self.compute_s += step.compute_s
        if not step.skipped:
            self.losses.append(step.loss)
            self.bad_steps = 0
            return
        self.bad_steps += 1
        if self.bad_steps == _MAX_BAD_STEPS:
            raise DivergedError(
                f"{self.bad_steps} steps in a row gave a loss of {step.loss}; lower train.learning_rate"
            )


def _hash(shards: Sequence[NDArray[np.int64]]) -> int:
    checksum = 0
    for shard in shards:
        checksum = zlib.crc32(np.ascontiguousarray(shard).data, checksum)
    return checksum


def _sleep(duration_s: float, should_stop: Callable[[], bool]) -> None:
    deadline_s = time.perf_counter() + duration_s
    while (left_s := deadline_s - time.perf_counter()) > 0 and not should_stop():
        time.sleep(min(left_s, _SLEEP_S))
