"""Aggregation rules: from what the coordinator measured of each contribution to how much it may count.

A rule is a pure function from votes (weight, norm) to clip factors in [0, 1], one a vote, in the same order. It never
sees a vector: the coordinator decides once, writes the factors into the manifest, and every replica multiplies by them
(protocol.aggregation.merge). `cap_weights` limits the share of a single peer. Nothing here imports numpy.
"""

import difflib
from collections.abc import Callable, Sequence

from protocol.aggregation.mean import mean
from protocol.aggregation.norm_clip import norm_clip
from protocol.aggregation.vote import Vote, cap_weights
from protocol.errors import ConfigError

__all__ = ["RULES", "Rule", "Vote", "cap_weights", "get_rule"]

Rule = Callable[[Sequence[Vote], float], list[float]]
"""(votes, clip_factor) -> clip factors."""

RULES: dict[str, Rule] = {"mean": mean, "norm_clip": norm_clip}


def get_rule(name: str) -> Rule:
    """The rule of that name. Raises ConfigError, naming the nearest one."""
    if name not in RULES:
        near = difflib.get_close_matches(name, list(RULES), n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown aggregation rule `{name}`; did you mean `{near}`?")
    return RULES[name]
