"""Inner optimizers for many peers at once: what worker/optimizers.py does, on stacked parameters.

A peer's parameters, gradient and state are one row each, so that everything elementwise is done for all peers and many
parameters together. Muon's Newton-Schulz iteration is batched over peers.

Shape letters: P peers, D parameters, W values of state, M and N a matrix's sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from protocol.parameters import ParameterSlot, parameter_layout
from protocol.run_spec import TrainSpec
from simulations.learning.problem import Optimizer
from worker.momentum import WHOLE, direction, turn
from worker.optimizers import find_cuts, hidden_matrices

_ADAM_EPSILON = 1e-8
_MUON_MOMENTUM = 0.95


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
        cuts = find_cuts(model)
        self._matrices = [(slot, cuts.get(parameter, WHOLE)) for slot, parameter in slots if parameter in hidden]
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
        for slot, cut in self._matrices:
            shape = (len(parameters), *slot.shape)
            gradient, momentum = gradients[:, slot.range], first[:, slot.range]
            momentum.lerp_(gradient, 1.0 - _MUON_MOMENTUM)
            update = direction(gradient.lerp(momentum, _MUON_MOMENTUM).view(shape), cut)
            weights = parameters[:, slot.range]
            weights.mul_(1.0 - rates * self._train.weight_decay)
            weights.addcmul_(update.reshape(weights.shape), rates, value=-1.0)

    def turn_momentum(self, state: Tensor, moved: Tensor, rate_sum: float) -> None:
        """As InnerOptimizer.turn_momentum, for P peers: state (P, W), in place; moved (D,)."""
        for slot, cut in self._matrices:
            momenta = state[:, slot.range].view(len(state), *slot.shape)
            turn(momenta, moved[slot.range].view(slot.shape), rate_sum, cut)

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
