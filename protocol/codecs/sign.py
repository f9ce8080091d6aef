"""sign: one bit a value, about 0.133 bytes a parameter.

A value becomes plus or minus the mean magnitude of its block, which is the least-squares scale for signs. Made for
error feedback: signSGD with it converges as SGD does (Karimireddy et al. 2019, arXiv:1901.09847).
"""

from typing import ClassVar

import numpy as np

from protocol.codecs.blockwise import BlockwiseCodec, Codes
from protocol.codecs.payload import Vector


class SignCodec(BlockwiseCodec):
    """Codes: 1 for a negative value; zero counts as positive. Option: `block`, values a scale."""

    __slots__ = ()
    name: ClassVar[str] = "sign"
    codec_id: ClassVar[int] = 6
    bits: ClassVar[int] = 1
    levels: ClassVar[tuple[float, ...]] = (1.0, -1.0)

    @staticmethod
    def _fit(blocks: Vector) -> Vector:
        return np.asarray(np.abs(blocks).mean(axis=1, dtype=np.float64), np.float32)

    @staticmethod
    def _quantise(ratios: Vector) -> Codes:
        return (ratios < 0).view(np.uint8)
