"""Aggregation rules, the cap on a peer's share, the deterministic merge, and the outer optimizers."""

import hashlib
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.aggregation import RULES, Vote, cap_weights, get_rule
from protocol.aggregation.merge import merge, merge_parts
from protocol.codecs import get_codec
from protocol.codecs.payload import PIECE_VALUES, SEGMENT_VALUES, Vector
from protocol.errors import ConfigError, PayloadError, VerificationError
from protocol.outer import OUTER_OPTIMIZERS, OuterOptimizer, get_outer


def votes(*norms: float) -> list[Vote]:
    return [Vote(weight=1.0, norm=norm) for norm in norms]


# ---- rules


def test_nearest_rule_is_named_when_the_name_is_unknown() -> None:
    with pytest.raises(ConfigError, match="did you mean `norm_clip`"):
        get_rule("normclip")


def test_every_contribution_counts_in_full_when_the_rule_is_mean() -> None:
    assert get_rule("mean")(votes(1.0, 1e6), 2.0) == [1.0, 1.0]


def test_only_outliers_are_scaled_down_when_the_rule_is_norm_clip() -> None:
    assert get_rule("norm_clip")(votes(1.0, 2.0, 3.0, 40.0), 2.0) == [1.0, 1.0, 1.0, 0.1]


def test_smaller_norm_decides_when_there_are_two() -> None:
    assert get_rule("norm_clip")(votes(100.0, 1.0), 2.0) == [0.02, 1.0]


def test_honest_peers_are_not_clipped_when_most_send_zeros() -> None:
    assert get_rule("norm_clip")(votes(0.0, 0.0, 0.0, 5.0, 5.0), 1.0) == [1.0] * 5
    assert get_rule("norm_clip")(votes(0.0, 0.0), 1.0) == [1.0, 1.0]


@given(norms=st.lists(st.floats(0, 1e30), max_size=20), factor=st.floats(0.01, 100))
def test_factors_are_fractions_whatever_the_norms_are(norms: list[float], factor: float) -> None:
    for rule in RULES.values():
        factors = rule(votes(*norms), factor)
        assert len(factors) == len(norms)
        assert all(0.0 <= value <= 1.0 for value in factors)


# ---- the cap on a share


def test_large_weights_are_lowered_to_the_cap_when_they_exceed_it() -> None:
    assert cap_weights([10.0, 1.0, 1.0, 0.0], 0.5) == [2.0, 1.0, 1.0, 0.0]
    assert cap_weights([100.0, 50.0, 1.0, 1.0], 0.4) == pytest.approx([4.0, 4.0, 1.0, 1.0])
    assert cap_weights([3.0, 1.0], 1.0) == [3.0, 1.0]
    assert cap_weights([], 0.5) == []
    assert cap_weights([0.0], 0.5) == [0.0]


def test_shares_become_equal_when_too_few_peers_can_keep_the_cap() -> None:
    assert cap_weights([5.0, 0.0, 2.0], 0.3) == [2.0, 0.0, 2.0]
    assert cap_weights([7.0], 0.1) == [7.0]


def test_weights_are_refused_when_negative_or_the_cap_is_no_fraction() -> None:
    for weights, fraction in (([-1.0], 0.5), ([1.0], 0.0), ([1.0], 1.5)):
        with pytest.raises(ValueError, match="max_fraction"):
            cap_weights(weights, fraction)


@given(weights=st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=30), fraction=st.floats(0.02, 1.0))
def test_cap_holds_where_it_can_and_order_is_kept(weights: list[float], fraction: float) -> None:
    capped = cap_weights(weights, fraction)
    assert all(0.0 < new <= old for new, old in zip(capped, weights, strict=True))
    largest = max(capped) / sum(capped)
    assert largest <= max(fraction, 1 / len(weights)) * (1 + 1e-9)
    by_weight = [new for _, new in sorted(zip(weights, capped, strict=True))]
    assert all(lower <= higher for lower, higher in pairwise(by_weight))


