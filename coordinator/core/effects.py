"""What the core wants done. The shell carries effects out, in order, after the event is in the journal.

Nobody changes an effect. Those that every peer gets in every round are not frozen all the same: making a frozen one
takes three times as long.
"""

from dataclasses import dataclass

from coordinator.core.state import Phase, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusePeer:
    """The join is refused: close the session."""

    peer: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldPeer:
    """The join is in order, but the operator has not approved the peer: its session waits."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmitPeer:
    """The operator has approved a peer whose session waits."""

    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DismissPeer:
    """The operator has banned the peer: end its session, if there is one."""

    peer: str
    code: str
    reason: str


@dataclass(slots=True, kw_only=True)
class GrantLease:
    peer: str
    lease_id: int
    round: int
    base_digest: str
    units: tuple[Unit, ...]
    deadline_in_s: float
    tokens_before: int
    round_tokens: int
    codec: str
    codec_options: tuple[tuple[str, int | float], ...]
    contribute: bool
    ahead: tuple[Unit, ...]
    learning_rate: float | None = None  # None: as run.toml says
    optimizer: str | None = None  # None: as run.toml says


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPayload:
    """Wait for the payload, look inside, answer with PayloadChecked."""

    peer: str
    payload_hash: str
    payload_bytes: int
    codec: str
    codec_options: tuple[tuple[str, int | float], ...]
    pieces_hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeContribution:
    """Tell the peer: kept for the close of the round, or not, and why."""

    peer: str
    payload_hash: str
    accepted: bool
    reason: str


@dataclass(slots=True, kw_only=True)
class Credit:
    """One accepted contribution: an entry of the manifest and a receipt."""

    peer: str
    name: str
    lease_id: int
    units: tuple[Unit, ...]
    tokens: int
    contribution_hash: str
    payload_hash: str
    payload_bytes: int
    codec: str
    mean_loss: float
    norm: float
    weight: float
    clip: float
    pieces_hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderMerge:
    """Have a peer merge a group's contributions into one payload, alone or, with the butterfly, among themselves."""

    peer: str
    round: int
    base_digest: str
    group: int
    attempt: int
    butterfly: bool
    contributions: tuple[Credit, ...]
    codec: str
    deadline_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedGroup:
    """One group of a round that was merged in groups, and the payload that stands for it."""

    peers: tuple[str, ...]
    mergers: tuple[str, ...]
    payload_hash: str
    payload_bytes: int
    pieces_hash: str | None
    codec: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRound:
    """Sign, store and send the manifest and its receipts. In canonical order (by payload hash)."""

    round: int
    base_digest: str
    credits: tuple[Credit, ...]
    divisor: float
    groups: tuple[MergedGroup, ...]
    leased_peers: int
    closed_because: str
    inner_steps: int
    plan: str
    tokens_after: int
    learning_rate: float | None = None  # that the leases had
    opened_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VoidRound:
    """No manifest: the state stays, the peers keep their work for their next contribution."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordEvaluation:
    """Take the validator's signed report into the ledger."""

    report_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResync:
    """The peer's state is not the run's: it must fetch it again."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncePlan:
    """From this round on another codec or number of inner steps."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncePhase:
    phase: Phase
    reason: str


Effect = (
    RefusePeer
    | HoldPeer
    | AdmitPeer
    | DismissPeer
    | GrantLease
    | CheckPayload
    | JudgeContribution
    | OrderMerge
    | CloseRound
    | VoidRound
    | RecordEvaluation
    | RequestResync
    | AnnouncePlan
    | AnnouncePhase
)
