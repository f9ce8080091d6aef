"""protocol.parameters: a model as one vector, and back."""

import numpy as np
import pytest
import torch
from torch import nn

from protocol.errors import VerificationError
from protocol.parameters import assign, count_parameters, flatten, parameter_layout, pseudo_gradient


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_layout_covers_the_vector_without_gaps_in_the_models_order() -> None:
    layout = parameter_layout(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    assert [slot.name for slot in layout] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [slot.shape for slot in layout] == [(2, 3), (2,), (2,), (2,)]
    assert [slot.offset for slot in layout] == [0, 6, 8, 10]


def test_tied_parameter_is_there_once_and_is_assigned_in_both_places_when_tied() -> None:
    model = Tied()
    assert [slot.name for slot in parameter_layout(model)] == ["embedding.weight", "hidden.weight", "hidden.bias"]
    theta = np.arange(count_parameters(model), dtype=np.float32)
    assign(model, theta)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight.detach().flatten(), torch.arange(15.0))
    assert np.array_equal(flatten(model), theta)


def test_vector_comes_back_bit_for_bit_when_it_is_read_only() -> None:
    model = nn.Linear(7, 5)
    theta = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    theta.flags.writeable = False
    before = [parameter.data_ptr() for parameter in model.parameters()]
    assign(model, theta)
    assert flatten(model).tobytes() == theta.tobytes()
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_parameters_keep_their_dtype_when_a_float32_vector_is_assigned() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    assign(model, np.full(6, 1.5, dtype=np.float32))
    assert model.weight.dtype == torch.bfloat16
    assert flatten(model).dtype == np.float32
    assert flatten(model).tolist() == [1.5] * 6


def test_pseudo_gradient_is_the_way_from_the_model_back_to_the_start() -> None:
    model = nn.Linear(2, 1)
    assign(model, np.array([1.0, 2.0, 3.0], dtype=np.float32))
    theta = np.array([1.5, 2.0, 1.0], dtype=np.float32)
    delta = pseudo_gradient(theta, model)
    assert delta.tolist() == [0.5, 0.0, -2.0]
    assert theta.tolist() == [1.5, 2.0, 1.0]


@pytest.mark.parametrize("theta", [np.zeros(2, np.float32), np.zeros((3, 1), np.float32), np.zeros(3, np.float64)])
def test_vector_is_refused_when_it_is_not_the_models(theta: np.ndarray) -> None:
    with pytest.raises(VerificationError, match="3 parameters"):
        assign(nn.Linear(2, 1), theta)
    with pytest.raises(VerificationError):
        pseudo_gradient(theta, nn.Linear(2, 1))
