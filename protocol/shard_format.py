"""The bytes of a data shard: rows of token ids behind a header that says how many.

    "MHSH", version u8, bytes per id u8 (2 or 4), zero u16, rows u32, columns u32, then the ids row by row

Little-endian. The ids take 2 bytes when the vocabulary has at most 65,536 entries, else 4. A row has one id more than
it trains: ids 0..n-1 are the inputs, 1..n what they should predict. The bytes come from elsewhere, so they are checked
in full.

Shape letters: R rows, C columns (sequence length + 1).
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.errors import PayloadError

_HEADER = struct.Struct("<4sBBHII")
_MAGIC = b"MHSH"
_VERSION = 1


def token_dtype(vocabulary_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest of uint16 and uint32 that holds every id below `vocabulary_size`."""
    return np.uint16 if vocabulary_size <= 1 << 16 else np.uint32


def encode_shard(rows: NDArray[Any], vocabulary_size: int) -> bytes:
    """The bytes of (R, C) token ids, all below `vocabulary_size`. Raises ValueError for any other array."""
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2 or rows.dtype.kind not in "iu":
        raise ValueError(f"a shard has at least one row of two integer ids, not {rows.shape} of {rows.dtype}")
    if rows.min() < 0 or rows.max() >= vocabulary_size:
        raise ValueError(f"a token id is outside the vocabulary of {vocabulary_size}")
    dtype = np.dtype(token_dtype(vocabulary_size)).newbyteorder("<")
    header = _HEADER.pack(_MAGIC, _VERSION, dtype.itemsize, 0, *rows.shape)
    return header + rows.astype(dtype).tobytes()


def decode_shard(data: bytes | memoryview, vocabulary_size: int) -> NDArray[np.int64]:
    """Token ids of shape (R, C) int64, writable, every one below `vocabulary_size`.

    Allocates at most 4 times the size of `data`, which the caller limits. Raises PayloadError for anything that
    `encode_shard` does not write.
    """
    if len(data) < _HEADER.size:
        raise PayloadError(f"a shard of {len(data)} bytes has no header")
    magic, version, id_bytes, zero, num_rows, num_columns = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or zero != 0:
        raise PayloadError("not a shard of a version that is known here; update manyhands")
    dtype = np.dtype(token_dtype(vocabulary_size)).newbyteorder("<")
    if id_bytes != dtype.itemsize:
        raise PayloadError(f"the shard has {id_bytes} bytes per id, its vocabulary needs {dtype.itemsize}")
    expected_bytes = _HEADER.size + num_rows * num_columns * id_bytes
    if num_rows < 1 or num_columns < 2 or len(data) != expected_bytes:
        raise PayloadError(f"a shard of {num_rows} x {num_columns} ids does not have {len(data)} bytes")
    ids = np.frombuffer(data, dtype=dtype, offset=_HEADER.size)
    if ids.max() >= vocabulary_size:
        raise PayloadError(f"the shard has an id outside the vocabulary of {vocabulary_size}")
    return ids.astype(np.int64).reshape(num_rows, num_columns)
