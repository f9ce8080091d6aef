"""int8 and int4: whole multiples of a block's step, about 1.008 and 0.508 bytes a parameter.

The step is the block's largest magnitude divided by 127 or 7, so nothing is clipped and the error of a value is at
most half a step (and 2^-11 of the value, from the step's own rounding). Zero stays zero.
"""

from typing import ClassVar

import numpy as np

from protocol.codecs.blockwise import BlockwiseCodec, Codes
from protocol.codecs.payload import Vector


class Int8Codec(BlockwiseCodec):
    """Codes 1..255 stand for -127..127. Option: `block`, values a scale."""

    __slots__ = ()
    name: ClassVar[str] = "int8"
    codec_id: ClassVar[int] = 3
    bits: ClassVar[int] = 8
    levels: ClassVar[tuple[float, ...]] = tuple(float(code - 128) for code in range(256))

    @staticmethod
    def _fit(blocks: Vector) -> Vector:
        return _largest(blocks) / np.float32(127)

    @staticmethod
    def _quantise(ratios: Vector) -> Codes:
        return (np.clip(np.rint(ratios), -127, 127) + 128).astype(np.uint8)


class Int4Codec(BlockwiseCodec):
    """Codes 1..15 stand for -7..7. Option: `block`, values a scale."""

    __slots__ = ()
    name: ClassVar[str] = "int4"
    codec_id: ClassVar[int] = 4
    bits: ClassVar[int] = 4
    levels: ClassVar[tuple[float, ...]] = tuple(float(code - 8) for code in range(16))

    @staticmethod
    def _fit(blocks: Vector) -> Vector:
        return _largest(blocks) / np.float32(7)

    @staticmethod
    def _quantise(ratios: Vector) -> Codes:
        return (np.clip(np.rint(ratios), -7, 7) + 8).astype(np.uint8)


def _largest(blocks: Vector) -> Vector:
    largest: Vector = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    return largest
