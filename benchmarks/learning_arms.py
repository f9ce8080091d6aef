"""The arms of benchmarks.learning: what each of them sets, the grid of learning rates, and how all are trained."""

import os
import pydoc_data.topics
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from benchmarks.learning_runs import (
    Fleet,
    Outcome,
    change,
    join_texts,
    load_problem,
    train_rounds,
    train_single,
    with_spec,
)
from protocol.parameters import count_parameters
from protocol.run_spec import AUTO, RunSpec
from protocol.signing import sha256_hex
from simulations.learning.problem import Problem

NUM_WORKERS = 4
# Every worker's computer is the same whatever the size: with the smallest model it makes a step a second of virtual
# time, with one of three times as many parameters a third of a step.
WORKER_FLOPS = 3.91e8
SCALE = 100.0  # times as large is the model that this one stands for: links have that part of their bandwidth
UPLOADS_MBPS = (5, 20, 100)
MIDDLE_MBPS = 20
DOWN_OVER_UP = 5
UNEVEN = (1.0, 0.6, 0.3, 0.1)  # of the fastest; the median is as fast as in the other arms
RATES = {"adamw": (3e-3, 6e-3), "muon": (6e-3, 1e-2, 1.5e-2, 2e-2, 3e-2)}
ADAMW_WARMUP = 0.3  # of the run: in runs this short AdamW wants it, Muon does not (docs/convergence.md)
LONG_STEPS = 500  # H of DiLoCo as published, for runs of at least two such rounds

