"""A replica: the state that every peer holds, and its one way forward, `apply_manifest`.

Invariants: the canonical bytes are a pure function of θ and momentum (a safetensors file with the tensors in the order
that safetensors writes them, no metadata); the digest is their SHA-256, so a state is a blob under its own digest; the
round is not part of them. Same state, same manifest, same payloads: the same bits on every machine. A state is never
changed: its arrays are read-only, and the next round is a new state.

It does not check signatures (protocol.documents), fetch payloads, or write files.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protocol.aggregation.merge import merge, merge_parts
from protocol.codecs import Codec, codec_of
from protocol.codecs.payload import within
from protocol.documents import ALL_SLICES, Accepted, GroupPayload, Manifest
from protocol.errors import ConfigError, VerificationError
from protocol.outer import OuterOptimizer, get_outer
from protocol.recycling import empty_vector
from protocol.signing import sha256_hex

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """θ after `round` merges. theta: float32 (D,), momentum: float32 (D,) or None; both become read-only views.

    Copy before handing either to code that writes, such as torch (`torch.from_numpy(state.theta.copy())`).
    """

    round: int
    theta: Vector
    momentum: Vector | None = None
    _digest: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", _read_only(self.theta))
        if self.momentum is not None:
            object.__setattr__(self, "momentum", _read_only(self.momentum))
            if self.momentum.shape != self.theta.shape:
                raise ValueError(f"theta has shape {self.theta.shape}, momentum {self.momentum.shape}")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `to_bytes()`, computed once, without making the bytes."""
        if not self._digest:
            sha256 = hashlib.sha256()
            for part in self._parts():
                sha256.update(part)
            self._digest.append(sha256.hexdigest())
        return self._digest[0]

    def to_bytes(self) -> bytes:
        """The canonical bytes: a safetensors file with `theta` and, if present, `momentum`."""
        return b"".join(self._parts())

    @classmethod
    def from_bytes(
        cls,
        data: bytes | memoryview,
        round: int,  # noqa: A002  # the name of the field that it becomes
        num_parameters: int,
        has_momentum: bool,
    ) -> "State":
        """The inverse of `to_bytes`, for bytes from anybody. The arrays are views of `data`: nothing is copied.

        Raises VerificationError unless `data` is exactly a canonical state of that size with finite values.
        """
        header = _safetensors_header(num_parameters, has_momentum)
        tensor_bytes = 4 * num_parameters
        if len(data) != len(header) + tensor_bytes * (1 + has_momentum) or data[: len(header)] != header:
            raise VerificationError(f"not a state of {num_parameters} parameters (momentum: {has_momentum})")
        tensors = np.frombuffer(data, "<f4", offset=len(header)).reshape(-1, num_parameters)
        _check_finite(tensors)
        return cls(round, tensors[-1], tensors[0] if has_momentum else None)

    def _parts(self) -> Iterator[bytes | memoryview]:
        yield _safetensors_header(self.theta.size, self.momentum is not None)
        if self.momentum is not None:
            yield self.momentum.data
        yield self.theta.data


def state_bytes_size(num_parameters: int, has_momentum: bool) -> int:
    """How many canonical bytes such a state has."""
    return len(_safetensors_header(num_parameters, has_momentum)) + 4 * num_parameters * (1 + has_momentum)


def apply_manifest(state: State, manifest: Manifest, read_payload: Callable[[str], bytes]) -> State:
    """The state after the round that `manifest` commits. The manifest's signature must have been checked.

    `read_payload(hash)` returns a payload's bytes; it is called once a contribution, in the manifest's order, and at
    most one payload more than fits into the size of θ, or into a mebibyte, is held at a time. A manifest without
    contributions changes nothing but the round. Raises VerificationError when the manifest does not follow from `state`
    or a payload is not the one that it names.
    """
    if manifest.round != state.round:
        raise VerificationError(f"the manifest is of round {manifest.round}; the state stands at round {state.round}")
    if manifest.base_digest != state.digest:
        raise VerificationError(
            f"the states diverged before round {manifest.round}: the manifest builds on {manifest.base_digest}, "
            f"here it is {state.digest}"
        )
    if manifest.slices != ALL_SLICES:
        raise VerificationError(f"a merge of the slices {', '.join(manifest.slices)} alone is not known here")
    optimizer = _optimizer_of(manifest)
    if not manifest.contributions:
        return State(state.round + 1, state.theta, state.momentum)
    if manifest.groups:
        accepted = ((_read_checked(group, read_payload), group.weight, 1.0) for group in manifest.groups)
    else:
        accepted = ((_read_checked(entry, read_payload), entry.weight, entry.clip) for entry in manifest.contributions)
    return merge_into(state, accepted, manifest.divisor, optimizer)


