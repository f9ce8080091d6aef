"""How scales are stored: relative to a power of two, in float16 or in the upper 8 bits of one.

Pseudo-gradients may be 1e-6 or 1e3 throughout. A plain float16 scale would lose its precision at the small end, so a
whole payload (or segment) has one exponent e, and a scale is float32(stored) * 2^e: exact, and the same everywhere.
Scales are never negative. A scale more than 2^28 below the largest may become zero.
"""

import numpy as np
from numpy.typing import NDArray

from protocol.codecs.payload import DECODED_MAX, Vector
from protocol.errors import PayloadError

_EXPONENT_MIN, _EXPONENT_MAX = -126, 112  # 2^e is then a normal float32, and 65,504 * 2^e at most a float32
_TARGET_EXPONENT = 15  # the largest scale is stored as [2^14, 2^15): rounding up stays finite
_DROPPED_BITS = 7  # of a float16's 16: sign 0, 5 exponent bits and 3 mantissa bits are kept


def exponent_of(scales: Vector) -> int:
    """The exponent to store these scales with; they are not negative and at most ENCODED_MAX."""
    _, exponent = np.frexp(float(scales.max()))
    return max(int(exponent) - _TARGET_EXPONENT, _EXPONENT_MIN)


def store_float16(scales: Vector, exponent: int) -> NDArray[np.float16]:
    """Scales as little-endian float16; relative error at most 2^-11."""
    return (scales.astype(np.float64) * 2.0**-exponent).astype("<f2")


def load_float16(stored: bytes | memoryview, exponent: int, level_max: float) -> Vector:
    """The inverse of `store_float16`.

    Raises PayloadError unless all are finite, not negative, and at most DECODED_MAX when multiplied by `level_max`.
    """
    return _checked(np.frombuffer(stored, "<f2"), exponent, level_max)


def store_float8(scales: Vector, exponent: int) -> NDArray[np.uint8]:
    """Scales as bytes, 5 exponent bits and 3 mantissa bits, to the nearest; relative error at most 2^-4."""
    bits = store_float16(scales, exponent).view("<u2")
    return ((bits + (1 << (_DROPPED_BITS - 1))) >> _DROPPED_BITS).astype(np.uint8)


def load_float8(stored: bytes | memoryview, exponent: int, level_max: float) -> Vector:
    """The inverse of `store_float8`. Raises PayloadError as `load_float16` does."""
    bits = np.frombuffer(stored, np.uint8).astype("<u2") << _DROPPED_BITS
    return _checked(bits.view("<f2"), exponent, level_max)


def _checked(halves: NDArray[np.float16], exponent: int, level_max: float) -> Vector:
    if not _EXPONENT_MIN <= exponent <= _EXPONENT_MAX:
        raise PayloadError(f"the exponent {exponent} of the scales is out of range")
    largest = float(halves.max()) * 2.0**exponent * level_max
    if not (float(halves.min()) >= 0.0 and largest <= DECODED_MAX):
        raise PayloadError("a scale is negative, not finite or too large")
    return halves.astype(np.float32) * np.float32(2.0**exponent)
