"""What the quantising codecs share: blocks of values, one float16 scale a block, a few bits a value.

A value is levels[code] * scale of its block: one float32 multiplication. Body: one float16 scale a block, then the
codes, lowest bits first in each byte. The last block may be shorter; the spare bits of the last byte are ignored.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from protocol.codecs.payload import (
    HEADER_BYTES,
    PIECE_VALUES,
    SEGMENT_VALUES,
    PayloadHeader,
    Piece,
    PiecewiseCodec,
    Vector,
    check_vector,
)
from protocol.codecs.scales import exponent_of, load_float16, store_float16
from protocol.errors import ConfigError, PayloadError

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockwiseCodec(PiecewiseCodec):
    """A subclass says how a block's scale is found and how a value, divided by its scale, becomes a code."""

    bits: ClassVar[int]
    levels: ClassVar[tuple[float, ...]]  # 2^bits, exact in float32
    block: int = 256

    def __post_init__(self) -> None:
        if not 8 <= self.block <= PIECE_VALUES or self.block % 8:
            raise ConfigError(
                f"codec {self.name}: block = {self.block} is not a multiple of 8 from 8 to {PIECE_VALUES}"
            )

    @staticmethod
    @abstractmethod
    def _fit(blocks: Vector) -> Vector:
        """Scales (n,) of blocks (n, block)."""

    @staticmethod
    @abstractmethod
    def _quantise(ratios: Vector) -> Codes:
        """Codes of values divided by their scale; any shape."""

    def encode(self, vector: Vector) -> bytes:
        check_vector(vector)
        scales = np.concatenate([self._fit(blocks) for blocks in self._blocks(vector)])
        exponent = exponent_of(scales)
        stored = store_float16(scales, exponent)
        divisors = load_float16(stored.tobytes(), exponent, 1.0)
        divisors[divisors == 0.0] = 1.0  # whatever the code, zero times its level is what will be decoded
        parts = [self._header(vector.size, exponent), stored.tobytes()]
        first = 0
        for blocks in self._blocks(vector):
            last = first + len(blocks)
            parts.append(self._pack(self._quantise(blocks / divisors[first:last, None]).reshape(-1)))
            first = last
        return b"".join(parts)

    def payload_bytes_max(self, num_parameters: int) -> int:
        return HEADER_BYTES + 2 * self._num_blocks(num_parameters) + self._code_bytes(num_parameters)

    def _decode(self, body: memoryview, header: PayloadHeader) -> Iterator[Piece]:
        num_parameters = header.num_parameters
        scale_bytes = 2 * self._num_blocks(num_parameters)
        if len(body) != scale_bytes + self._code_bytes(num_parameters):
            raise PayloadError(f"{len(body)} bytes of {self.name} for {num_parameters} parameters")
        table, level_max = _byte_table(type(self))
        scales = load_float16(body[:scale_bytes], header.exponent, level_max)
        codes = np.frombuffer(body[scale_bytes:], np.uint8)
        step = self._piece_blocks() * self.block
        for start in range(0, num_parameters, step):
            stop = min(start + step, num_parameters)
            piece = codes[start * self.bits // 8 : self._code_bytes(stop)]
            values = table.take(piece, axis=0).reshape(-1)[: stop - start]  # faster than table[piece]
            whole = values.size // self.block * self.block
            first = start // self.block
            rows = values[:whole].reshape(-1, self.block)
            rows *= scales[first : first + len(rows), None]
            values[whole:] *= scales[-1]
            yield from _within_segments(start, values)

    def _blocks(self, vector: Vector) -> Iterator[Vector]:
        """The blocks, some at a time as (n, block), then the last one as (1, rest) if it is shorter."""
        whole = vector.size // self.block * self.block
        step = self._piece_blocks() * self.block
        for start in range(0, whole, step):
            yield vector[start : min(start + step, whole)].reshape(-1, self.block)
        if whole < vector.size:
            yield vector[whole:].reshape(1, -1)

    def _pack(self, codes: Codes) -> bytes:
        if self.bits == 1:
            return np.packbits(codes, bitorder="little").tobytes()
        per_byte = 8 // self.bits
        spare = -codes.size % per_byte
        columns = np.concatenate((codes, np.zeros(spare, np.uint8))) if spare else codes
        columns = columns.reshape(-1, per_byte)
        packed = columns[:, 0].copy()
        for place in range(1, per_byte):
            packed |= columns[:, place] << (self.bits * place)
        return packed.tobytes()

    def _piece_blocks(self) -> int:
        return PIECE_VALUES // self.block

    def _num_blocks(self, num_parameters: int) -> int:
        return -(-num_parameters // self.block)

    def _code_bytes(self, num_values: int) -> int:
        return -(-num_values * self.bits // 8)


def _within_segments(start: int, values: Vector) -> Iterator[Piece]:
    """One piece, or two where the values cross a multiple of SEGMENT_VALUES: blocks of any size need not divide it."""
    cut = SEGMENT_VALUES - start % SEGMENT_VALUES
    for part in (values[:cut], values[cut:]):
        if part.size:
            yield Piece(slice(start, start + part.size), slice(None), part)
            start += part.size


@cache
def _byte_table(codec: type[BlockwiseCodec]) -> tuple[Vector, float]:
    """float32 (256, values a byte), read-only: the levels that each byte stands for; and the largest magnitude."""
    shifts = np.arange(0, 8, codec.bits)
    codes = (np.arange(256)[:, None] >> shifts) & ((1 << codec.bits) - 1)
    table: Vector = np.array(codec.levels, np.float32)[codes]
    table.flags.writeable = False
    return table, float(np.abs(table).max())
