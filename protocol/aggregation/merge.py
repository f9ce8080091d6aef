"""The deterministic merge: the same payloads, weights and order give the same bits on every machine.

Every coordinate is divided by the same divisor, the total weight of the peers leased to it; what a peer did not send
counts as zero, so a coordinate that one peer sends alone gets that peer's share and no more. Elementwise float32 on
the CPU: one multiply and one add a contribution, never fused, never reordered.
"""

import math
from collections.abc import Iterable

import numpy as np

from protocol.codecs import codec_of
from protocol.codecs.payload import Vector
from protocol.errors import VerificationError


def merge(contributions: Iterable[tuple[bytes, float, float]], divisor: float, num_parameters: int) -> Vector:
    """sum_i float32(weight_i * clip_i / divisor) * decode(payload_i), in the given order, as float32 (D,).

    `contributions`: (payload, weight, clip), consumed one at a time. The coefficient is computed in float64. Raises
    PayloadError for a bad payload and VerificationError for coefficients that are negative or not finite.
    """
    total = np.zeros(num_parameters, np.float32)
    for payload, weight, clip in contributions:
        codec_of(payload).accumulate(payload, _coefficient(weight, clip, divisor), total)
    return total


def _coefficient(weight: float, clip: float, divisor: float) -> float:
    coefficient = weight * clip / divisor if divisor > 0.0 else math.nan
    if not 0.0 <= coefficient <= float(np.finfo(np.float32).max):
        raise VerificationError(f"weight {weight}, clip {clip} and divisor {divisor} make no usable coefficient")
    return coefficient
