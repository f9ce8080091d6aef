"""The k largest magnitudes of every chunk, exactly k, ties to the lower index. Vectorised over chunks.

Partitioning every chunk would be too slow. Instead the values of a chunk are dealt into groups, of which only the
largest counts: the k-th largest group maximum is a lower bound of the k-th largest magnitude, since k groups hold a
value that reaches it. The few values that reach the bound (about 14 % more than k) are then sorted exactly.

Floats are handled as integers: without the sign bit their order is the same, and a value, its index and its sign fit
in one 64-bit key. Shape letters: N chunks, M values a chunk, G groups a chunk, C candidates, K values selected.
"""

import numpy as np
from numpy.typing import NDArray

from protocol.codecs.payload import ENCODED_MAX, Vector
from protocol.errors import PayloadError

_CACHED_VALUES = 1 << 18  # the passes over all values take so many at a time: 1 MiB, about a core's cache
_GROUPS_A_VALUE = 4  # G / K: more groups make the bound closer, fewer make it cheaper
_MAGNITUDE_BITS = 31
_MAGNITUDE_MASK = (1 << _MAGNITUDE_BITS) - 1
_LARGEST = int(np.float32(ENCODED_MAX).view(np.int32))

Keys = NDArray[np.int64]


def select_largest(chunks_nm: Vector, k: int) -> tuple[NDArray[np.int64], Vector]:
    """Indices (N, K) and values (N, K), by falling magnitude.

    `chunks_nm` is contiguous, M a power of two from 8, N * M at most 2^31 (what a key has room for), 1 <= K <= M.
    Raises PayloadError for NaN, infinities, and magnitudes above ENCODED_MAX.
    """
    chunk = chunks_nm.shape[1]
    index_bits = chunk.bit_length() - 1
    keys_nk = _sorted_keys(chunks_nm.view(np.int32), k, index_bits)[:, :k]
    magnitudes_nk = _MAGNITUDE_MASK - ((keys_nk >> (index_bits + 1)) & _MAGNITUDE_MASK)
    bits_nk = (magnitudes_nk | ((keys_nk & 1) << _MAGNITUDE_BITS)).astype(np.uint32)
    return (keys_nk >> 1) & (chunk - 1), bits_nk.view(np.float32)


def _sorted_keys(bits_nm: NDArray[np.int32], k: int, index_bits: int) -> Keys:
    """Keys (N, at least K), rising: chunk, falling magnitude, index, sign, from the highest bits to the lowest."""
    num_chunks, chunk = bits_nm.shape
    candidates_c = _candidates(bits_nm, k)
    bits_c = bits_nm.reshape(-1)[candidates_c].astype(np.int64)
    falling_c = ~bits_c & _MAGNITUDE_MASK
    chunks_c = candidates_c >> index_bits
    keys_c = ((chunks_c << _MAGNITUDE_BITS) | falling_c) << (index_bits + 1)
    keys_c |= ((candidates_c & (chunk - 1)) << 1) | (bits_c < 0)
    # One row a chunk, as long as the longest. What a row holds beyond its own keys belongs to later chunks, sorts last.
    starts_n = np.searchsorted(candidates_c, np.arange(num_chunks) << index_bits)
    width = int(np.diff(starts_n, append=keys_c.size).max())
    padded = np.concatenate((keys_c, np.full(width, np.iinfo(np.int64).max)))
    keys_nw: Keys = padded[starts_n[:, None] + np.arange(width)]
    keys_nw.sort(axis=1)
    return keys_nw


def _candidates(bits_nm: NDArray[np.int32], k: int) -> NDArray[np.int64]:
    """Flat positions (C,), rising, of values among which the K largest of every chunk are."""
    num_chunks, chunk = bits_nm.shape
    step = max(1, min(_CACHED_VALUES // chunk, num_chunks))
    magnitudes = np.empty((step, chunk), np.int32)
    reaching = np.empty((step, chunk), np.bool_)
    found = []
    for first in range(0, num_chunks, step):
        rows = min(step, num_chunks - first)
        np.bitwise_and(bits_nm[first : first + rows], np.int32(_MAGNITUDE_MASK), out=magnitudes[:rows])
        bounds = _lower_bounds(magnitudes[:rows], k)
        np.greater_equal(magnitudes[:rows], np.maximum(bounds, 1)[:, None], out=reaching[:rows])
        # A chunk with fewer than K values other than zero is filled with its first zeros, all among its first K values.
        reaching[:rows][bounds == 0, :k] = True
        found.append(_positions(reaching[:rows].reshape(-1)) + first * chunk)
    return np.concatenate(found)


def _lower_bounds(magnitudes_nm: NDArray[np.int32], k: int) -> NDArray[np.int32]:
    num_chunks, chunk = magnitudes_nm.shape
    groups = min(chunk, 1 << (_GROUPS_A_VALUE * k - 1).bit_length())
    largest_ng = magnitudes_nm.reshape(num_chunks, chunk // groups, groups).max(axis=1)
    if int(largest_ng.max()) > _LARGEST:
        raise PayloadError("the vector holds NaN, an infinity or a value above 1e35: the training has diverged")
    largest_ng.partition(groups - k, axis=1)
    bounds_n: NDArray[np.int32] = largest_ng[:, groups - k]
    return bounds_n


def _positions(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """np.flatnonzero for few flags, in two steps: the words of 8 flags that have any, then the flags in those."""
    words = flags.view(np.uint64)
    places = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[places].view(np.bool_))
    positions: NDArray[np.int64] = (places[found >> 3] << 3) | (found & 7)
    return positions
