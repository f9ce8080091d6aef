"""worker.device: which device, in what words, and that measuring it leaves no trace."""

import pytest
import torch
from torch import Tensor, nn

from protocol.errors import ConfigError
from worker.device import choose_device, describe_device, measure_autocast, seeded, set_threads

CPU = torch.device("cpu")


def test_device_is_the_one_that_was_asked_for() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in {"cpu", "cuda", "mps"}


def test_nearest_name_is_given_when_a_device_is_not_known() -> None:
    with pytest.raises(ConfigError, match="did you mean `cuda`"):
        choose_device("cudaa")


def test_absent_device_is_refused_when_asked_for_by_name() -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigError, match=absent):
        choose_device(absent)


def test_description_fits_a_join_request() -> None:
    text = describe_device(CPU)
    assert 0 < len(text) <= 64
    assert text.isprintable()
    assert text.endswith("cores")


def test_threads_are_at_least_one_when_left_to_the_machine() -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads() >= 1
        assert set_threads(1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_global_random_numbers_go_on_as_before_when_a_seed_was_used_inside() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with seeded(CPU, 1):
        first = torch.rand(3)
    with seeded(CPU, 1):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(torch.rand(3), expected)


def test_parameters_are_untouched_when_autocast_is_measured() -> None:
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = module(batch)
        return output.float().square().mean()

    assert measure_autocast(loss, model, torch.ones(4, 8), CPU) in {None, torch.bfloat16}
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_autocast_is_off_when_the_task_cannot_run_in_it() -> None:
    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = module(batch)
        if output.dtype == torch.bfloat16:
            raise NotImplementedError("no bfloat16 here")
        return output.sum()

    assert measure_autocast(loss, nn.Linear(8, 8), torch.ones(4, 8), CPU) is None