Setting = dict[str, dict[str, Any]]  # sections of run.toml, over the base
Rate = float | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model, and the inner steps of one worker."""

    hidden: int
    layers: int
    steps: int
    quick_steps: int


SIZES = {
    "0.1M": Size(hidden=64, layers=2, steps=600, quick_steps=300),
    "0.4M": Size(hidden=96, layers=3, steps=600, quick_steps=240),
    "3M": Size(hidden=256, layers=4, steps=600, quick_steps=240),
}
TEXTS = {"stdlib": "stdlib", "topics": str(pydoc_data.topics.__file__)}  # source code, and English about it


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One row: the inner optimizer, and what else is set.

    as_published: see benchmarks.learning_runs.train_rounds.
    """

    title: str
    optimizer: str
    rounds: Setting | None = None  # None: one optimizer
    num_workers: int = NUM_WORKERS
    mbps: int = MIDDLE_MBPS
    as_published: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an arm came to at its best rate, one outcome a seed."""

    outcomes: tuple[Outcome, ...]
    rate: float

    @property
    def losses(self) -> list[float]:
        return [outcome.loss for outcome in self.outcomes]

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def sent_bytes(self) -> float:
        return statistics.fmean(outcome.sent_bytes for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        return statistics.fmean(outcome.seconds for outcome in self.outcomes)


def list_arms(num_steps: int) -> dict[str, Arm]:
    """The arms by the names that their figures have."""
    arms = {
        "alone_adamw": Arm(title="alone, AdamW", optimizer="adamw", num_workers=1),
        "alone_muon": Arm(title="alone, Muon", optimizer="muon", num_workers=1),
        "sync_adamw": Arm(title="synchronous, AdamW", optimizer="adamw"),
        "sync_muon": Arm(title="synchronous, Muon", optimizer="muon"),
        "diloco": _published("DiLoCo, H 30", "adamw", _in_rounds("float32", 30, _nesterov(0.9))),
        "sparseloco": _published("SparseLoCo 1/64, H 30", "adamw", _sparseloco()),
        "muloco": _published("MuLoCo 2 bit, H 30", "muon", _in_rounds("int2", 30, _nesterov(0.5))),
    }
    if num_steps >= 2 * LONG_STEPS:
        rounds = _in_rounds("float32", LONG_STEPS, _nesterov(0.9))
        arms["diloco_500"] = _published("DiLoCo, H 500", "adamw", rounds)
    for mbps in UPLOADS_MBPS:
        rounds = _in_rounds(AUTO, AUTO, {"optimizer": "average", "learning_rate": 1.0, "momentum": 0.0})
        arms[f"auto_{mbps}"] = Arm(title=f"ours, auto, {mbps} Mbit/s", optimizer="muon", rounds=rounds, mbps=mbps)
    return arms


def _published(title: str, optimizer: str, rounds: Setting) -> Arm:
    return Arm(title=title, optimizer=optimizer, rounds=rounds, as_published=True)


def _in_rounds(codec: str, inner_steps: int | str, outer: Mapping[str, Any]) -> Setting:
    return {"exchange": {"codec": codec}, "round": {"inner_steps": inner_steps}, "outer": dict(outer)}


def _nesterov(momentum: float) -> dict[str, Any]:
    return {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": momentum}


def _sparseloco() -> Setting:
    setting = _in_rounds("sparse", 30, {"optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.0})
    setting["exchange"] |= {"codec_options": {"k": 64}, "error_feedback_decay": 0.95}
    return setting


def train(
    arm: Arm,
    problem: Problem,
    rate: Rate,
    num_steps: int,
    speeds: Sequence[float] | None = None,
    *,
    breaks: bool = False,
    num_kinds: int = 1,
) -> Outcome:
    """Train an arm at a rate, each worker about num_steps.

    speeds: of each worker, their median being as fast as the workers of the other arms; the tokens stay the same.
    breaks: there is one worker more, and in turn each is away for as long as the others need for their part of the run.
    num_kinds: see benchmarks.learning_runs.train_rounds.
    """
    warmup = {"warmup_fraction": ADAMW_WARMUP} if arm.optimizer == "adamw" else {}
    tokens = num_steps * arm.num_workers * problem.spec.step_tokens
    inner = {"optimizer": arm.optimizer, "learning_rate": rate, "tokens": tokens, **warmup}
    problem = with_spec(problem, change(problem.spec, train=inner, **(arm.rounds or {})))
    bps = arm.mbps * 1e6 / SCALE
    speed = WORKER_FLOPS / (6.0 * count_parameters(problem.build_model()) * problem.spec.step_tokens)
    if arm.rounds is None:
        return train_single(problem, arm.num_workers, speed, bps)
    shares = speeds or (1.0,) * (arm.num_workers + breaks)
    steps_per_s = tuple(speed * share / statistics.median(shares) for share in shares)
    part_s = num_steps / speed / len(shares)
    fleet = Fleet(
        steps_per_s=steps_per_s,
        upload_bps=bps,
        download_bps=DOWN_OVER_UP * bps,
        away_s=tuple((number * part_s, (number + 1) * part_s) for number in range(len(shares))) if breaks else (),
    )
    return train_rounds(problem, fleet, as_published=arm.as_published, num_kinds=num_kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of an arm: `base` is of one size, text and seed; the rest as in `train`.

    texts: in place of the base's own; by_kind: each worker has one of them alone.
    """

    arm: Arm
    base: RunSpec
    rate: Rate
    num_steps: int
    speeds: tuple[float, ...] | None = None
    breaks: bool = False
    texts: tuple[str, ...] = ()
    by_kind: bool = False


Runner = Callable[[Sequence[Trial]], Iterable[Outcome]]  # outcomes in the trials' order, as they come


def run_trial(trial: Trial, folder: Path | None = None) -> Outcome:
    """In this process. folder: outcomes are kept there, and what is there already is not trained again.

    They do not tell which code made them: whoever changes what is trained takes another folder.
    """
    if folder is None:
        return _train(trial)
    content = TypeAdapter(Trial).dump_json(replace(trial, arm=replace(trial.arm, title="")))
    file = folder / f"{sha256_hex(content)[:16]}.json"
    if file.exists():
        return TypeAdapter(Outcome).validate_json(file.read_bytes())
    outcome = _train(trial)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(TypeAdapter(Outcome).dump_json(outcome))
    partial.replace(file)
    return outcome


