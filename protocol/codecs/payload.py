"""The payload format that all codecs share, the `Codec` interface, and the checks on hostile bytes.

A payload is a 28-byte header and a body:

    magic "MHPL", version u8, codec id u8, exponent i16, D u64, three options u32 (unused ones zero); little-endian

`exponent` is a power of two that multiplies every scale in the body (zero where a codec stores no scales), so that
float16 scales keep their precision however small the pseudo-gradient is.

Invariants: nothing large is allocated before D was compared with the receiver's own number of parameters and the
length with the codec's bound; every bad input raises PayloadError and nothing else; decoded values are finite and at
most `DECODED_MAX` in magnitude; memory beyond the result is bounded by pieces, whatever D is. Arithmetic that replicas
must agree on is elementwise float32, multiply and add apart. It does not sign, hash or store payloads.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.errors import PayloadError

MAGIC = b"MHPL"
VERSION = 1
PIECE_VALUES = 1 << 16  # values handled at a time: 256 KiB of float32, so that a piece stays in a core's cache
SEGMENT_VALUES = 1 << 20  # no piece lies on both sides of a multiple of it, so several payloads can be decoded abreast
_CHECKED_VALUES = 1 << 18  # the same for passes that only read
ENCODED_MAX = 2.0**119  # a pseudo-gradient with larger values has diverged
DECODED_MAX = 2.0**120  # rounding may lift a scale above ENCODED_MAX, never above this; sums of 256 stay finite

_HEADER = struct.Struct("<4sBBhQ3I")
HEADER_BYTES = _HEADER.size

Options = tuple[int, int, int]
Vector = NDArray[np.float32]


class Piece(NamedTuple):
    """Decoded values, float32 (n,): they are vector[span][where]. `where` is slice(None), or rising indices (n,)."""

    span: slice
    where: slice | NDArray[np.int64]
    values: Vector

    def add_to(self, part: Vector, factor: np.float32) -> None:
        """`part`, which is vector[span], += factor * values: one multiply and one add, both rounded to float32."""
        if isinstance(self.where, slice):
            part += factor * self.values  # all of it
        else:
            np.add.at(part, self.where, factor * self.values)  # faster than taking, adding and putting back


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadSummary:
    """What a receiver needs to know of a payload that passed every check."""

    codec: str
    norm: float  # L2 norm of the decoded vector, accumulated in float64
    num_values: int  # values that were sent: D for dense codecs


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadHeader:
    """The fixed part of every payload."""

    codec_id: int
    exponent: int
    num_parameters: int
    options: Options

    def to_bytes(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.codec_id, self.exponent, self.num_parameters, *self.options)

    @classmethod
    def from_bytes(cls, payload: bytes) -> "PayloadHeader":
        """Parse the first 28 bytes. Raises PayloadError unless magic and version are ours."""
        if len(payload) < HEADER_BYTES:
            raise PayloadError(f"a payload of {len(payload)} bytes is shorter than its {HEADER_BYTES}-byte header")
        return _parse_header(payload[:HEADER_BYTES])


@lru_cache(maxsize=64)
def _parse_header(header: bytes) -> PayloadHeader:
    magic, version, codec_id, exponent, num_parameters, *options = _HEADER.unpack(header)
    if magic != MAGIC:
        raise PayloadError("not a payload: the magic bytes are wrong")
    if version != VERSION:
        raise PayloadError(f"payload version {version}; this program reads version {VERSION}")
    return PayloadHeader(
        codec_id=codec_id,
        exponent=exponent,
        num_parameters=num_parameters,
        options=(options[0], options[1], options[2]),
    )


class Codec(Protocol):
    """How a pseudo-gradient becomes bytes and bytes become a pseudo-gradient. D: number of parameters.

    A codec reads only payloads that were written with its own options; `protocol.codecs.codec_of` finds the codec
    that a payload names.
    """

    @property
    def name(self) -> str:
        """The name in the registry."""
        ...

    def encode(self, vector: Vector) -> bytes:
        """Encode float32 (D,), D >= 1. Raises PayloadError for NaN, infinities, and magnitudes above ENCODED_MAX."""
        ...

    def encode_rows(self, rows: Vector) -> list[bytes]:
        """`encode` of every row of float32 (P, D), C-contiguous. Raises PayloadError as `encode` does."""
        ...

    def decode(self, payload: bytes, num_parameters: int) -> Vector:
        """Decode to float32 (D,). Raises PayloadError unless the payload is well formed and of D parameters."""
        ...

    def decode_rows(self, payloads: Sequence[bytes], num_parameters: int) -> Vector:
        """`decode` of every payload: float32 (P, D), to look at. Raises PayloadError as `decode` does."""
        ...

    def accumulate(self, payload: bytes, coefficient: float, out: Vector) -> None:
        """`out += float32(coefficient) * decode(payload)`: one multiply, one add, both rounded to float32.

        Bitwise the same as doing it with the decoded vector, save that a negative zero in `out` may stay one where a
        sparse codec sent nothing (a sum that starts from zeros never holds one). Raises PayloadError as `decode`
        does; `out` is then of no use.
        """
        ...

    def pieces(self, payload: bytes, num_parameters: int) -> Iterator[Piece]:
        """The decoded vector, piece by piece, rising; no piece crosses a multiple of SEGMENT_VALUES, none is missing.

        What is wrong at a place raises PayloadError there, bytes too many at the end.
        """
        ...

    def inspect(self, payload: bytes, num_parameters: int) -> PayloadSummary:
        """Check everything that `decode` checks, and measure. Raises PayloadError."""
        ...

    def payload_bytes_max(self, num_parameters: int) -> int:
        """No payload of D parameters is longer: the limit to set before receiving one."""
        ...


class PiecewiseCodec(ABC):
    """What the codecs have in common: a payload is decoded in pieces of bounded size.

    A subclass is a frozen dataclass whose fields are its options: integers, in the order of the header.
    """

    __slots__ = ()
    name: ClassVar[str]
    codec_id: ClassVar[int]

    @abstractmethod
    def encode(self, vector: Vector) -> bytes: ...

    @abstractmethod
    def payload_bytes_max(self, num_parameters: int) -> int: ...

    @abstractmethod
    def _decode(self, body: memoryview, header: PayloadHeader) -> Iterator[Piece]:
        """What `pieces` yields; no position twice, values at most DECODED_MAX. Raises PayloadError."""

    @property
    def options(self) -> Options:
        """The options as they stand in the header."""
        return _options_of(self)

    def encode_rows(self, rows: Vector) -> list[bytes]:
        return [self.encode(row) for row in rows]

    def decode(self, payload: bytes, num_parameters: int) -> Vector:
        pieces = self.pieces(payload, num_parameters)
        out = np.zeros(num_parameters, np.float32)
        _put(pieces, out)
        return out

    def decode_rows(self, payloads: Sequence[bytes], num_parameters: int) -> Vector:
        rows = np.zeros((len(payloads), num_parameters), np.float32)
        for payload, row in zip(payloads, rows, strict=True):
            _put(self.pieces(payload, num_parameters), row)
        return rows

    def accumulate(self, payload: bytes, coefficient: float, out: Vector) -> None:
        factor = np.float32(coefficient)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever commits the sum checks that it is finite
            for piece in self.pieces(payload, out.size):
                piece.add_to(out[piece.span], factor)

    def inspect(self, payload: bytes, num_parameters: int) -> PayloadSummary:
        square, num_values = 0.0, 0
        for piece in self.pieces(payload, num_parameters):
            wide = piece.values.astype(np.float64)
            square += float(np.square(wide, out=wide).sum())  # a product of vectors would wake BLAS's threads
            num_values += wide.size
        return PayloadSummary(codec=self.name, norm=square**0.5, num_values=num_values)

    def pieces(self, payload: bytes, num_parameters: int) -> Iterator[Piece]:
        """The checks that cost nothing, at once; then the pieces, each checked as it is decoded."""
        return self._decode(memoryview(payload)[HEADER_BYTES:], self._check_header(payload, num_parameters))

    def _check_header(self, payload: bytes, num_parameters: int) -> PayloadHeader:
        header = PayloadHeader.from_bytes(payload)
        if header.codec_id != self.codec_id or header.options != self.options:
            raise PayloadError(f"the payload was not written by the codec {self.name} with the options of this run")
        if header.num_parameters != num_parameters or num_parameters < 1:
            raise PayloadError(f"the payload is for {header.num_parameters} parameters, not for {num_parameters}")
        if len(payload) > self.payload_bytes_max(num_parameters):
            raise PayloadError(f"{len(payload)} bytes are more than {self.name} ever writes for {num_parameters}")
        return header

    def _header(self, num_parameters: int, exponent: int = 0) -> bytes:
        return _header_bytes(self.codec_id, exponent, num_parameters, self.options)


def _put(pieces: Iterable[Piece], out: Vector) -> None:
    for piece in pieces:
        out[piece.span][piece.where] = piece.values


@lru_cache(maxsize=64)
def _header_bytes(codec_id: int, exponent: int, num_parameters: int, options: Options) -> bytes:
    return PayloadHeader(
        codec_id=codec_id, exponent=exponent, num_parameters=num_parameters, options=options
    ).to_bytes()


@lru_cache(maxsize=64)
def _options_of(codec: PiecewiseCodec) -> Options:
    values = [*astuple(codec), 0, 0, 0]  # type: ignore[call-overload]  # every subclass is a dataclass
    return values[0], values[1], values[2]


def measure_error(codec: Codec, payload: bytes, vector: Vector) -> float:
    """The norm of what the payload leaves out over the norm of the vector, in its first segment; 0 for zeros."""
    rest = vector[:SEGMENT_VALUES].copy()
    whole = float(np.linalg.norm(rest))
    for piece in codec.pieces(payload, vector.size):
        if piece.span.start >= SEGMENT_VALUES:
            break
        piece.add_to(rest[piece.span], np.float32(-1.0))
    return float(np.linalg.norm(rest)) / whole if whole > 0.0 else 0.0


def check_vector(vector: Vector) -> None:
    """Raise PayloadError unless `vector` is float32 (D,) with D >= 1, finite and within ENCODED_MAX."""
    check_shape(vector)
    for start in range(0, vector.size, _CHECKED_VALUES):
        if not within(vector[start : start + _CHECKED_VALUES], ENCODED_MAX):
            raise PayloadError("the vector holds NaN, an infinity or a value above 1e35: the training has diverged")


def check_shape(vector: Vector) -> None:
    """Raise PayloadError unless `vector` is float32 (D,) with D >= 1."""
    if vector.dtype != np.float32 or vector.ndim != 1 or vector.size == 0:
        raise PayloadError(f"a codec encodes float32 of shape (D,), not {vector.dtype} of shape {vector.shape}")


def check_decoded(values: Vector) -> None:
    """Raise PayloadError unless all values are finite and within DECODED_MAX."""
    if not within(values, DECODED_MAX):
        raise PayloadError("the payload holds NaN, an infinity or a value above 1e36")


def within(values: Vector, limit: float) -> bool:
    """Whether all values lie in [-limit, limit]; NaN does not. Contiguous float32, limit above zero."""
    # Without the sign bit floats are ordered as integers are, and a bitwise or is at least each of its operands.
    bits = int(np.bitwise_or.reduce(values.view(np.uint32), axis=None)) & 0x7FFF_FFFF
    if bits <= _bits_of(limit):
        return True
    return bool(values.min() >= -limit) and bool(values.max() <= limit)


@lru_cache(maxsize=64)
def _bits_of(limit: float) -> int:
    return int(np.float32(limit).view(np.uint32))
