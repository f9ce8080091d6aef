"""Bit streams, vectorised: fields of one width, and unary numbers. Lowest bit first throughout.

`Reader` walks over bytes from a peer and refuses to read past their end. No function here loops over values.
"""

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
    fields = np.pad(values.astype(np.uint64), (0, -values.size % 8)).reshape(-1, 8)
    rows = np.zeros((len(fields), width), np.uint8)
    for place in range(8):
        first, shift = divmod(place * width, 8)
        window = fields[:, place] << np.uint64(shift)
        for byte in range(first, bytes_of_bits((place + 1) * width)):
            rows[:, byte] |= (window >> np.uint64(8 * (byte - first))).astype(np.uint8)
    return rows.tobytes()[: bytes_of_bits(values.size * width)]


def unpack_fields(packed: memoryview, count: int, width: int) -> NDArray[np.uint32]:
    """The inverse of `pack_fields`; `packed` holds bytes_of_bits(count * width) bytes."""
    num_rows = bytes_of_bits(count)
    rows = np.zeros(num_rows * width, np.uint8)
    rows[: len(packed)] = np.frombuffer(packed, np.uint8)
    columns = rows.reshape(num_rows, width).T.astype(np.uint64)
    fields = np.zeros((num_rows, 8), np.uint32)
    for place in range(8):
        first, shift = divmod(place * width, 8)
        window = np.zeros(num_rows, np.uint64)
        for byte in range(first, bytes_of_bits((place + 1) * width)):
            window |= columns[byte] << np.uint64(8 * (byte - first))
        fields[:, place] = (window >> np.uint64(shift)) & np.uint64((1 << width) - 1)
    return fields.reshape(-1)[:count]


def pack_unary(values: NDArray[np.int64]) -> bytes:
    """Each value as so many zeros and a one."""
    ends = np.cumsum(values + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1, np.uint8)
    bits[ends] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_unary(packed: memoryview, count: int) -> NDArray[np.int64]:
    """The inverse of `pack_unary`. Raises PayloadError unless `packed` holds `count` numbers and no spare byte."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").view(np.bool_)
    if np.count_nonzero(bits) != count:
        raise PayloadError(f"a unary stream does not hold {count} numbers")
    ends = np.flatnonzero(bits)
    if bytes_of_bits(int(ends[-1]) + 1) != len(packed):
        raise PayloadError("a unary stream has spare bytes")
    return np.diff(ends, prepend=-1) - 1
