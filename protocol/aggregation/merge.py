"""The deterministic merge: the same payloads, weights and order give the same bits on every machine.

Every coordinate is divided by the same divisor, the total weight of the peers leased to it; what a peer did not send
counts as zero, so a coordinate that one peer sends alone gets that peer's share and no more. Elementwise float32 on
the CPU: one multiply and one add a contribution, never fused, never reordered.

It goes segment by segment, all payloads abreast, so that the sum stays in cache and never needs a vector of its own.
Payloads that together are larger than such a vector are added up in one, as they come. Of a small vector, many
payloads are decoded together: there the calls cost more than what they do.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import numpy as np

from protocol.codecs import codec_of
from protocol.codecs.payload import PIECE_VALUES, SEGMENT_VALUES, Piece, Vector
from protocol.errors import VerificationError

_VALUE_BYTES = 4
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_TOGETHER_VALUES = 1 << 18  # decoded together
_PART_VALUES = 1 << 18  # handed out at a time: 1 MiB, so that what is done with a part finds it in a core's own cache


def merge(contributions: Iterable[tuple[bytes, float, float]], divisor: float, num_parameters: int) -> Vector:
    """sum_i float32(weight_i * clip_i / divisor) * decode(payload_i), in the given order, as float32 (D,).

    `contributions`: (payload, weight, clip). The coefficient is computed in float64. Raises PayloadError for a bad
    payload and VerificationError for coefficients that are negative or not finite.
    """
    merged = np.empty(num_parameters, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever commits the sum checks that it is finite
        for where, values in merge_parts(contributions, divisor, num_parameters):
            merged[where] = values
    return merged


def merge_parts(
    contributions: Iterable[tuple[bytes, float, float]], divisor: float, num_parameters: int
) -> Iterator[tuple[slice, Vector]]:
    """What `merge` returns, part by part: (where, values), rising and without a gap.

    The values are the caller's until the next part, and whether they are finite is the caller's to check. All
    contributions are consumed before the first part; whether a payload is good is known only after the last one.
    """
    if num_parameters <= PIECE_VALUES:
        yield slice(0, num_parameters), _add_rows(contributions, divisor, num_parameters)
        return
    abreast: list[tuple[Iterator[Piece], np.float32]] = []
    held_bytes = 0
    total: Vector | None = None
    for payload, weight, clip in contributions:
        factor = np.float32(_coefficient(weight, clip, divisor))
        abreast.append((codec_of(payload).pieces(payload, num_parameters), factor))
        held_bytes += len(payload)
        if held_bytes > _VALUE_BYTES * num_parameters:
            total = np.zeros(num_parameters, np.float32) if total is None else total
            _add_one_by_one(abreast, total)
            abreast, held_bytes = [], 0
    yield from _add_abreast(abreast, total, num_parameters)


def _add_rows(contributions: Iterable[tuple[bytes, float, float]], divisor: float, num_parameters: int) -> Vector:
    total, rest = np.zeros(num_parameters, np.float32), iter(contributions)
    while together := list(islice(rest, _TOGETHER_VALUES // num_parameters)):
        for codec, alike in groupby(together, lambda contribution: codec_of(contribution[0])):
            payloads, weights, clips = zip(*alike, strict=True)
            coefficients = [_coefficient(*pair, divisor) for pair in zip(weights, clips, strict=True)]
            rows = codec.decode_rows(payloads, num_parameters)
            for row in rows * np.array(coefficients, np.float32)[:, None]:
                total += row
    return total


def _add_one_by_one(contributions: Iterable[tuple[Iterator[Piece], np.float32]], total: Vector) -> None:
    for pieces, factor in contributions:
        for piece in pieces:
            piece.add_to(total[piece.span], factor)


def _add_abreast(
    contributions: Iterable[tuple[Iterator[Piece], np.float32]], total: Vector | None, num_parameters: int
) -> Iterator[tuple[slice, Vector]]:
    by_segment = [(groupby(pieces, _segment_of), factor) for pieces, factor in contributions]
    scratch = np.empty(min(SEGMENT_VALUES, num_parameters), np.float32)
    for start in range(0, num_parameters, SEGMENT_VALUES):
        stop = min(start + SEGMENT_VALUES, num_parameters)
        if total is None:
            segment = scratch[: stop - start]
            segment[:] = 0.0
        else:
            segment = total[start:stop]
        for segments, factor in by_segment:
            for piece in next(segments)[1]:
                piece.add_to(segment[piece.span.start - start : piece.span.stop - start], factor)
        for first in range(start, stop, _PART_VALUES):
            where = slice(first, min(first + _PART_VALUES, stop))
            yield where, segment[first - start : where.stop - start]
    for segments, _ in by_segment:
        next(segments, None)  # lets a payload that is too long say so


def _segment_of(piece: Piece) -> int:
    first: int = piece.span.start
    return first // SEGMENT_VALUES


def _coefficient(weight: float, clip: float, divisor: float) -> float:
    coefficient = weight * clip / divisor if divisor > 0.0 else math.nan
    if not 0.0 <= coefficient <= _FLOAT32_MAX:
        raise VerificationError(f"weight {weight}, clip {clip} and divisor {divisor} make no usable coefficient")
    return coefficient
