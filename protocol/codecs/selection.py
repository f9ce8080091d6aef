"""The k largest magnitudes of every chunk, exactly k, ties to the lower index. Vectorised over chunks.

Partitioning every chunk would be too slow. Instead the values of a chunk are dealt into groups, of which only the
largest counts: the k-th largest group maximum is a lower bound of the k-th largest magnitude, since k groups hold a
value that reaches it. Among the few values that reach the bound (about 5 % more than k) the k-th largest is found.

Floats are handled as integers: without the sign bit their order is the same. For the bound the upper 16 bits of a
magnitude are enough, and half as much to go over. Shape letters: N chunks, M values a chunk, G groups a chunk,
C candidates in all, W candidates of a chunk at most, K values selected.
"""

import numpy as np
from numpy.typing import NDArray

from protocol.codecs.payload import ENCODED_MAX, Vector
from protocol.errors import PayloadError

_CACHED_VALUES = 1 << 18  # the passes over all values take so many at a time, so that they stay in a core's cache
_GROUPS_A_VALUE = 4  # G / K: more groups make the bound closer, fewer make it cheaper
_MAGNITUDE = np.int32(0x7FFF_FFFF)
_DROPPED_BITS = 15  # of a magnitude's 31
_LARGEST = int(np.float32(ENCODED_MAX).view(np.int32))

Bits = NDArray[np.int32]


def select_largest(chunks_nm: Vector, k: int) -> tuple[NDArray[np.int64], Vector]:
    """Positions (N, K) in the flattened chunks, rising, and the values there (N, K).

    `chunks_nm` is contiguous, M a power of two from 8, 1 <= K <= M. Raises PayloadError for NaN, infinities, and
    magnitudes above ENCODED_MAX.
    """
    num_chunks, chunk = chunks_nm.shape
    candidates_c, bits_c = _candidates(chunks_nm.view(np.int32), k)
    starts_n = np.searchsorted(candidates_c, np.arange(num_chunks) * chunk)
    selected_c = _reach_kth_largest(bits_c & _MAGNITUDE, starts_n, k)
    values_nk = bits_c[selected_c].view(np.float32).reshape(num_chunks, k)
    return candidates_c[selected_c].reshape(num_chunks, k), values_nk


def _candidates(bits_nm: Bits, k: int) -> tuple[NDArray[np.int64], Bits]:
    """Flat positions (C,), rising, and bits (C,) of values among which the K largest of every chunk are; K at least."""
    num_chunks, chunk = bits_nm.shape
    step = max(1, min(_CACHED_VALUES // chunk, num_chunks))
    shifted = np.empty((step, chunk), np.uint32)
    upper = np.empty((step, chunk), np.uint16)
    reaching = np.empty((step, chunk), np.bool_)
    found, found_bits = [], []
    for first in range(0, num_chunks, step):
        rows = min(step, num_chunks - first)
        bits = bits_nm[first : first + rows]
        np.right_shift(bits.view(np.uint32), _DROPPED_BITS, out=shifted[:rows])
        np.copyto(upper[:rows], shifted[:rows], casting="unsafe")  # the sign is dropped here
        bounds = _lower_bounds(upper[:rows], k)
        np.greater_equal(upper[:rows], bounds[:, None], out=reaching[:rows])
        for row in np.flatnonzero(bounds == 0):  # whatever is not zero, and the first zeros
            reaching[row] = bits[row] & _MAGNITUDE
            reaching[row, :k] = True
        places = _positions(reaching[:rows].reshape(-1))
        found.append(places + first * chunk)
        found_bits.append(bits.reshape(-1).take(places))
    return np.concatenate(found), np.concatenate(found_bits)


def _lower_bounds(upper_nm: NDArray[np.uint16], k: int) -> NDArray[np.uint16]:
    num_chunks, chunk = upper_nm.shape
    groups = min(chunk, 1 << (_GROUPS_A_VALUE * k - 1).bit_length())
    largest_ng = upper_nm.reshape(num_chunks, chunk // groups, groups).max(axis=1).astype(np.int32)
    largest_ng.partition(groups - k, axis=1)
    bounds_n: NDArray[np.uint16] = largest_ng[:, groups - k].astype(np.uint16)
    return bounds_n


def _reach_kth_largest(magnitudes_c: Bits, starts_n: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Which candidates are among the K largest of their chunk; K of each. Ties: the first ones."""
    if int(magnitudes_c.max()) > _LARGEST:
        raise PayloadError("the vector holds NaN, an infinity or a value above 1e35: the training has diverged")
    counts_n = np.diff(starts_n, append=magnitudes_c.size)
    width = int(counts_n.max())
    rows_nw = np.full((counts_n.size, width), -1, np.int32)
    rows_nw[np.arange(width) < counts_n[:, None]] = magnitudes_c
    rows_nw.partition(width - k, axis=1)
    kth_largest_c = np.repeat(rows_nw[:, width - k], counts_n)
    selected_c: NDArray[np.bool_] = magnitudes_c >= kth_largest_c
    if np.count_nonzero(selected_c) > counts_n.size * k:
        tied_c = magnitudes_c == kth_largest_c
        missing_n = k - np.add.reduceat(magnitudes_c > kth_largest_c, starts_n, dtype=np.int64)
        place_c = np.cumsum(tied_c)
        before_n = place_c[starts_n] - tied_c[starts_n]
        selected_c &= ~tied_c | (place_c <= np.repeat(before_n + missing_n, counts_n))
    return selected_c


def _positions(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """np.flatnonzero for few flags, in two steps: the words of 8 flags that have any, then the flags in those."""
    words = flags.view(np.uint64)
    places = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[places].view(np.bool_))
    positions: NDArray[np.int64] = (places[found >> 3] << 3) | (found & 7)
    return positions
