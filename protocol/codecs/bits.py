"""Bit streams, vectorised: fields of one width, and unary numbers. Lowest bit first throughout.

`Reader` walks over bytes from a peer and refuses to read past their end. No function here loops over values.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protocol.errors import PayloadError

Bytes = NDArray[np.uint8]


class Reader:
    """A cursor over the bytes of a payload."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._place = 0

    def take(self, num_bytes: int) -> memoryview:
        """The next bytes. Raises PayloadError when there are fewer."""
        start, self._place = self._place, self._place + num_bytes
        if self._place > len(self._body):
            raise PayloadError("the payload is truncated")
        return self._body[start : self._place]

    def finish(self) -> None:
        """Raise PayloadError unless everything was read."""
        if self._place != len(self._body):
            raise PayloadError(f"the payload has {len(self._body) - self._place} bytes too many")


def bytes_of_bits(num_bits: int) -> int:
    """Whole bytes that hold so many bits."""
    return -(-num_bits // 8)


def pack_flags(flags: NDArray[np.bool_]) -> bytes:
    """One bit a flag."""
    return np.packbits(flags, bitorder="little").tobytes()


def unpack_flags(packed: memoryview, count: int) -> NDArray[np.bool_]:
    """The inverse of `pack_flags`; `packed` holds bytes_of_bits(count) bytes."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count, bitorder="little").view(np.bool_)


def pack_fields(values: NDArray[np.uint32], width: int) -> bytes:
    """Values below 2^width, 0 <= width <= 32, each in `width` bits, one after another."""
    # Eight fields take exactly `width` bytes, so what happens to one row of eight happens to all rows at once.
    fields = np.zeros((bytes_of_bits(values.size), 8), "<u4")
    fields.reshape(-1)[: values.size] = values
    twos = fields.view("<u8")
    pairs = (twos & np.uint64(0xFFFF_FFFF)) | (twos >> np.uint64(32) << np.uint64(width))
    words = np.zeros((len(pairs), 4), "<u8")
    for place in range(4):
        word, shift = divmod(2 * width * place, 64)
        words[:, word] |= pairs[:, place] << np.uint64(shift)
        if shift + 2 * width > 64:
            words[:, word + 1] |= pairs[:, place] >> np.uint64(64 - shift)
    rows = np.ndarray(len(words), f"V{width}", words, strides=(32,))
    return rows.tobytes()[: bytes_of_bits(values.size * width)]


def unpack_fields(packed: memoryview, count: int, width: int) -> NDArray[np.uint32]:
    """The inverse of `pack_fields`; `packed` holds bytes_of_bits(count * width) bytes."""
    starts, shifts = _field_places(count, width)
    windows = np.ndarray(len(packed) + 1, "<u8", bytes(packed) + bytes(8), strides=(1,))  # 8 bytes from every byte on
    fields = (windows.take(starts) >> shifts).astype(np.uint32)
    fields &= np.uint32((1 << width) - 1)
    return fields


@lru_cache(maxsize=4)
def _field_places(count: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The byte in which each field begins, and the bit."""
    bits = np.arange(count) * width
    return bits >> 3, (bits & 7).astype(np.uint64)


def pack_unary(values: NDArray[np.uint32]) -> bytes:
    """Each value as so many zeros and a one."""
    ends = np.cumsum(values, dtype=np.int64)
    ends += np.arange(values.size)
    bits = np.zeros(int(ends[-1]) + 1, np.bool_)
    bits[ends] = True
    return np.packbits(bits, bitorder="little").tobytes()


def unary_ends(packed: memoryview, count: int) -> NDArray[np.int64]:
    """Where the ones of `pack_unary`'s result are: the i-th, from 0, at i + the sum of values[: i + 1].

    Raises PayloadError unless `packed` holds `count` numbers and no spare byte.
    """
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").view(np.bool_)
    ends = np.flatnonzero(bits)
    if ends.size != count:
        raise PayloadError(f"a unary stream does not hold {count} numbers")
    if bytes_of_bits(int(ends[-1]) + 1) != len(packed):
        raise PayloadError("a unary stream has spare bytes")
    return ends
