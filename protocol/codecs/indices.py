"""Which values of each chunk were sent: sorted positions to bytes and back, without loss.

Shape letters: N chunks, K values sent of a chunk, M values a chunk (M need not be a power of two). A position (of type
int64) counts through all chunks: n M + index.

Plain: every index in as many bits as M - 1 needs (12 for 4096).

Rice (Rice 1979, Golomb 1966): the gaps between indices, counted from zero in every chunk. A gap is quotient * d +
remainder; quotients go into a unary stream, remainders into one of fixed width, so both are read without a loop.
Remainders are stored in pairs of `pair_bits` bits, with d = isqrt(2^pair_bits): for even pair_bits these are Rice's
powers of two, the odd ones lie half way between (d = 45 between 32 and 64). At 64 of 4096 the odd one takes 7.45
bits an index instead of 7.50; the information limit is 7.37.
"""

import math
import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protocol.codecs.bits import Reader, bytes_of_bits, pack_fields, pack_unary, unary_ends, unpack_fields
from protocol.errors import PayloadError

Positions = NDArray[np.int64]
_RICE_HEADER = struct.Struct("<BI")  # pair_bits, bytes of the unary stream


def pack_plain(positions_nk: Positions, chunk: int) -> bytes:
    """Positions (N, K), rising."""
    indices_nk = positions_nk - _starts(len(positions_nk), chunk)
    return pack_fields(indices_nk.reshape(-1).astype(np.uint32), _width(chunk))


def read_plain(reader: Reader, num_chunks: int, k: int, chunk: int) -> Positions:
    """Positions (N, K). Raises PayloadError unless they rise, each in its chunk."""
    count = num_chunks * k
    fields = unpack_fields(reader.take(plain_bytes(num_chunks, k, chunk)), count, _width(chunk))
    indices_nk = fields.astype(np.int64).reshape(num_chunks, k)
    if (np.diff(indices_nk, axis=1) <= 0).any() or int(indices_nk[:, -1].max()) >= chunk:
        raise PayloadError("indices are out of order or out of range")
    indices_nk += _starts(num_chunks, chunk)
    return indices_nk


def plain_bytes(num_chunks: int, k: int, chunk: int) -> int:
    """The length of `pack_plain`'s result."""
    return bytes_of_bits(num_chunks * k * _width(chunk))


