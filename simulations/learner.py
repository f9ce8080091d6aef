"""What a virtual run asks of those who train in it: with tensors (simulations/learning), or without (time alone)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from coordinator.core.effects import CloseRound, GrantLease


@dataclass(slots=True, kw_only=True)  # not frozen: see coordinator.core.effects
class Work:
    """A lease and how much of it its peer finishes in time, which the virtual clock knows when the lease is granted."""

    grant: GrantLease
    num_units: int  # whole shards of the lease, from the first on
    num_ahead: int = 0  # whole shards of what it may train ahead


@dataclass(slots=True, kw_only=True)  # not frozen: see coordinator.core.effects
class Sent:
    """A contribution's payload, as far as the virtual run needs it."""

    payload_hash: str
    payload_bytes: int
    norm: float
    mean_loss: float  # nats a token; NaN where nothing is learned


class Learner(Protocol):
    """One for all virtual peers. Calls come in the order of the virtual clock."""

    num_parameters: int
    digest: str  # of the state, after the last merge

    def open_round(self, works: Sequence[Work]) -> None:
        """A round was opened with these leases. Training may wait until the first `contribute`, and be done at once."""

    def contribute(self, peer: str) -> Sent:
        """What a peer sends for its lease: everything that it has trained and that no manifest has listed."""

    def close_round(self, closed: CloseRound) -> None:
        """Merge what was accepted into the state, and take it off the error feedback of those who sent it."""

    def drop(self, peer: str) -> None:
        """A peer is gone for good: what it keeps can be forgotten."""

    def held_out_loss(self) -> float | None:
        """Nats a token of the state; None where nothing is learned."""
