"""sparse: the k largest of every chunk, two bits a value, gaps between indices Rice-coded.

At k = 64 of 4096: 0.0190 bytes a parameter, 211 times less than float32, lossless in the indices. For large models and
thin links, always with error feedback. After DeMo and SparseLoCo (arXiv:2508.15706), whose indices take 12 bits.

The two magnitudes of a chunk are those that make its squared error least (exact two-means over its sorted values);
each is stored as an 8-bit float (protocol.codecs.scales). Body: segments of 2^20 parameters, each

    exponent i16; 2 scale bytes a chunk (small, large); one sign bit a value; one large-magnitude bit a value; indices

The values of a chunk are in the order of their indices. A last chunk of t values is a segment of its own with
max(1, k t / chunk) of them. Shape letters: N chunks, M values a chunk, K values sent.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from protocol.codecs.bits import Reader, bytes_of_bits, pack_flags, unpack_flags
from protocol.codecs.indices import pack_plain, pack_rice, plain_bytes, read_plain, read_rice, rice_bytes_max
from protocol.codecs.payload import (
    HEADER_BYTES,
    SEGMENT_VALUES,
    PayloadHeader,
    Piece,
    PiecewiseCodec,
    Vector,
    check_shape,
)
from protocol.codecs.scales import exponent_of, load_float8, store_float8
from protocol.codecs.selection import select_largest
from protocol.errors import ConfigError

_CHUNK_MIN, _CHUNK_MAX = 16, 1 << 16
_EXPONENT = struct.Struct("<h")
PLAIN, RICE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """Chunks that are coded together: parameters `start` to `start + num_chunks * length`."""

    start: int
    num_chunks: int
    length: int
    k: int

    @property
    def where(self) -> slice:
        return slice(self.start, self.start + self.num_chunks * self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCodec(PiecewiseCodec):
    """Options: `k` values of every `chunk` (a power of two); `packing` of the indices, 0 plain or 1 Rice."""

    name: ClassVar[str] = "sparse"
    codec_id: ClassVar[int] = 7
    k: int = 64
    chunk: int = 4096
    packing: int = RICE

    def __post_init__(self) -> None:
        if not _CHUNK_MIN <= self.chunk <= _CHUNK_MAX or self.chunk & (self.chunk - 1):
            raise ConfigError(
                f"codec sparse: chunk = {self.chunk} is not a power of two from {_CHUNK_MIN} to {_CHUNK_MAX}"
            )
        if not 1 <= self.k <= self.chunk:
            raise ConfigError(f"codec sparse: k = {self.k} is not from 1 to chunk = {self.chunk}")
        if self.packing not in (PLAIN, RICE):
            raise ConfigError(f"codec sparse: packing = {self.packing} is neither 0 (plain) nor 1 (Rice)")

    def encode(self, vector: Vector) -> bytes:
        check_shape(vector)  # selection checks the values
        vector = np.ascontiguousarray(vector)
        parts = [self._header(vector.size)]
        parts += [self._encode_segment(vector, segment) for segment in self._segments(vector.size)]
        return b"".join(parts)

    def payload_bytes_max(self, num_parameters: int) -> int:
        index_bytes = plain_bytes if self.packing == PLAIN else rice_bytes_max
        whole, rest = divmod(num_parameters, self.chunk)
        full, left = divmod(whole, self._segment_chunks())
        total = HEADER_BYTES
        for count, num_chunks, length in (
            (full, self._segment_chunks(), self.chunk),
            (1, left, self.chunk),
            (1, 1, rest),
        ):
            if count and num_chunks and length:
                k = self._k_of(length)
                fixed = _EXPONENT.size + 2 * num_chunks + 2 * bytes_of_bits(num_chunks * k)
                total += count * (fixed + index_bytes(num_chunks, k, length))
        return total

    def _decode(self, body: memoryview, header: PayloadHeader) -> Iterator[Piece]:
        read_positions = read_plain if self.packing == PLAIN else read_rice
        reader = Reader(body)
        for segment in self._segments(header.num_parameters):
            shape = (segment.num_chunks, segment.k)
            count = segment.num_chunks * segment.k
            (exponent,) = _EXPONENT.unpack(reader.take(_EXPONENT.size))
            scales = load_float8(reader.take(2 * segment.num_chunks), exponent, 1.0)
            negative_nk = unpack_flags(reader.take(bytes_of_bits(count)), count).reshape(shape)
            large_nk = unpack_flags(reader.take(bytes_of_bits(count)), count).reshape(shape)
            positions_nk = read_positions(reader, *shape, segment.length)
            bits_n2 = scales.view(np.uint32).reshape(-1, 2)  # as integers: faster than np.where and np.negative
            bits_nk = large_nk * (bits_n2[:, 1:] - bits_n2[:, :1])
            bits_nk += bits_n2[:, :1]
            bits_nk |= negative_nk.astype(np.uint32) << 31
            yield Piece(segment.where, positions_nk.reshape(-1), bits_nk.view(np.float32).reshape(-1))
        reader.finish()

    def _encode_segment(self, vector: Vector, segment: _Segment) -> bytes:
        values = vector[segment.where]
        if segment.length < self.chunk:  # zeros tie at worst, and then the lower index, a real value, is selected
            values = np.pad(values, (0, self.chunk - segment.length))
        chunks_nm = values.reshape(segment.num_chunks, self.chunk)
        positions_nk, sent_nk = select_largest(chunks_nm, segment.k)
        magnitudes_nk = np.abs(sent_nk)
        scales_n2, least_large_n = _fit_two_levels(magnitudes_nk)
        exponent = exponent_of(scales_n2)
        pack_positions = pack_plain if self.packing == PLAIN else pack_rice
        return b"".join(
            (
                _EXPONENT.pack(exponent),
                store_float8(scales_n2, exponent).tobytes(),
                pack_flags(sent_nk < 0),
                pack_flags(magnitudes_nk >= least_large_n[:, None]),
                pack_positions(positions_nk, segment.length),
            )
        )

    def _segments(self, num_parameters: int) -> Iterator[_Segment]:
        whole, rest = divmod(num_parameters, self.chunk)
        step = self._segment_chunks()
        for first in range(0, whole, step):
            num_chunks = min(step, whole - first)
            yield _Segment(start=first * self.chunk, num_chunks=num_chunks, length=self.chunk, k=self.k)
        if rest:
            yield _Segment(start=whole * self.chunk, num_chunks=1, length=rest, k=self._k_of(rest))

    def _segment_chunks(self) -> int:
        return SEGMENT_VALUES // self.chunk

    def _k_of(self, length: int) -> int:
        return max(1, self.k * length // self.chunk)


def _fit_two_levels(magnitudes_nk: Vector) -> tuple[Vector, Vector]:
    """Scales (N, 2), small and large, and the least magnitude (N,) that is large: least squares."""
    k = magnitudes_nk.shape[1]
    falling_nk = np.sort(magnitudes_nk, axis=1)[:, ::-1]
    num_large = np.arange(1, k + 1)
    num_small = np.maximum(k - num_large, 1)  # with nothing small, what is divided by it is zero as well
    sums_nk = np.cumsum(falling_nk, axis=1, dtype=np.float64)
    # The split with the least squared error is the one with the most variance between its two sides.
    spreads_nk = sums_nk - sums_nk[:, -1:] * (num_large / k)
    spreads_nk *= spreads_nk
    spreads_nk *= 1.0 / (num_large * num_small)
    best_n = np.argmax(spreads_nk, axis=1)
    rows = np.arange(len(best_n))
    large_sums_n = sums_nk[rows, best_n]
    scales_n2 = np.stack(
        ((sums_nk[:, -1] - large_sums_n) / num_small[best_n], large_sums_n / num_large[best_n]), axis=1
    )
    return scales_n2.astype(np.float32), falling_nk[rows, best_n]