# ---- the merge


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def test_absent_peers_count_as_zero_when_the_divisor_holds_their_weight() -> None:
    codec = get_codec("float32")
    payloads = [codec.encode(vector(2, 0)), codec.encode(vector(4, 8))]
    merged = merge([(payloads[0], 1.0, 1.0), (payloads[1], 3.0, 0.5)], 10.0, 2)
    np.testing.assert_allclose(merged, [0.8, 1.2], rtol=1e-6)


def test_lone_index_gets_its_peers_share_and_no_more_when_nobody_else_sends_it() -> None:
    codec = get_codec("sparse", {"k": 1, "chunk": 16})
    honest, lone = np.zeros(16, np.float32), np.zeros(16, np.float32)
    honest[3], lone[7] = 1.0, 1.0
    merged = merge([(codec.encode(honest), 1.0, 1.0)] * 9 + [(codec.encode(lone), 1.0, 1.0)], 10.0, 16)
    assert merged[7] == pytest.approx(0.1)


def test_merge_is_refused_when_a_coefficient_is_not_usable() -> None:
    payload = get_codec("float32").encode(vector(1, 2))
    for weight, clip, divisor in ((1.0, 1.0, 0.0), (-1.0, 1.0, 1.0), (1e300, 1.0, 1e-300), (0.0, 1.0, 0.0)):
        with pytest.raises(VerificationError, match="coefficient"):
            merge([(payload, weight, clip)], divisor, 2)
    with pytest.raises(PayloadError):
        merge([(payload[:-1], 1.0, 1.0)], 1.0, 2)


def test_merge_is_the_golden_one_when_the_payloads_are_fixed() -> None:
    base = (np.arange(5000, dtype=np.float32) % 97 - 48) / np.float32(31)
    contributions = [
        (get_codec(name).encode(np.roll(base, place * 7)), 3.0 + place, 1.0 / (1 + place))
        for place, name in enumerate(["float32", "float16", "int8", "int4", "int2", "sign", "sparse"])
    ]
    merged = merge(contributions, 50.0, base.size)
    assert hashlib.sha256(merged.tobytes()).hexdigest()[:32] == GOLDEN_MERGE


GOLDEN_MERGE = "514ad47d26cf32605d3a680130c8ffcb"


@pytest.mark.parametrize(
    "names", [["sparse"] * 3, ["int8", "sparse", "sign", "float16"], ["float32", "sparse", "int4"]]
)
def test_merge_is_that_of_one_payload_after_the_other_when_it_goes_segment_by_segment(names: list[str]) -> None:
    size = 2 * SEGMENT_VALUES + 3 * 4096 + 77
    options = {"int8": {"block": 24}, "sign": {"block": 1000}}  # blocks that cross the segments' borders
    rng = np.random.default_rng(0)
    contributions, expected = [], np.zeros(size, np.float32)
    for place, name in enumerate(names):
        codec = get_codec(name, options.get(name))
        payload = codec.encode(rng.standard_normal(size).astype(np.float32))
        contributions.append((payload, 1.0 + place, 0.9))
        codec.accumulate(payload, (1.0 + place) * 0.9 / 7.0, expected)
    parts = [(where, values.copy()) for where, values in merge_parts(contributions, 7.0, size)]
    assert [0, *(where.stop for where, _ in parts)] == [*(where.start for where, _ in parts), size]
    assert np.concatenate([values for _, values in parts]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [1, 5000, PIECE_VALUES])
def test_merge_is_that_of_one_payload_after_the_other_when_vectors_are_small(size: int) -> None:
    rng = np.random.default_rng(0)
    contributions, expected = [], np.zeros(size, np.float32)
    for place in range(70):
        codec = get_codec(["float32", "float32", "int2", "sparse"][place % 4])
        payload = codec.encode(rng.standard_normal(size).astype(np.float32))
        contributions.append((payload, 1.0 + place, 0.9))
        codec.accumulate(payload, (1.0 + place) * 0.9 / 7.0, expected)
    assert merge(contributions, 7.0, size).tobytes() == expected.tobytes()


