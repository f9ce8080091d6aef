"""What a butterfly round checks of everything that comes from another peer, and what it hashes at the end.

Invariants: sizes are compared before anything is decoded, and every value is finite and bounded before it is used;
decoding the same bytes gives the same bits everywhere. Pure functions: no I/O, no clock.

Parts are encoded by hivemind's own compression and decoded here, because its decoders take shape, dtype and table sizes
from the sender's word. Shape letters: D parameters, N peers, V values of one part.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError
from hivemind.compression import CompressionInfo, Float16Compression, NoCompression, Uniform8BitQuantization
from hivemind.proto import averaging_pb2
from numpy.typing import NDArray

from protocol.codecs.payload import ENCODED_MAX, Vector, check_vector, within
from protocol.errors import ButterflyError, ConfigError, PayloadError

PART_VALUES_MAX = 1 << 18  # as hivemind: 512 KiB of float16
_TABLE_ENTRIES = 256
_TABLE_HEAD_BYTES = 8 + 4 * _TABLE_ENTRIES  # number of entries as int64, then the entries as float32
_MESSAGE_BYTES_MAX = 512  # of a message around its part: group id, weight, shape, names


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCodec:
    """How one part travels. `largest`: no input may be above it, where the encoding clips or overflows."""

    name: str
    compression: Any
    value_bytes: int
    head_bytes: int
    largest: float
    unpack: Callable[[bytes], Vector]

    def message_bytes_max(self, num_values: int) -> int:
        """No message with a part of so many values is longer."""
        return _MESSAGE_BYTES_MAX + self.head_bytes + self.value_bytes * num_values

    def encode(self, values_v: torch.Tensor) -> Any:
        """hivemind's runtime_pb2.Tensor of float32 (V,)."""
        return self.compression.compress(values_v, CompressionInfo.from_tensor(values_v))

    def decode(self, part: Any, num_values: int) -> torch.Tensor:
        """float32 (V,) of a runtime_pb2.Tensor. Raises PayloadError unless it is exactly such a part of V values."""
        if list(part.size) != [num_values]:
            raise PayloadError(f"a part of shape {tuple(part.size)[:4]}; it should be ({num_values},)")
        if part.compression != self.compression.compression_type or part.dtype != "float32":
            raise PayloadError(f"a part that is not float32 in the encoding {self.name}")
        if part.requires_grad or len(part.buffer) != self.head_bytes + self.value_bytes * num_values:
            raise PayloadError(f"a part of {len(part.buffer)} bytes for {num_values} values")
        values_v = self.unpack(part.buffer)
        if not within(values_v, 2.0 * self.largest):  # an average of buckets may round to more than the largest
            raise PayloadError(f"a part that holds NaN, an infinity or a value above {2.0 * self.largest:g}")
        return torch.from_numpy(values_v)

    def check_input(self, vector: Vector) -> None:
        """Raise PayloadError unless `vector` is finite float32 (D,) that the encoding does not clip."""
        check_vector(vector)
        if not within(vector, self.largest):
            raise PayloadError(f"the vector holds values above {self.largest:g}, which {self.name} does not carry")


def _unpack_float32(buffer: bytes) -> Vector:
    return np.frombuffer(buffer, "<f4").astype(np.float32)


def _unpack_float16(buffer: bytes) -> Vector:
    return np.frombuffer(buffer, "<f2").astype(np.float32)


def _unpack_uniform8(buffer: bytes) -> Vector:
    if int.from_bytes(buffer[:8], "little") != _TABLE_ENTRIES:
        raise PayloadError("a part whose table of values is not of 256 entries")
    table = np.frombuffer(buffer, "<f4", count=_TABLE_ENTRIES, offset=8).astype(np.float32)
    codes: NDArray[np.uint8] = np.frombuffer(buffer, np.uint8, offset=_TABLE_HEAD_BYTES)
    return table[codes]


PART_CODECS = {
    codec.name: codec
    for codec in (
        PartCodec(
            name="float32",
            compression=NoCompression(),
            value_bytes=4,
            head_bytes=0,
            largest=ENCODED_MAX,
            unpack=_unpack_float32,
        ),
        PartCodec(
            name="float16",
            compression=Float16Compression(),
            value_bytes=2,
            head_bytes=0,
            largest=65_504.0,
            unpack=_unpack_float16,
        ),
        PartCodec(
            name="uniform8",
            compression=Uniform8BitQuantization(),
            value_bytes=1,
            head_bytes=_TABLE_HEAD_BYTES,
            largest=1e15,  # it squares and sums in float32
            unpack=_unpack_uniform8,
        ),
    )
}


def get_part_codec(name: str) -> PartCodec:
    """Raises ConfigError for an unknown name."""
    if name not in PART_CODECS:
        raise ConfigError(f"unknown butterfly codec `{name}`; it is one of {', '.join(PART_CODECS)}")
    return PART_CODECS[name]


def part_values(num_parameters: int, num_peers: int) -> int:
    """V of all parts but the last, such that every reducer gets about the same number of full parts."""
    rounds = -(-num_parameters // (num_peers * PART_VALUES_MAX))
    return -(-num_parameters // (num_peers * rounds))


def parse_message(frame: bytes) -> Any:
    """A frame of a part stream as averaging_pb2.AveragingData. Raises PayloadError."""
    try:
        return averaging_pb2.AveragingData.FromString(frame)
    except DecodeError as error:
        raise PayloadError("a message that cannot be parsed") from error


def check_request(message: Any, group_id: bytes, weight: float, *, is_first: bool) -> None:
    """Raise PayloadError unless this is a part to average, of this group, with the weight that the group gives."""
    if is_first and (message.code != averaging_pb2.PART_FOR_AVERAGING or message.group_id != group_id):
        raise PayloadError("a first part that is not for this round")
    if message.weight != weight:
        raise PayloadError(f"a part with the weight {message.weight}; the group gives it {weight}")


def segment_digests(average: Vector, segment_sizes: Sequence[int]) -> bytes:
    """SHA-256, 32 bytes each, of the consecutive segments of float32 (D,), one for each reducer."""
    digests, start = [], 0
    for size in segment_sizes:
        digests.append(hashlib.sha256(average[start : start + size].data).digest())
        start += size
    return b"".join(digests)


def find_disagreement(own: str, peers: Sequence[str], digests: Sequence[bytes]) -> ButterflyError | None:
    """Who is to blame for averages that differ; None when all agree.

    `digests[i]`: what peer i says that it holds (segment_digests); `own`: us. A reducer is blamed for its segment,
    since it is part of every disagreement about it; whoever disagrees about our own segment is blamed himself.
    """
    place = peers.index(own)
    for reducer in range(len(peers)):
        segments = [every[32 * reducer : 32 * (reducer + 1)] for every in digests]
        differing = [peer for peer, segment in zip(peers, segments, strict=True) if segment != segments[place]]
        if not differing:
            continue
        if reducer == place:
            return ButterflyError(differing[0], "holds, or claims, another average of our part than we sent it")
        reason = f"did not send us the same average as {differing[0]}, or that one lies about it"
        return ButterflyError(peers[reducer], reason)
    return None