def _train(trial: Trial) -> Outcome:
    texts = trial.texts or (trial.base.data.source,)
    problem = _load(tuple(change(trial.base, data={"source": text}).model_dump_json() for text in texts))
    num_kinds = len(texts) if trial.by_kind else 1
    return train(
        trial.arm,
        problem,
        trial.rate,
        trial.num_steps,
        trial.speeds,
        breaks=trial.breaks,
        num_kinds=num_kinds,
    )


@lru_cache(maxsize=2)
def _load(specs_json: tuple[str, ...]) -> Problem:
    return join_texts([load_problem(RunSpec.model_validate_json(spec)) for spec in specs_json])


def train_all(bases: Sequence[RunSpec], num_steps: int, run_all: Runner) -> dict[str, Result]:
    """All arms, and what follows from them: what is hard for workers, and equal virtual time. bases: one a seed."""
    arms = list_arms(num_steps)
    results = train_arms(arms, bases, num_steps, run_all)
    middle, ours = arms[f"auto_{MIDDLE_MBPS}"], results[f"auto_{MIDDLE_MBPS}"]
    even = Trial(arm=middle, base=bases[0], rate=ours.rate, num_steps=num_steps)
    more = {
        "uneven": replace(even, speeds=UNEVEN),
        "breaks": replace(even, breaks=True),
        "kinds_mixed": replace(even, texts=tuple(TEXTS.values())),
        "kinds_apart": replace(even, texts=tuple(TEXTS.values()), by_kind=True),
    }
    if middle.rounds is not None:
        arm = replace(middle, rounds=middle.rounds | {"exchange": {"codec": AUTO, "overlap": True}})
        more["overlap"] = replace(even, arm=arm)
    in_time = [("alone_muon", mbps) for mbps in UPLOADS_MBPS] + [
        (name, MIDDLE_MBPS) for name in ("sync_adamw", "sync_muon")
    ]
    for name, mbps in in_time:
        steps = max(1, round(results[f"auto_{mbps}"].seconds / (results[name].seconds / num_steps)))
        trial = Trial(arm=arms[name], base=bases[0], rate=results[name].rate, num_steps=steps)
        more[f"{name}_in_time_{mbps}"] = trial
    outcomes = iter(run_all([replace(trial, base=base) for trial in more.values() for base in bases]))
    for name, trial in more.items():
        results[name] = Result(outcomes=tuple(next(outcomes) for _ in bases), rate=float(trial.rate))
    return results


def train_arms(arms: Mapping[str, Arm], bases: Sequence[RunSpec], num_steps: int, run_all: Runner) -> dict[str, Result]:
    """Every arm at every rate of the grid for the first seed, at its best one for the others."""
    tried = [(name, rate) for name, arm in arms.items() for rate in RATES[arm.optimizer]]
    trials = [Trial(arm=arms[name], base=bases[0], rate=rate, num_steps=num_steps) for name, rate in tried]
    outcomes: dict[str, dict[float, Outcome]] = {name: {} for name in arms}
    for (name, rate), outcome in zip(tried, run_all(trials), strict=True):
        outcomes[name][rate] = outcome
    best = {name: min(known.items(), key=lambda pair: pair[1].loss) for name, known in outcomes.items()}
    others = iter(
        run_all(
            [
                Trial(arm=arms[name], base=base, rate=rate, num_steps=num_steps)
                for name, (rate, _) in best.items()
                for base in bases[1:]
            ]
        )
    )
    return {
        name: Result(outcomes=(first, *(next(others) for _ in bases[1:])), rate=rate)
        for name, (rate, first) in best.items()
    }


def make_base(size: Size, text: str, seed: int) -> RunSpec:
    """The spec that all arms start from."""
    config = {
        "hidden_size": size.hidden,
        "intermediate_size": 5 * size.hidden // 2,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 32,
        "num_key_value_heads": size.hidden // 32,
        "tie_word_embeddings": False,
    }
    data = {"source": text, "max_tokens": 3_000_000, "sequence_length": 64, "held_out_max_tokens": 32_768}
    return change(RunSpec(), seed=seed, model={"config": config}, data=data, checkpoint={"every_rounds": 4})
