"""Outer optimizers: from the merged pseudo-gradient g to the next θ. Elementwise float32 on the CPU, never fused.

    average    θ <- θ - g                                        local SGD: the mean of the peers' parameters
    sgd        m <- μ m + g;  θ <- θ - lr m                      with μ = 0 as in SparseLoCo (arXiv:2508.15706)
    nesterov   m <- μ m + g;  θ <- θ - lr (g + μ m)              DiLoCo (arXiv:2311.08105), as torch.optim.SGD does it

g is θ_start - θ_after, so it is subtracted. Every replica computes the same bits from the same arguments. Nothing here
knows where g comes from.
"""

import difflib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ConfigError

Vector = NDArray[np.float32]
OUTER_OPTIMIZERS = ("average", "nesterov", "sgd")


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterOptimizer:
    """One outer optimizer with its parameters; made by `get_outer`."""

    name: str
    learning_rate: float
    momentum: float

    @property
    def has_momentum(self) -> bool:
        """Whether a momentum vector is part of the state."""
        return self.momentum > 0.0

    def step(
        self,
        theta: Vector,
        momentum: Vector | None,
        gradient: Vector,
        *,
        next_theta: Vector,
        next_momentum: Vector | None,
    ) -> None:
        """Write the next θ and momentum to `next_theta` and `next_momentum`; the arguments stay as they are.

        All are float32 of one shape: being elementwise, a step can be done segment by segment. A momentum of None
        counts as zeros; `next_momentum` is not None where `has_momentum`, and written then only.
        """
        if self.name == "average":
            np.subtract(theta, gradient, out=next_theta)
            return
        rate, decay = np.float32(self.learning_rate), np.float32(self.momentum)
        if next_momentum is None or not self.has_momentum:
            np.multiply(gradient, rate, out=next_theta)
            np.subtract(theta, next_theta, out=next_theta)
            return
        if momentum is None:
            next_momentum[:] = gradient
        else:
            np.multiply(momentum, decay, out=next_momentum)
            next_momentum += gradient
        if self.name == "sgd":
            np.multiply(next_momentum, rate, out=next_theta)
        else:
            np.multiply(next_momentum, decay, out=next_theta)
            next_theta += gradient
            next_theta *= rate
        np.subtract(theta, next_theta, out=next_theta)


def get_outer(name: str, learning_rate: float, momentum: float) -> OuterOptimizer:
    """Raises ConfigError for an unknown name (naming the nearest) and for parameters that it does not take."""
    if name not in OUTER_OPTIMIZERS:
        near = difflib.get_close_matches(name, OUTER_OPTIMIZERS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown outer optimizer `{name}`; did you mean `{near}`?")
    if not (0.0 < learning_rate < 1e6 and 0.0 <= momentum < 1.0):
        raise ConfigError(f"outer optimizer {name}: learning_rate {learning_rate} or momentum {momentum} out of range")
    if name == "average" and (learning_rate != 1.0 or momentum):
        raise ConfigError("the outer optimizer `average` takes neither learning_rate nor momentum")
    return OuterOptimizer(name=name, learning_rate=learning_rate, momentum=momentum)
