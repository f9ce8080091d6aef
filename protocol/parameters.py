"""A model's parameters as one flat float32 vector θ: what peers agree on, merge and hash.

Invariants: θ holds every parameter once (a tied one at its first name) in the order of `named_parameters()`; it is a
contiguous float32 numpy array on the CPU, whatever the model's own device and dtype. `assign` writes into the existing
parameters, so that an optimizer's state stays attached to them. Buffers are not part of θ. This is the one module of
`protocol` that imports torch.

Shape letters: D parameters.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from protocol.errors import VerificationError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSlot:
    """Where one parameter lies in θ: `theta[offset : offset + size]`, in C order."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def range(self) -> slice:
        return slice(self.offset, self.offset + self.size)


def parameter_layout(model: nn.Module) -> tuple[ParameterSlot, ...]:
    """The slots of a model's parameters, in the model's own order; they cover θ without gaps."""
    slots = []
    offset = 0
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        slots.append(ParameterSlot(name=name, shape=shape, offset=offset, size=math.prod(shape)))
        offset += slots[-1].size
    return tuple(slots)


def count_parameters(model: nn.Module) -> int:
    """D: the length of the model's θ."""
    return sum(parameter.numel() for parameter in model.parameters())


def flatten(model: nn.Module, into: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """A copy of the model's parameters as θ: float32 (D,), in `into` where that is given."""
    theta = np.empty(count_parameters(model), dtype=np.float32) if into is None else into
    for slot, parameter in zip(parameter_layout(model), model.parameters(), strict=True):
        theta[slot.range] = parameter.detach().to("cpu", torch.float32).numpy().reshape(-1)
    return theta


def assign(model: nn.Module, theta: NDArray[np.float32]) -> None:
    """Copy θ, float32 (D,), into the model's parameters in place; each keeps its device and dtype.

    Raises VerificationError when θ is not a vector of the model's size.
    """
    _check_size(model, theta)
    with torch.no_grad():
        for slot, parameter in zip(parameter_layout(model), model.parameters(), strict=True):
            parameter.copy_(_part(theta, slot))


def shift(model: nn.Module, offset: NDArray[np.float32]) -> None:
    """Add an offset, float32 (D,), to the model's parameters in place. Raises VerificationError for another size."""
    _check_size(model, offset)
    with torch.no_grad():
        for slot, parameter in zip(parameter_layout(model), model.parameters(), strict=True):
            parameter.add_(_part(offset, slot).to(parameter))


def move_towards(model: nn.Module, theta: NDArray[np.float32], share: float) -> None:
    """Move the model's parameters in place by `share` of the way to θ, float32 (D,).

    Raises VerificationError when θ is not a vector of the model's size.
    """
    _check_size(model, theta)
    with torch.no_grad():
        for slot, parameter in zip(parameter_layout(model), model.parameters(), strict=True):
            parameter.lerp_(_part(theta, slot).to(parameter), share)


def _part(vector: NDArray[np.float32], slot: ParameterSlot) -> torch.Tensor:
    # the copy is for torch, which takes no read-only array; a slot at a time keeps it small
    return torch.from_numpy(vector[slot.range].copy()).view(slot.shape)


def pseudo_gradient(theta: NDArray[np.float32], model: nn.Module) -> NDArray[np.float32]:
    """Δ: θ minus the model's parameters, float32 (D,); the outer step goes against it.

    Raises VerificationError when θ is not a vector of the model's size.
    """
    _check_size(model, theta)
    delta = flatten(model)
    np.subtract(theta, delta, out=delta)
    return delta


def _check_size(model: nn.Module, theta: NDArray[np.float32]) -> None:
    expected = count_parameters(model)
    if theta.shape != (expected,) or theta.dtype != np.float32:
        raise VerificationError(
            f"the state has shape {theta.shape} of {theta.dtype}; this model has {expected} parameters in float32"
        )