def merge_into(
    state: State, contributions: Iterable[tuple[bytes, float, float]], divisor: float, optimizer: OuterOptimizer
) -> State:
    """The next state: one outer step with the merge of (payload, weight, clip), as protocol.aggregation.merge does it.

    Merge, step and check go through the vector together, part by part. Raises VerificationError when the next
    state would not be finite, else as `merge_parts`.
    """
    theta = empty_vector(state.theta.size)
    momentum = empty_vector(state.theta.size) if optimizer.has_momentum else None
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
        for where, gradient in merge_parts(contributions, divisor, theta.size):
            optimizer.step(
                state.theta[where],
                None if state.momentum is None else state.momentum[where],
                gradient,
                next_theta=theta[where],
                next_momentum=None if momentum is None else momentum[where],
            )
            _check_finite(theta[where])
    return State(state.round + 1, theta, momentum)


def _optimizer_of(manifest: Manifest) -> OuterOptimizer:
    try:
        return get_outer(manifest.outer_optimizer, manifest.outer_learning_rate, manifest.outer_momentum)
    except ConfigError as error:
        raise VerificationError(f"the manifest of round {manifest.round}: {error}") from error


def merge_group(
    contributions: Sequence[Accepted], codec: Codec, num_parameters: int, read_payload: Callable[[str], bytes]
) -> bytes:
    """The payload that stands for a group's contributions, which are in canonical order: their mean, encoded.

    The same bits for everybody who merges them. Raises VerificationError and PayloadError as `apply_manifest` does.
    """
    accepted = ((_read_checked(entry, read_payload), entry.weight, entry.clip) for entry in contributions)
    return codec.encode(merge(accepted, sum(entry.weight for entry in contributions), num_parameters))


def _read_checked(entry: Accepted | GroupPayload, read_payload: Callable[[str], bytes]) -> bytes:
    payload = read_payload(entry.payload_hash)
    found = sha256_hex(payload)
    if found != entry.payload_hash or len(payload) != entry.payload_bytes:
        raise VerificationError(
            f"the payload of {_name(entry)} is {found} ({len(payload)} bytes); "
            f"the manifest names {entry.payload_hash} ({entry.payload_bytes} bytes)"
        )
    name = codec_of(payload).name
    if name != entry.codec:
        raise VerificationError(f"the payload of {_name(entry)} was written by {name}, not by {entry.codec}")
    return payload


def _name(entry: Accepted | GroupPayload) -> str:
    return entry.peer if isinstance(entry, Accepted) else f"a group of {len(entry.peers)}"


def _safetensors_header(num_parameters: int, has_momentum: bool) -> bytes:
    """Byte for byte what safetensors.numpy.save writes before the tensors' data."""
    names = ["momentum", "theta"] if has_momentum else ["theta"]
    size = 4 * num_parameters
    table = {
        name: {"dtype": "F32", "shape": [num_parameters], "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(names)
    }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_only(vector: Vector) -> Vector:
    if vector.ndim != 1 or vector.dtype != np.dtype("<f4"):
        raise ValueError(f"a state holds float32 of shape (D,), not {vector.dtype} of shape {vector.shape}")
    view = np.ascontiguousarray(vector).view()
    view.flags.writeable = False
    return view


def _check_finite(values: NDArray[np.float32]) -> None:
    if not within(values, float(np.finfo(np.float32).max)):
        raise VerificationError("the state would hold NaN or an infinity")
