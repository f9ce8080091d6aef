"""What a rule is told of a contribution, and the cap on one peer's share."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One contribution as the coordinator measured it."""

    weight: float  # verified tokens, or a function of them; >= 0
    norm: float  # L2 norm of the decoded vector; >= 0


def cap_weights(weights: Sequence[float], max_fraction: float) -> list[float]:
    """Lower the largest weights until no share of the total exceeds `max_fraction`, in (0, 1]; none is raised.

    The weights above the cap are set to the one level at which their share is exactly the cap. Where no weights could
    keep it (fewer than 1 / max_fraction peers have any), all become the smallest positive one: equal shares are the
    nearest to it. Zeros stay zero. Raises ValueError for a negative weight or a fraction outside (0, 1].
    """
    if not 0.0 < max_fraction <= 1.0 or any(weight < 0.0 for weight in weights):
        raise ValueError("weights are not negative, and max_fraction is in (0, 1]")
    descending = sorted((weight for weight in weights if weight > 0.0), reverse=True)
    if not descending:
        return list(weights)
    level = _cap_level(descending, max_fraction)
    return [min(weight, level) for weight in weights]


def _cap_level(descending: list[float], max_fraction: float) -> float:
    if max_fraction * len(descending) <= 1.0:
        return descending[-1]
    sums = list(accumulate(reversed(descending)))[::-1]  # of a weight and all smaller ones, smallest added first
    for num_capped, (weight, rest) in enumerate(zip(descending, sums, strict=True)):
        free = 1.0 - num_capped * max_fraction
        if free <= 0.0:
            return weight
        # With `num_capped` weights at the level L: L = max_fraction (num_capped L + rest).
        if weight * free <= max_fraction * rest:
            return max_fraction * rest / free
    return descending[-1]
