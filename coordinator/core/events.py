"""What happens to a run: the core's only inputs, and what the journal holds.

Peer input has been authenticated and parsed by the shell before it becomes an event; whether it is *allowed* is decided
by the core.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from coordinator.core.state import Unit

SESSION_ENDED = "the session ended"  # why a peer left that did not say


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteIssued:
    token_id: str
    uses: int
    role: str = "worker"
    issued_unix_s: float = 0.0
    expires_unix_s: float = 0.0
    kind: Literal["invite_issued"] = "invite_issued"


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteRevoked:
    token_id: str
    kind: Literal["invite_revoked"] = "invite_revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJoined:
    peer: str
    name: str
    device: str
    role: str
    token_id: str
    lease_id: int | None  # a lease that the peer still works on, after a broken connection
    software: str = ""
    unix_s: float = 0.0
    needs_approval: bool = False  # when it is new
    kind: Literal["peer_joined"] = "peer_joined"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLeft:
    peer: str
    reason: str
    kind: Literal["peer_left"] = "peer_left"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateReported:
    peer: str
    round: int
    digest: str
    claimed_steps_per_s: float = 0.0
    download_bps: float = 0.0  # as the peer measured it in the last merge; 0: not
    optimizer_share: float = 0.0  # of an inner step, that the optimizer's update takes, as the peer measured; 0: not
    kind: Literal["state_reported"] = "state_reported"


@dataclass(frozen=True, slots=True, kw_only=True)
class AvailabilityReported:
    """A worker pauses, and why, or takes leases again: then the reason is empty."""

    peer: str
    pause_reason: str
    kind: Literal["availability_reported"] = "availability_reported"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReturned:
    peer: str
    lease_id: int
    reason: str
    kind: Literal["lease_returned"] = "lease_returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionCommitted:
    peer: str
    lease_id: int
    base_digest: str
    units: tuple[Unit, ...]
    inner_steps: int
    tokens: int
    mean_loss: float
    codec: str
    contribution_hash: str
    payload_hash: str
    payload_bytes: int
    pieces_hash: str | None = None
    kind: Literal["contribution_committed"] = "contribution_committed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadChecked:
    """The shell has the payload and looked inside: its norm, or why it is refused.

    upload_bps: bits a second at which it came, by the coordinator's clock; 0 where it was here already.
    """

    peer: str
    payload_hash: str
    norm: float
    upload_bps: float = 0.0
    refused_because: str = ""
    kind: Literal["payload_checked"] = "payload_checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMerged:
    """A peer has merged a group, or could not: then the payload hash is empty, and `blamed` says who was in the way."""

    peer: str
    round: int
    group: int
    attempt: int
    payload_hash: str
    payload_bytes: int
    pieces_hash: str | None = None
    blamed: str = ""
    kind: Literal["group_merged"] = "group_merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReported:
    """The validator evaluated a state, and perhaps stored it as a checkpoint."""

    peer: str
    round: int
    digest: str
    held_out_loss: float
    checkpoint: bool
    report_hash: str
    kind: Literal["evaluation_reported"] = "evaluation_reported"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFired:
    kind: Literal["timer_fired"] = "timer_fired"


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseRequested:
    paused: bool
    kind: Literal["pause_requested"] = "pause_requested"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerBanned:
    """The operator wants no more of this peer; `reason` is what it is told."""

    peer: str
    reason: str
    kind: Literal["peer_banned"] = "peer_banned"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerUnbanned:
    peer: str
    kind: Literal["peer_unbanned"] = "peer_unbanned"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerApproved:
    peer: str
    kind: Literal["peer_approved"] = "peer_approved"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimeSet:
    """What a round should take from the next one on; None: as the spec says."""

    seconds: float | None
    kind: Literal["round_time_set"] = "round_time_set"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorRestarted:
    """The coordinator's process is new: every session is gone, leases go on."""

    kind: Literal["coordinator_restarted"] = "coordinator_restarted"


Event = (
    InviteIssued
    | InviteRevoked
    | PeerJoined
    | PeerLeft
    | StateReported
    | AvailabilityReported
    | LeaseReturned
    | ContributionCommitted
    | PayloadChecked
    | GroupMerged
    | EvaluationReported
    | TimerFired
    | PauseRequested
    | PeerBanned
    | PeerUnbanned
    | PeerApproved
    | RoundTimeSet
    | CoordinatorRestarted
)

_ADAPTER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def dump_event(event: Event) -> bytes:
    """The event as JSON, for the journal."""
    return _ADAPTER.dump_json(event)


def load_event(data: bytes) -> Event:
    """The inverse of `dump_event`. Raises pydantic.ValidationError."""
    return _ADAPTER.validate_json(data)
