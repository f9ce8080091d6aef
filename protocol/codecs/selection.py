"""The k largest magnitudes of every chunk, exactly k, ties to the lower index. Vectorised over chunks.

Partitioning every chunk would be too slow. Instead the values of a chunk are dealt into groups, of which only the
largest counts: the k-th largest group maximum is a lower bound of the k-th largest magnitude, since k groups hold a
value that reaches it. The few values that reach the bound (about 14 % more than k) are then sorted exactly.

Shape letters: N chunks, M values a chunk, G groups a chunk, K values selected.
"""

import numpy as np
from numpy.typing import NDArray

from protocol.codecs.payload import Vector

_GROUPS_A_VALUE = 4  # G / K: more groups make the bound closer, fewer make it cheaper
_MAGNITUDE_BITS = 31
_MAGNITUDE_MASK = (1 << _MAGNITUDE_BITS) - 1


def select_largest(chunks_nm: Vector, k: int) -> NDArray[np.int64]:
    """Indices (N, K) by falling magnitude. M is a power of two, N * M at most 2^32, 1 <= K <= M; no NaN."""
    num_chunks, chunk = chunks_nm.shape
    # Read as integers, magnitudes of floats keep their order, and integers compare faster.
    magnitudes_nm = chunks_nm.view(np.int32) & np.int32(_MAGNITUDE_MASK)
    bounds_n = _lower_bounds(magnitudes_nm, k)
    reaching_nm = magnitudes_nm >= np.maximum(bounds_n, 1)[:, None]
    # A chunk with fewer than K values that are not zero is filled with its first zeros, all among its first K values.
    reaching_nm[bounds_n == 0, :k] = True
    candidates = np.flatnonzero(reaching_nm)
    index_bits = chunk.bit_length() - 1
    rows = candidates >> index_bits
    falling = _MAGNITUDE_MASK - magnitudes_nm.reshape(-1)[candidates].astype(np.int64)
    keys = (((rows << _MAGNITUDE_BITS) | falling) << index_bits) | (candidates & (chunk - 1))
    keys.sort()
    starts_n = np.searchsorted(rows, np.arange(num_chunks))
    selected_nk: NDArray[np.int64] = keys[starts_n[:, None] + np.arange(k)] & (chunk - 1)
    return selected_nk


def _lower_bounds(magnitudes_nm: NDArray[np.int32], k: int) -> NDArray[np.int32]:
    num_chunks, chunk = magnitudes_nm.shape
    groups = min(chunk, 1 << (_GROUPS_A_VALUE * k - 1).bit_length())
    largest_ng = magnitudes_nm.reshape(num_chunks, chunk // groups, groups).max(axis=1)
    largest_ng.partition(groups - k, axis=1)
    bounds_n: NDArray[np.int32] = largest_ng[:, groups - k]
    return bounds_n
