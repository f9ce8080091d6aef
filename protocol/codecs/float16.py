"""float16: IEEE half precision, 2 bytes a parameter. Magnitudes above 65,504 are saturated to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from protocol.codecs.payload import (
    HEADER_BYTES,
    PIECE_VALUES,
    PayloadHeader,
    Piece,
    PiecewiseCodec,
    Vector,
    check_decoded,
    check_vector,
)
from protocol.errors import PayloadError

_LARGEST = 65_504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Float16Codec(PiecewiseCodec):
    """Body: D little-endian float16. Error at most 2^-11 of a value from 6.1e-5 up, 3e-8 below. No options."""

    name: ClassVar[str] = "float16"
    codec_id: ClassVar[int] = 2

    def encode(self, vector: Vector) -> bytes:
        check_vector(vector)
        parts = [self._header(vector.size)]
        for start in range(0, vector.size, PIECE_VALUES):
            piece = vector[start : start + PIECE_VALUES]
            parts.append(np.clip(piece, -_LARGEST, _LARGEST).astype("<f2").tobytes())
        return b"".join(parts)

    def payload_bytes_max(self, num_parameters: int) -> int:
        return HEADER_BYTES + 2 * num_parameters

    def _decode(self, body: memoryview, header: PayloadHeader) -> Iterator[Piece]:
        if len(body) != 2 * header.num_parameters:
            raise PayloadError(f"{len(body)} bytes of float16 for {header.num_parameters} parameters")
        for start in range(0, header.num_parameters, PIECE_VALUES):
            stop = min(start + PIECE_VALUES, header.num_parameters)
            values = np.frombuffer(body[2 * start : 2 * stop], "<f2").astype(np.float32)
            check_decoded(values)
            yield Piece(slice(start, stop), slice(None), values)
