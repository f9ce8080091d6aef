"""Who averages with whom, and how long they wait: values that the caller makes, from what the coordinator says."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from protocol.signing import canonical_json

MAX_PEERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ButterflyGroup:
    """The same at every peer, from the coordinator alone. Raises ValueError for an unusable one."""

    group_id: str  # of this run and round alone, see group_id_of; 1 to 64 ASCII letters and digits
    peers: tuple[str, ...]  # peer ids, in canonical order
    weights: tuple[float, ...]  # above zero, one a peer
    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)  # peer id -> multiaddrs, as hints

    def __post_init__(self) -> None:
        if not 1 <= len(self.group_id) <= 64 or not self.group_id.isascii() or not self.group_id.isalnum():
            raise ValueError("a group id is 1 to 64 ASCII letters and digits")
        if not 2 <= len(self.peers) <= MAX_PEERS or len(set(self.peers)) != len(self.peers):
            raise ValueError(f"a group has 2 to {MAX_PEERS} different peers")
        if len(self.weights) != len(self.peers) or not all(0.0 < weight < math.inf for weight in self.weights):
            raise ValueError("a group has one weight a peer, finite and above zero")

    @property
    def fractions(self) -> tuple[float, ...]:
        """The weights, made to add up to 1."""
        total = math.fsum(self.weights)
        return tuple(weight / total for weight in self.weights)

    def view_digest(self, codec_name: str, num_parameters: int) -> bytes:
        """SHA-256, 32 bytes, of everything that all peers must agree on before they begin."""
        facts = [self.group_id, self.peers, self.fractions, codec_name, num_parameters]
        return hashlib.sha256(canonical_json(facts)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ButterflyTimeouts:
    """When to give up. Raises ValueError unless reducers get more time than senders, on whom they wait."""

    start_s: float = 30.0  # until all peers are there
    sender_s: float = 20.0  # for the next part of a peer that we reduce for
    reducer_s: float = 45.0  # for the next average of a reducer, and for the digests at the end
    round_s: float = 900.0  # everything

    def __post_init__(self) -> None:
        if not 0.0 < self.sender_s < self.reducer_s < math.inf or not 0.0 < self.start_s < self.round_s < math.inf:
            raise ValueError("timeouts are finite and positive, sender_s under reducer_s, start_s under round_s")


def group_id_of(run_id: str, round_number: int) -> str:
    """The group id of one round of one run, when all its peers are in one group."""
    return hashlib.sha256(canonical_json(["butterfly", run_id, round_number])).hexdigest()
