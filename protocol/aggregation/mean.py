"""mean: every contribution counts in full. For runs whose peers are all trusted."""

from collections.abc import Sequence

from protocol.aggregation.vote import Vote


def mean(votes: Sequence[Vote], clip_factor: float) -> list[float]:
    """1.0 for every vote; `clip_factor` has no effect."""
    return [1.0] * len(votes)
