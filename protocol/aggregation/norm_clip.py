"""norm_clip: a contribution whose norm is far above the others' is scaled down to them.

c_i = min(1, clip_factor * median / norm_i). `median` is the lower median of the positive norms: always the norm of a
real contribution, and of two the smaller one, so that one peer of two cannot lift it. Zero norms are left out of it,
because peers that send nothing would otherwise clip the others to nothing; their own factor is 1.
"""

from collections.abc import Sequence
from statistics import median_low

from protocol.aggregation.vote import Vote


def norm_clip(votes: Sequence[Vote], clip_factor: float) -> list[float]:
    """Clip factors in (0, 1], one a vote, in the same order."""
    positive = [vote.norm for vote in votes if vote.norm > 0.0]
    if not positive:
        return [1.0] * len(votes)
    limit = clip_factor * median_low(positive)
    return [min(1.0, limit / vote.norm) if vote.norm > 0.0 else 1.0 for vote in votes]
