"""Muon's momentum between rounds: what is turned, how far, and alike in the worker and in the simulator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocol import parameters
from protocol.run_spec import RunSpec
from simulations.learning.digits import Digits
from simulations.learning.inner import StackedOptimizer
from worker.momentum import MUON_RMS, TURNED_SHARE, Cut, direction, orthogonalize, turn
from worker.optimizers import Muon, build_optimizer, find_cuts, learning_rate_at, sum_rates
from worker.tasks.causal_lm import CausalLM

SHAPES = [(8, 8), (24, 8), (8, 24)]


def momenta(shape: tuple[int, int], num_workers: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((num_workers, *shape), dtype=np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(momenta(shape)))
    assert bool((values > 0.4).all())
    assert bool((values < 1.4).all())


def exact_factor(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_of_a_worker_that_all_agree_with_stays(shape: tuple[int, int]) -> None:
    momentum = momenta(shape, 1)
    moved = 0.3 * MUON_RMS * max(shape) ** 0.5 * exact_factor(momentum[0])
    turned = momentum.clone()
    turn(turned, moved, rate_sum=0.3)
    assert torch.linalg.norm(turned - momentum) < 0.25 * torch.linalg.norm(momentum)  # Newton-Schulz is not exact


@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_takes_the_direction_of_the_merge_and_keeps_its_size(shape: tuple[int, int]) -> None:
    momentum = momenta(shape, 1)
    agreed = exact_factor(momenta(shape, 2)[1])
    turned = momentum.clone()
    turn(turned, 0.3 * MUON_RMS * max(shape) ** 0.5 * agreed, rate_sum=0.3)

    def along(matrix: Tensor) -> float:
        return float((exact_factor(matrix) * agreed).sum()) / min(shape)

    assert along(momentum[0]) < 0.3
    assert along(turned[0]) > 0.7
    assert 0.5 < torch.linalg.norm(turned) / torch.linalg.norm(momentum) < 1.2


def test_momentum_shrinks_where_the_merge_has_hardly_moved() -> None:
    momentum = momenta((8, 8))
    turned = momentum.clone()
    turn(turned, torch.zeros(8, 8), rate_sum=0.3)
    torch.testing.assert_close(turned, (1 - TURNED_SHARE) * momentum)


def test_momentum_stays_when_the_steps_had_no_learning_rate() -> None:
    turned = momenta((8, 8))
    turn(turned, torch.ones(8, 8), rate_sum=0.0)
    torch.testing.assert_close(turned, momenta((8, 8)))


def test_rates_are_those_of_the_mean_worker_as_it_is_weighed() -> None:
    spec = RunSpec.model_validate({"train": {"tokens": 1_000_000, "warmup_fraction": 0.0}})
    step = spec.step_tokens
    rate = learning_rate_at(500_000 - 15 * step, spec)
    assert sum_rates([10 * step] * 3, 500_000, spec) == pytest.approx(10 * rate)
    assert sum_rates([20 * step, 10 * step], 500_000, spec) == pytest.approx((400 + 100) / 30 * rate)
    assert sum_rates([10 * step] * 3, 500_000, spec, 2 * 8e-3) == pytest.approx(20 * rate)
    assert sum_rates([0], 500_000, spec) == 0.0  # what a manifest names is the coordinator's word


GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32}


def build_gpt2(seed: int) -> Any:
    """Query, key and value of both heads in one matrix (16, 48), on its second axis."""
    spec = RunSpec.model_validate({"model": {"architecture": "gpt2", "config": GPT2}, "data": {"sequence_length": 16}})
    return CausalLM().build_model(spec, 17, seed)


def test_query_key_and_value_in_one_matrix_are_orthogonalized_head_by_head() -> None:
    model = build_gpt2(0)
    cuts = {name: cut for name, parameter in model.named_parameters() if (cut := find_cuts(model).get(parameter))}
    assert cuts == {"transformer.h.0.attn.c_attn.weight": Cut(6, 1)}
    gradients = momenta((16, 48))
    heads = [MUON_RMS * 16**0.5 * orthogonalize(part) for part in gradients.split(8, dim=2)]
    torch.testing.assert_close(direction(gradients, Cut(6, 1)), torch.cat(heads, dim=2))
    rows = [MUON_RMS * 16**0.5 * orthogonalize(part) for part in gradients.mT.split(8, dim=1)]
    torch.testing.assert_close(direction(gradients.mT, Cut(6, 0)), torch.cat(rows, dim=1))


@pytest.mark.parametrize("build", [lambda seed: Digits().build_model(RunSpec(), 17, seed), build_gpt2])
def test_worker_and_simulator_turn_alike_and_nothing_but_muons_momentum(build: Callable[[int], Any]) -> None:
    spec = RunSpec.model_validate({"train": {"optimizer": "muon", "learning_rate": 0.01}})
    models = [build(seed) for seed in range(2)]
    workers = [build_optimizer(model, spec.train) for model in models]
    stacked = torch.from_numpy(np.stack([parameters.flatten(model) for model in models]))
    simulated = StackedOptimizer("muon", models[0], spec.train)
    state = torch.zeros(len(models), simulated.state_size)
    rng = np.random.default_rng(0)

    def step() -> None:
        gradients = torch.from_numpy(rng.standard_normal(stacked.shape, dtype=np.float32))
        simulated.step(stacked, gradients, state, torch.full((2, 1), 0.01))
        for model, worker, gradient in zip(models, workers, gradients, strict=True):
            for slot, parameter in zip(parameters.parameter_layout(model), model.parameters(), strict=True):
                parameter.grad = gradient[slot.range].view(slot.shape).clone()
            worker.step(0.01)

    step()
    before = state.clone()
    moved = rng.standard_normal(stacked.shape[1], dtype=np.float32) * 1e-3
    simulated.turn_momentum(state, torch.from_numpy(moved), 0.02)
    for worker in workers:
        worker.turn_momentum(moved, 0.02)
    changed = (state != before).any(dim=0).nonzero()[:, 0]
    hidden = [slot.range for slot in parameters.parameter_layout(models[0]) if len(slot.shape) == 2]
    assert set(changed.tolist()) <= {place for where in hidden for place in range(where.start, where.stop)}
    assert len(changed) > 0
    step()
    expected = np.stack([parameters.flatten(model) for model in models])
    np.testing.assert_allclose(stacked.numpy(), expected, atol=1e-6)


def test_muon_is_that_of_torch_but_for_its_bfloat16() -> None:
    given = torch.from_numpy(np.random.default_rng(2).standard_normal((3, 24, 16), dtype=np.float32))
    ends = []
    options: Any = {"weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    makers = (lambda weight: Muon([weight], {}, 0.1), lambda weight: torch.optim.Muon([weight], **options))
    for make in makers:
        weight = torch.nn.Parameter(given[0].clone())
        optimizer = make(weight)
        optimizer.param_groups[0]["lr"] = 0.02
        for gradient in given[1:]:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append((weight.detach(), optimizer.state[weight]["momentum_buffer"]))
    (ours, our_momentum), (theirs, their_momentum) = ends
    torch.testing.assert_close(our_momentum, their_momentum)
    assert float((ours - theirs).abs().max()) < 0.02 * float((ours - given[0]).abs().max())
