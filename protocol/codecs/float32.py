"""float32: the values as they are, 4 bytes a parameter. The reference that the other codecs are measured against."""

from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Float32Codec(PiecewiseCodec):
    """Body: D little-endian float32. Lossless. No options."""

    name: ClassVar[str] = "float32"
    codec_id: ClassVar[int] = 1

    def encode(self, vector: Vector) -> bytes:
        check_vector(vector)
        return b"".join((self._header(vector.size), np.ascontiguousarray(vector, "<f4").data))

    def encode_rows(self, rows: Vector) -> list[bytes]:
        check_vector(rows.reshape(-1))
        header = self._header(rows.shape[1])
        return [header + row.tobytes() for row in rows.astype("<f4", copy=False)]

    def decode_rows(self, payloads: Sequence[bytes], num_parameters: int) -> Vector:
        for payload in payloads:
            self._check_header(payload, num_parameters)
            _check_length(len(payload) - HEADER_BYTES, num_parameters)
        words = np.frombuffer(b"".join(payloads), "<f4").reshape(len(payloads), -1)
        rows = words[:, HEADER_BYTES // 4 :]
        check_decoded(rows)
        return rows

    def payload_bytes_max(self, num_parameters: int) -> int:
        return HEADER_BYTES + 4 * num_parameters

    def _decode(self, body: memoryview, header: PayloadHeader) -> Iterator[Piece]:
        _check_length(len(body), header.num_parameters)
        for start in range(0, header.num_parameters, PIECE_VALUES):
            stop = min(start + PIECE_VALUES, header.num_parameters)
            values = np.frombuffer(body, "<f4", stop - start, 4 * start)
            check_decoded(values)
            yield Piece(slice(start, stop), slice(None), values)


def _check_length(body_bytes: int, num_parameters: int) -> None:
    if body_bytes != 4 * num_parameters:
        raise PayloadError(f"{body_bytes} bytes of float32 for {num_parameters} parameters")
