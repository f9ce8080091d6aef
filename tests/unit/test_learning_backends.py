"""simulations.learning: the backends against each other, and the stacked inner optimizers against the worker's."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protocol import parameters
from protocol.errors import ConfigError, DivergedError
from protocol.run_spec import RunSpec, parse_run_spec
from simulations.learning.backend import Backend, Job, Merge, make_backend
from simulations.learning.batched import BatchedBackend
from simulations.learning.digits import Digits
from simulations.learning.inner import StackedOptimizer
from simulations.learning.problem import Optimizer, Problem, make_problem
from worker.optimizers import build_optimizer

CPU = torch.device("cpu")
WORDS = ["worker", "trains", "lease", "and", "sends", "what", "learned", "the", "peers", "round"]
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits_problem(optimizer: Optimizer, **train: Any) -> Problem:
    spec = parse_run_spec(
        {
            "data": {"sequence_length": 64, "shard_steps": 2},
            "train": {"batch_sequences": 4, "learning_rate": 0.02, "tokens": 100_000, **train},
        }
    )
    problem = make_problem("digits", spec)
    return Problem(spec=spec, task=problem.task, data=problem.data, optimizer=optimizer)


def text_problem(folder: Path) -> Problem:
    text = folder / "words.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 3_000)))
    spec = parse_run_spec(
        {
            "model": {"config": LLAMA},
            "data": {"source": str(text), "sequence_length": 16, "shard_steps": 2, "held_out_max_tokens": 1024},
            "train": {"batch_sequences": 2, "optimizer": "adamw", "learning_rate": 0.003, "tokens": 10_000},
        }
    )
    return make_problem("lm", spec)


def ragged_jobs(problem: Problem, number: int) -> list[Job]:
    """Of one to three shards each."""
    num_shards, tokens = len(problem.data.shards), problem.spec.shard_tokens
    return [
        Job(
            peer=f"peer-{peer}",
            shards=tuple((7 * number + 3 * peer + place) % num_shards for place in range(1 + peer % 3)),
            tokens_before=10 * tokens * number,
            round_tokens=10 * tokens,
            lease_tokens=3 * tokens,
        )
        for peer in range(5)
    ]


def assert_agree(problem: Problem, one: Backend, other: Backend, num_rounds: int = 3) -> None:
    theta, merge = parameters.flatten(problem.build_model()), None
    for number in range(num_rounds):
        jobs = [replace(job, turns=place % 2 == 0) for place, job in enumerate(ragged_jobs(problem, number))]
        ours, theirs = one.train(theta, jobs, merge), other.train(theta, jobs, merge)
        np.testing.assert_allclose(ours.pseudo_gradients, theirs.pseudo_gradients, atol=1e-5)
        np.testing.assert_allclose(ours.mean_losses, theirs.mean_losses, atol=1e-5)
        merge = Merge(moved=theirs.pseudo_gradients.mean(axis=0), rate_sum=0.05)
        theta = theta - merge.moved


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_batched_and_sequential_agree_when_peers_make_different_numbers_of_steps(optimizer: Optimizer) -> None:
    problem = digits_problem(optimizer)
    batched, sequential = (make_backend(name, problem, device=CPU) for name in ("batched", "sequential"))
    assert_agree(problem, batched, sequential)


def test_batched_and_sequential_agree_on_a_language_model(tmp_path: Path) -> None:
    problem = text_problem(tmp_path)
    batched, sequential = (make_backend(name, problem, device=CPU) for name in ("batched", "sequential"))
    assert_agree(problem, batched, sequential, num_rounds=2)


def test_batched_and_sequential_agree_when_gradients_are_clipped() -> None:
    problem = digits_problem("sgd", gradient_clip=0.05)
    batched, sequential = (make_backend(name, problem, device=CPU) for name in ("batched", "sequential"))
    assert_agree(problem, batched, sequential)


class Repeating:
    """A task whose step does much twice: what is alike may be computed once, what is random not."""

    def __init__(self, random: Callable[[Tensor], Tensor]) -> None:
        self._random = random

    def build_model(self, spec: RunSpec, vocabulary_size: int, seed: int) -> nn.Module:
        return Digits().build_model(spec, vocabulary_size, seed)

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        given = rows[:, :-1].float() * 1
        kept = self._random(given) - self._random(given)
        labels = rows[:, -1].long()
        return F.cross_entropy(model(kept.t().t()), labels) + 0 * F.cross_entropy(model(kept), labels)


@pytest.mark.parametrize("random", [torch.rand_like, partial(F.dropout, p=0.5)], ids=["rand", "dropout"])
def test_a_recorded_step_gives_what_the_step_itself_gives(random: Callable[[Tensor], Tensor]) -> None:
    problem = replace(digits_problem("sgd"), task=Repeating(random))
    recorded, computed = BatchedBackend(problem, device=CPU), BatchedBackend(problem, device=CPU)
    computed._can_record = False
    theta = parameters.flatten(problem.build_model())
    jobs = [replace(job, shards=job.shards[:1]) for job in ragged_jobs(problem, 0)[:4]]  # four are not padded
    for _ in range(2):  # what the first draws does not matter to the second
        ours, theirs = recorded.train(theta, jobs), computed.train(theta, jobs)
        assert recorded._recorded
        assert np.abs(theirs.pseudo_gradients).max() > 1e-3  # equal ones would cancel and leave hardly anything
        np.testing.assert_allclose(ours.pseudo_gradients, theirs.pseudo_gradients, atol=1e-7)


def test_results_are_bitwise_the_same_when_run_again() -> None:
    problem = digits_problem("muon")
    theta = parameters.flatten(problem.build_model())
    first, second = (BatchedBackend(problem, device=CPU) for _ in range(2))
    for number in range(2):
        jobs = ragged_jobs(problem, number)
        assert np.array_equal(first.train(theta, jobs).pseudo_gradients, second.train(theta, jobs).pseudo_gradients)


@pytest.mark.parametrize("name", ["batched", "sequential"])
def test_a_pickled_backend_goes_on_as_the_first(name: Any) -> None:
    problem = digits_problem("adamw")
    theta = parameters.flatten(problem.build_model())
    backend = make_backend(name, problem, device=CPU)
    backend.train(theta, ragged_jobs(problem, 0))
    other = pickle.loads(pickle.dumps(backend))  # noqa: S301  # our own bytes
    jobs = ragged_jobs(problem, 1)
    assert np.array_equal(backend.train(theta, jobs).pseudo_gradients, other.train(theta, jobs).pseudo_gradients)


def test_a_peer_trains_alike_alone_and_beside_peers_with_more_steps() -> None:
    problem = digits_problem("adamw")
    theta = parameters.flatten(problem.build_model())
    jobs = ragged_jobs(problem, 0)
    together = BatchedBackend(problem, device=CPU).train(theta, jobs)
    for place, job in enumerate(jobs):
        alone = BatchedBackend(problem, device=CPU).train(theta, [job])
        np.testing.assert_allclose(alone.pseudo_gradients[0], together.pseudo_gradients[place], atol=1e-6)


def test_every_peer_can_start_elsewhere() -> None:
    problem = digits_problem("sgd")
    theta = parameters.flatten(problem.build_model())
    jobs = ragged_jobs(problem, 0)
    starts = theta + np.linspace(0.0, 0.1, len(jobs), dtype=np.float32)[:, None]
    batched, sequential = (make_backend(name, problem, device=CPU) for name in ("batched", "sequential"))
    ours, theirs = batched.train(starts, jobs), sequential.train(starts, jobs)
    np.testing.assert_allclose(ours.pseudo_gradients, theirs.pseudo_gradients, atol=1e-5)


def test_a_forgotten_peer_begins_anew() -> None:
    problem = digits_problem("adamw")
    theta = parameters.flatten(problem.build_model())
    jobs = ragged_jobs(problem, 0)[:1]
    backend = BatchedBackend(problem, device=CPU)
    first = backend.train(theta, jobs)
    second = backend.train(theta, jobs)
    backend.forget(jobs[0].peer)
    third = backend.train(theta, jobs)
    assert not np.array_equal(first.pseudo_gradients, second.pseudo_gradients)
    assert np.array_equal(first.pseudo_gradients, third.pseudo_gradients)


@pytest.mark.parametrize("name", ["batched", "sequential"])
def test_a_peer_that_diverges_is_named(name: Any) -> None:
    problem = digits_problem("sgd")
    starts = np.stack([parameters.flatten(problem.build_model())] * 2)
    starts[1] = 1e30
    with pytest.raises(DivergedError, match="peer-1"):
        make_backend(name, problem, device=CPU).train(starts, ragged_jobs(problem, 0)[:2])


def test_a_smaller_memory_makes_smaller_chunks() -> None:
    problem = digits_problem("adamw")
    large, small = (BatchedBackend(problem, device=CPU, memory_bytes=size) for size in (1 << 26, 1 << 20))
    assert 1 <= small.chunk < large.chunk


def test_ray_says_how_to_get_it_when_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'manyhands\[ray\]'"):
        make_backend("ray", digits_problem("sgd"), device=CPU)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stacked_optimizers_step_as_the_workers_do_on_the_same_gradients(optimizer: Optimizer) -> None:
    spec = RunSpec.model_validate({"train": {"optimizer": optimizer, "learning_rate": 0.01}})
    models = [Digits().build_model(spec, 17, seed) for seed in range(3)]
    theirs = [build_optimizer(model, spec.train) for model in models]
    stacked = torch.from_numpy(np.stack([parameters.flatten(model) for model in models]))
    ours = StackedOptimizer(optimizer, models[0], spec.train)
    state = torch.zeros(len(models), ours.state_size)
    rng = np.random.default_rng(0)
    for _ in range(4):
        gradients = torch.from_numpy(rng.standard_normal(stacked.shape, dtype=np.float32))
        rates = torch.tensor([[0.01], [0.02], [0.03]])
        ours.step(stacked, gradients, state, rates)
        for model, optimizer_, gradient, rate in zip(models, theirs, gradients, rates, strict=True):
            for slot, parameter in zip(parameters.parameter_layout(model), model.parameters(), strict=True):
                parameter.grad = gradient[slot.range].view(slot.shape).clone()
            optimizer_.step(rate.item())
    expected = np.stack([parameters.flatten(model) for model in models])
    np.testing.assert_allclose(stacked.numpy(), expected, atol=1e-6)
