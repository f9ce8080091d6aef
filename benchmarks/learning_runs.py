"""Whole training runs on one machine, in virtual time: many workers in rounds, or one optimizer.

`train_rounds` is a run of the simulator (simulations.virtual_run): leases, plans, weights, clip factors and schedule
are those of the coordinator's core, inner steps are made by the batched backend, and error feedback, codecs, merge and
outer step are the product's own. Links have a bandwidth and a latency, and the core is told of what was measured, so
`auto` decides as in a real run. `train_single` is what that is compared with: one optimizer on one stream of batches,
alone, or as N workers that average their gradients at every step (a ring all-reduce of float32 over the same links).

The same arguments give the same bits on the same machine. Wall time plays no part in the figures.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.core.effects import GrantLease
from protocol import parameters
from protocol.run_spec import RunSpec
from simulations.learner import Work
from simulations.learning.backend import Backend, Job, make_backend
from simulations.learning.learner import TensorLearner
from simulations.learning.problem import Problem, TrainingData, make_problem
from simulations.scenario import parse_scenario
from simulations.virtual_run import VirtualRun

DEVICE = torch.device("cpu")
LATENCY_S = 0.01  # one way to the coordinator
CURVE_POINTS = 12
EVALUATION_BATCH = 64
FLOAT32_BYTES = 4
HOURS = 1000.0  # of virtual time: no run takes so long
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The workers: inner steps a second of each, and the link that each of them has, in bits a second.

    away_s: from when to when each worker is away, seconds of virtual time; without them nobody is.
    """

    steps_per_s: tuple[float, ...]
    upload_bps: float
    download_bps: float
    away_s: tuple[tuple[float, float], ...] = ()

    @property
    def size(self) -> int:
        return len(self.steps_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a run stood: seconds of virtual time, bytes that one worker had sent, held-out loss in nats a token."""

    seconds: float
    sent_bytes: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What training came to. sent_bytes: of the mean worker, for its own payloads or gradients."""

    curve: tuple[Point, ...]
    tokens: int
    rounds: int = 0
    plans: tuple[str, ...] = ()  # why codec and H were chosen, whenever they changed

    @property
    def loss(self) -> float:
        return self.curve[-1].loss

    @property
    def sent_bytes(self) -> float:
        return self.curve[-1].sent_bytes

    @property
    def seconds(self) -> float:
        return self.curve[-1].seconds


def change(spec: RunSpec, **sections: Any) -> RunSpec:
    """The spec with some values replaced: tables key by key, anything else as a whole. Checked as run.toml is."""
    values = spec.model_dump()
    for name, value in sections.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return RunSpec.model_validate(values)


def load_problem(spec: RunSpec) -> Problem:
    """The spec's text, cut as a coordinator cuts it. Raises DataError."""
    return make_problem("lm", spec)


def join_texts(problems: Sequence[Problem]) -> Problem:
    """The same run on several texts: their shards one after the other, and as much held out of each."""
    count = min(len(problem.data.shards) for problem in problems)
    held_out = min(len(problem.data.held_out) for problem in problems)
    shards = np.stack([problem.data.shards[:count] for problem in problems], axis=1)
    data = TrainingData(
        vocabulary_size=problems[0].data.vocabulary_size,
        shards=shards.reshape(-1, *shards.shape[2:]),
        held_out=np.concatenate([problem.data.held_out[:held_out] for problem in problems]),
    )
    return replace(problems[0], data=data)


def with_spec(problem: Problem, spec: RunSpec) -> Problem:
    """The same data under another spec of the same batches."""
    return replace(problem, spec=spec, optimizer=spec.train.first_optimizer)


def train_single(problem: Problem, num_workers: int, steps_per_s: float, upload_bps: float) -> Outcome:
    """One optimizer, no rounds: every step takes num_workers times the spec's batch, until spec.train.tokens."""
    wide = _widen(problem, num_workers)
    spec, num_steps = wide.spec, wide.spec.train.tokens // wide.spec.step_tokens
    backend = make_backend("batched", wide, chunk=1, device=DEVICE)
    theta = parameters.flatten(wide.build_model())
    order = np.arange(num_steps) % len(wide.data.shards)
    ring_bytes = 2 * (num_workers - 1) / num_workers * FLOAT32_BYTES * theta.size
    step_s = 1.0 / steps_per_s + 8.0 * ring_bytes / upload_bps
    curve: list[Point] = []
    for part in np.array_split(order, min(CURVE_POINTS, num_steps)):
        done = len(curve) and round(curve[-1].seconds / step_s)
        tokens = len(part) * spec.step_tokens
        job = Job(
            peer="worker",
            shards=tuple(part.tolist()),
            tokens_before=done * spec.step_tokens,
            round_tokens=tokens,
            lease_tokens=tokens,
        )
        theta = theta - backend.train(theta, [job]).pseudo_gradients[0]
        steps = done + len(part)
        curve.append(Point(seconds=steps * step_s, sent_bytes=steps * ring_bytes, loss=evaluate(problem, theta)))
    return Outcome(curve=tuple(curve), tokens=num_steps * spec.step_tokens)


class KindsApart(TensorLearner):
    """Every worker trains shards of one kind alone: those whose index leaves the same rest as its number does.

    What is leased is counted as it is; other shards are taken, none of them twice in a pass over the data.
    """

    def __init__(self, problem: Problem, backend: Backend, num_kinds: int) -> None:
        super().__init__(problem, backend)
        self._used = [0] * num_kinds  # shards of each kind

    def open_round(self, works: Sequence[Work]) -> None:
        super().open_round([replace(work, grant=self._of_one_kind(work.grant)) for work in works])

    def _of_one_kind(self, grant: GrantLease) -> GrantLease:
        num_kinds = len(self._used)
        kind = int(grant.peer.rpartition("-")[2]) % num_kinds
        num_shards = len(self._problem.data.shards) // num_kinds
        numbers = range(self._used[kind], self._used[kind] + len(grant.units))
        self._used[kind] = numbers.stop
        return replace(grant, units=tuple((0, kind + num_kinds * (number % num_shards)) for number in numbers))


def train_rounds(problem: Problem, fleet: Fleet, *, as_published: bool = False, num_kinds: int = 1) -> Outcome:
    """A whole run of the fleet under problem.spec, in the simulator.

    as_published: rounds begin at θ and a merge leaves the inner optimizer's state alone, unlike ours. num_kinds: of
    shards, one after the other in the problem's data; a worker gets one kind alone.
    """
    backend = make_backend("batched", problem, device=DEVICE)
    if num_kinds > 1:
        learner: TensorLearner = KindsApart(problem, backend, num_kinds)
    elif as_published:
        learner = TensorLearner(problem, backend, kept_share=0.0, turns_momentum=False)
    else:
        learner = TensorLearner(problem, backend)
    with tempfile.TemporaryDirectory() as folder:
        scenario = parse_scenario(_describe(problem.spec, fleet, learner.num_parameters), where="benchmark")
        run = VirtualRun(scenario, learner, len(problem.data.shards), Path(folder))
        run.run()
        run.finish()
    rows = run.recorder.rounds
    sent = np.cumsum([row["payload_bytes"] for row in rows]) / fleet.size
    curve = [
        Point(seconds=row["closed_s"] - rows[0]["opened_s"], sent_bytes=float(total), loss=row["held_out_loss"])
        for row, total in zip(rows, sent, strict=True)
        if row["held_out_loss"] is not None
    ]
    plans = [row["plan"] for row in rows]
    changed = [plan for plan, before in zip(plans, ["", *plans], strict=False) if plan != before]
    return Outcome(curve=tuple(curve), tokens=rows[-1]["tokens_after"], rounds=len(rows), plans=tuple(changed))


def evaluate(problem: Problem, theta: Vector) -> float:
    """Nats a token of the held-out rows, without dropout."""
    model, rows = problem.build_model(), problem.data.held_out
    parameters.assign(model, theta)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = torch.from_numpy(rows[start : start + EVALUATION_BATCH]).long()
            total += problem.task.loss(model, part).item() * len(part)
    return total / len(rows)


def _widen(problem: Problem, num_workers: int) -> Problem:
    """The same rows in one shard an inner step of num_workers batches, in an order that follows from the seed."""
    spec, rows = problem.spec, problem.data.shards.reshape(-1, problem.data.shards.shape[-1])
    batch = spec.train.batch_sequences * num_workers
    order = np.random.Generator(np.random.PCG64(spec.seed)).permutation(len(rows))
    shards = rows[order[: len(rows) // batch * batch]].reshape(-1, batch, rows.shape[1])
    data = TrainingData(vocabulary_size=problem.data.vocabulary_size, shards=shards, held_out=problem.data.held_out)
    wide = change(spec, train={"batch_sequences": batch}, data={"shard_steps": 1})
    return replace(problem, spec=wide, data=data, optimizer=spec.train.first_optimizer)


def _describe(spec: RunSpec, fleet: Fleet, num_parameters: int) -> dict[str, Any]:
    """A scenario file's content. Nobody can be dialled: a worker sends its own payload, the coordinator the others'."""
    run = change(spec, round={"min_peers": fleet.size - bool(fleet.away_s)}).model_dump(exclude={"name", "seed"})
    flops_per_step = 6.0 * num_parameters * spec.step_tokens
    return {
        "name": "learning",
        "fidelity": "learn",
        "seed": spec.seed,
        "hours": HOURS,
        "run": run,
        "population": [
            _describe_worker(number, speed, fleet, flops_per_step) for number, speed in enumerate(fleet.steps_per_s)
        ],
    }


def _describe_worker(number: int, steps_per_s: float, fleet: Fleet, flops_per_step: float) -> dict[str, Any]:
    sessions: tuple[tuple[float, ...], ...] = ()
    if fleet.away_s:
        from_h, to_h = (moment / 3600.0 for moment in fleet.away_s[number])
        sessions = ((0.0, from_h), (to_h,)) if from_h > 0.0 else ((to_h,),)
    return {
        "name": f"worker-{number}",
        "count": 1,
        "device": "laptop",
        "link": "fiber",
        "measured": {
            "flops": steps_per_s * flops_per_step,
            "jitter": 0.0,
            "memory_bytes": 16e9,
            "up_bps": fleet.upload_bps,
            "down_bps": fleet.download_bps,
            "latency_s": LATENCY_S,
            "dialable": 0.0,
            "sessions_hours": sessions,
        },
    }