def test_merge_needs_no_vector_of_its_own_when_payloads_are_small() -> None:
    size = 1 << 22
    payload = get_codec("sparse").encode(np.ones(size, np.float32))
    tracemalloc.start()
    try:
        for _ in merge_parts([(payload, 1.0, 1.0)] * 8, 8.0, size):
            pass
        assert tracemalloc.get_traced_memory()[1] < 2 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["sparse", "float32"])
def test_merge_overflows_without_a_word_when_the_values_are_too_large(name: str) -> None:
    payload = get_codec(name).encode(np.full(100, 1e30, np.float32))
    assert not np.isfinite(merge([(payload, 1.0, 1.0)], 1e-20, 100)).all()


@pytest.mark.parametrize("name", ["sparse", "int8", "float32"])
def test_merge_is_refused_when_a_payload_is_too_long(name: str) -> None:
    codec = get_codec(name)
    good = codec.encode(np.ones(SEGMENT_VALUES, np.float32))
    with pytest.raises(PayloadError):
        merge([(good, 1.0, 1.0), (good + b"\0", 1.0, 1.0)], 2.0, SEGMENT_VALUES)


# ---- outer optimizers


def step(
    optimizer: OuterOptimizer, theta: Vector, momentum: Vector | None, gradient: Vector
) -> tuple[Vector, Vector | None]:
    next_theta = np.full_like(theta, np.nan)
    next_momentum = np.full_like(theta, np.nan) if optimizer.has_momentum else None
    optimizer.step(theta, momentum, gradient, next_theta=next_theta, next_momentum=next_momentum)
    return next_theta, next_momentum


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", False), ("nesterov", True)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_torch_when_momentum_is_classical_or_nesterov(
    name: str, nesterov: bool, momentum: float
) -> None:
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(100).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(theta))
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=momentum, nesterov=nesterov and momentum > 0)
    optimizer = get_outer(name, 0.7, momentum)
    velocity = None
    for _ in range(4):
        gradient = rng.standard_normal(100).astype(np.float32)
        parameter.grad = torch.tensor(gradient)
        reference.step()
        theta, velocity = step(optimizer, theta, velocity, gradient)
        np.testing.assert_allclose(theta, parameter.detach().numpy(), atol=1e-6)
    assert (velocity is not None) == optimizer.has_momentum


def test_theta_moves_to_the_mean_when_averaging() -> None:
    theta, momentum = step(get_outer("average", 1.0, 0.0), vector(3, 3), None, vector(1, -1))
    assert theta.tolist() == [2, 4]
    assert momentum is None


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_momentum_of_none_is_zeros_and_arguments_stay_as_they_are(name: str) -> None:
    optimizer = get_outer(name, 0.5, 0.9)
    theta, gradient, zeros = vector(1, 2), vector(3, -4), vector(0, 0)
    first = step(optimizer, theta, None, gradient)
    second = step(optimizer, theta, zeros, gradient)
    assert [array.tobytes() for array in first if array is not None] == [
        array.tobytes() for array in second if array is not None
    ]
    assert (theta.tolist(), gradient.tolist(), zeros.tolist()) == ([1, 2], [3, -4], [0, 0])


def test_outer_optimizer_is_refused_when_unknown_or_given_what_it_does_not_take() -> None:
    with pytest.raises(ConfigError, match="did you mean `nesterov`"):
        get_outer("nestrov", 1.0, 0.0)
    for name, rate, momentum in (("average", 0.5, 0.0), ("average", 1.0, 0.5), ("sgd", 0.0, 0.0), ("sgd", 1.0, 1.0)):
        with pytest.raises(ConfigError):
            get_outer(name, rate, momentum)
    assert {get_outer(name, 1.0, 0.0).name for name in OUTER_OPTIMIZERS} == {"average", "nesterov", "sgd"}