def pack_rice(positions_nk: Positions, chunk: int) -> bytes:
    """Positions (N, K), rising; with the pair_bits that makes them shortest."""
    num_chunks, k = positions_nk.shape
    gaps = _gaps(positions_nk, chunk)
    pair_bits = _shortest_pair_bits(gaps, _safe_pair_bits(num_chunks, k, chunk))
    divisor = np.uint32(_divisor(pair_bits))
    quotients = gaps // divisor
    remainders = np.zeros((-(-gaps.size // 2), 2), np.uint32)
    remainders.reshape(-1)[: gaps.size] = gaps - quotients * divisor
    packed = pack_fields(remainders[:, 0] * divisor + remainders[:, 1], pair_bits)
    unary = pack_unary(quotients)
    return _RICE_HEADER.pack(pair_bits, len(unary)) + packed + unary


def read_rice(reader: Reader, num_chunks: int, k: int, chunk: int) -> Positions:
    """Positions (N, K). Raises PayloadError unless each is in its chunk; they cannot but rise."""
    count = num_chunks * k
    pair_bits, unary_bytes = _RICE_HEADER.unpack(reader.take(_RICE_HEADER.size))
    if pair_bits > pair_bits_max(chunk) or unary_bytes > _unary_bytes_max(num_chunks, k, chunk, pair_bits):
        raise PayloadError("the index gaps are coded in a way that no encoder codes them")
    divisor = _divisor(pair_bits)
    num_pairs = -(-count // 2)
    pairs = unpack_fields(reader.take(bytes_of_bits(num_pairs * pair_bits)), num_pairs, pair_bits)
    if int(pairs.max()) >= divisor * divisor:
        raise PayloadError("a remainder of the index gaps is out of range")
    # An index is the sum of q d + r + 1 up to it, less one. With e the ends of the unary quotients, the sum of all q up
    # to the i-th, through all chunks, is e - i; so that of q d + r + 1 is d e + d + the sum of (r + 1 - d).
    remainders = np.empty((num_pairs, 2), np.int64)
    remainders[:, 0] = first = pairs // np.uint32(divisor)
    remainders[:, 1] = pairs - first * np.uint32(divisor)
    remainders += 1 - divisor
    sums = unary_ends(reader.take(unary_bytes), count)
    sums *= divisor
    sums += np.cumsum(remainders.reshape(-1)[:count])
    positions_nk = sums.reshape(num_chunks, k)
    starts_n1 = _starts(num_chunks, chunk)
    before_n1 = positions_nk[:-1, -1:] + 1
    positions_nk[0] += divisor - 1
    positions_nk[1:] += starts_n1[1:] - before_n1
    if int((positions_nk[:, -1:] - starts_n1).max()) >= chunk:
        raise PayloadError("indices are out of range")
    return positions_nk


def rice_bytes_max(num_chunks: int, k: int, chunk: int) -> int:
    """No result of `pack_rice` is longer, wherever the indices are."""
    return _RICE_HEADER.size + _rice_bytes_max(num_chunks, k, chunk, _safe_pair_bits(num_chunks, k, chunk))


def pair_bits_max(chunk: int) -> int:
    """With so many bits a pair no quotient is above zero, or none above one."""
    return 2 * _width(chunk)


def _gaps(positions_nk: Positions, chunk: int) -> NDArray[np.uint32]:
    positions = positions_nk.reshape(-1).astype(np.uint32)
    gaps = positions - np.uint32(1)
    gaps[1:] -= positions[:-1]
    gaps.reshape(positions_nk.shape)[:, :1] = positions_nk[:, :1] - _starts(len(positions_nk), chunk)
    return gaps


def _starts(num_chunks: int, chunk: int) -> Positions:
    """The first position of each chunk (N, 1)."""
    return np.arange(0, num_chunks * chunk, chunk)[:, None]


def _shortest_pair_bits(gaps: NDArray[np.uint32], safe: int) -> int:
    """Going down from the safe one, where the length stops falling: it has one minimum, but for rounding."""
    shortest = _rice_bytes(gaps, safe)
    for pair_bits in range(safe - 1, -1, -1):
        length = _rice_bytes(gaps, pair_bits)
        if length > shortest:
            return pair_bits + 1
        shortest = length
    return 0


def _rice_bytes(gaps: NDArray[np.uint32], pair_bits: int) -> int:
    pairs = bytes_of_bits(-(-gaps.size // 2) * pair_bits)
    quotients = gaps // np.uint32(_divisor(pair_bits))
    return pairs + bytes_of_bits(gaps.size + int(quotients.sum(dtype=np.uint32)))


@lru_cache
def _safe_pair_bits(num_chunks: int, k: int, chunk: int) -> int:
    """The pair_bits with the least upper bound. Evenly spread indices need it, clustered ones fewer."""
    choices = range(pair_bits_max(chunk) + 1)
    return min(choices, key=lambda bits: _rice_bytes_max(num_chunks, k, chunk, bits))


def _rice_bytes_max(num_chunks: int, k: int, chunk: int, pair_bits: int) -> int:
    pairs = bytes_of_bits(-(-num_chunks * k // 2) * pair_bits)
    return pairs + _unary_bytes_max(num_chunks, k, chunk, pair_bits)


def _unary_bytes_max(num_chunks: int, k: int, chunk: int, pair_bits: int) -> int:
    # The gaps of one chunk sum to at most chunk - k, so their quotients to at most that divided by the divisor.
    return bytes_of_bits(num_chunks * (k + (chunk - k) // _divisor(pair_bits)))


def _divisor(pair_bits: int) -> int:
    return math.isqrt(1 << pair_bits)


def _width(chunk: int) -> int:
    return (chunk - 1).bit_length()
