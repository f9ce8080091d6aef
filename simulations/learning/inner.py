"""Inner optimizers for many peers at once: what worker/optimizers.py does, on stacked parameters.

A peer's parameters, gradient and state are one row each, so that everything elementwise is done for all peers and many
parameters together. Muon's Newton-Schulz iteration (in bfloat16, as torch.optim.Muon has it) is batched over peers.

Shape letters: P peers, D parameters, W values of state, M and N a matrix's sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from protocol.parameters import ParameterSlot, parameter_layout
from protocol.run_spec import TrainSpec
from simulations.learning.problem import Optimizer
from worker.optimizers import hidden_matrices

_ADAM_EPSILON = 1e-8
_MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MUON_EPSILON = 1e-7
_MUON_RMS = 0.2  # of its update, as AdamW's


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring parameters that AdamW treats alike, and where their second moments are in the state."""

    where: slice
    second: slice
    weight_decay: float


class StackedOptimizer:
    """Updates in place. `state_size` is W: no state for sgd, else first moments, second moments, number of steps."""

    def __init__(self, name: Optimizer, model: nn.Module, train: TrainSpec) -> None:
        self._train = train
        self._is_sgd = name == "sgd"
        hidden = set(hidden_matrices(model)) if name == "muon" else set()
        slots = list(zip(parameter_layout(model), model.parameters(), strict=True))
        self._matrices = [slot for slot, parameter in slots if parameter in hidden]
        self._stretches = _join([slot for slot, parameter in slots if parameter not in hidden], train.weight_decay)
        self._num_parameters = sum(slot.size for slot, _ in slots)
        num_second = sum(slot.size for slot, parameter in slots if parameter not in hidden)
        self.state_size = 0 if self._is_sgd else self._num_parameters + num_second + 1

    def step(self, parameters: Tensor, gradients: Tensor, state: Tensor, rates: Tensor) -> None:
        """One update of P peers: parameters and gradients (P, D), state (P, W), learning rates (P, 1)."""
        if self._is_sgd:
            parameters.addcmul_(gradients, rates, value=-1.0)
            return
        first, second = state[:, : self._num_parameters], state[:, self._num_parameters : -1]
        state[:, -1] += 1.0
        for stretch in self._stretches:
            self._step_adamw(
                parameters[:, stretch.where],
                gradients[:, stretch.where],
                first[:, stretch.where],
                second[:, stretch.second],
                rates * stretch.weight_decay,
                rates,
                state[:, -1:],
            )
        for slot in self._matrices:
            shape = (len(parameters), *slot.shape)
            gradient, momentum = gradients[:, slot.range], first[:, slot.range]
            momentum.lerp_(gradient, 1.0 - _MUON_MOMENTUM)
            update = orthogonalize(gradient.lerp(momentum, _MUON_MOMENTUM).view(shape))
            weights = parameters[:, slot.range]
            weights.mul_(1.0 - rates * self._train.weight_decay)
            weights.addcmul_(
                update.reshape(weights.shape), rates * (_MUON_RMS * math.sqrt(max(slot.shape))), value=-1.0
            )

    def _step_adamw(
        self,
        parameters: Tensor,
        gradients: Tensor,
        first: Tensor,
        second: Tensor,
        decays: Tensor,
        rates: Tensor,
        steps: Tensor,
    ) -> None:
        beta1, beta2 = self._train.betas
        parameters.mul_(1.0 - decays)
        first.lerp_(gradients, 1.0 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1.0 - beta2)
        scale = second.sqrt().div_((1.0 - beta2**steps).sqrt_()).add_(_ADAM_EPSILON)
        parameters.addcmul_(first / scale, rates / (1.0 - beta1**steps), value=-1.0)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each float32 matrix (P, M, N), in float32."""
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_MUON_EPSILON)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()


def _join(slots: Sequence[ParameterSlot], weight_decay: float) -> list[_Stretch]:
    """Stretches without gaps; only parameters of two and more dimensions decay."""
    stretches: list[_Stretch] = []
    edges = [
        0,
        *(place + 1 for place, (one, other) in enumerate(pairwise(slots)) if not _alike(one, other)),
        len(slots),
    ]
    second = 0
    for start, stop in pairwise(edges):
        part = slots[start:stop]
        if not part:
            continue
        where = slice(part[0].offset, part[-1].range.stop)
        size = where.stop - where.start
        decay = weight_decay if len(part[0].shape) >= 2 else 0.0
        stretches.append(_Stretch(where, slice(second, second + size), decay))
        second += size
    return stretches


def _alike(one: ParameterSlot, other: ParameterSlot) -> bool:
    return one.range.stop == other.offset and (len(one.shape) >= 2) == (len(other.shape) >= 2)
