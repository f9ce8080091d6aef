"""What the readers give: plain values. Times are Unix seconds by the coordinator's clock; `_s` spans are seconds."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One lease.

    result: open, committed (the payload is awaited), accepted, late, refused, returned (by the worker), away (its
    session ended), aside (not its turn), expired (nothing came), void (the round was).
    merged_unix_s: when the worker reported the state after this round. compute_s: as its header says, at most the
    time from lease to commit.
    """

    lease_id: int
    round: int
    peer: str
    name: str
    device: str
    result: str
    reason: str
    leased_unix_s: float
    committed_unix_s: float | None
    checked_unix_s: float | None
    merged_unix_s: float | None
    inner_steps: int
    tokens: int
    compute_s: float | None
    payload_bytes: int
    codec: str
    receipt_seq: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """One round, with every lease of it; a round that was void before has the leases of each attempt.

    closed_unix_s: when it was merged; None while it is open. straggler: the peer that the round waited for last, when
    it took clearly longer than the others. first_round and last_round: what can be stepped through.
    """

    round: int
    opened_unix_s: float
    closed_unix_s: float | None
    straggler: str | None
    first_round: int
    last_round: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credited:
    """Tokens credited to a peer by then."""

    round: int
    unix_s: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHistory:
    """A peer's totals over the whole run, its credit over time (at most 500 points), and its last leases, newest first.

    joined_unix_s: None when it was before these records began.
    """

    peer: str
    name: str
    device: str
    role: str
    joined_unix_s: float | None
    seen_unix_s: float
    accepted: int
    late: int
    refused: int
    tokens: int
    compute_s: float
    payload_bytes: int
    credited: tuple[Credited, ...]
    leases: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """until_unix_s: None while it lasts. count: how often it happened in that time."""

    id: int
    kind: str
    peer: str
    name: str
    since_unix_s: float
    until_unix_s: float | None
    first_round: int
    last_round: int
    count: int
    evidence: dict[str, Any]
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """kind: join, leave, lost, ban, unban, codec, restart, pause, resume, void, resync, operator."""

    unix_s: float
    round: int
    tokens: int
    kind: str
    peer: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A line of the leaderboard. share: of all credited tokens. last_receipt_seq: its newest proof, for read_proof."""

    rank: int
    peer: str
    name: str
    device: str
    role: str
    accepted: int
    late: int
    refused: int
    tokens: int
    share: float
    compute_s: float
    payload_bytes: int
    last_receipt_seq: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Some neighbouring rounds together: what was sent, and how their workers' time was spent, summed over workers."""

    round: int  # the last of them
    unix_s: float
    tokens: int
    payload_bytes: int
    bytes_per_token: float
    compute_s: float
    exchange_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChange:
    """From this round on another codec or number of inner steps, and why."""

    round: int
    unix_s: float
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """splits: at most 500. The totals are of all rounds that are on record."""

    splits: tuple[Split, ...]
    plans: tuple[PlanChange, ...]
    codec: str
    tokens: int
    payload_bytes: int
    bytes_per_token: float | None
    compute_s: float
    exchange_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptLine:
    """A receipt in the ledger; hash is that of the signed entry."""

    seq: int
    round: int
    unix_s: float
    peer: str
    lease_id: int
    shards: int
    tokens: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A ledger entry with its place in the chain. signed: body, public_key and signature, as Signed.to_json()."""

    seq: int
    kind: str
    hash: str
    previous: str
    signed: dict[str, str]
    head_seq: int
    head_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """elapsed_s: since the first round of the run was merged."""

    round: int
    tokens: int
    unix_s: float
    elapsed_s: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Training and held-out loss, each at most about 500 points."""

    train: tuple[Loss, ...]
    held_out: tuple[Loss, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRun:
    """Another run folder beside this one that can be read."""

    folder: str
    name: str
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCost:
    """energy_kwh: an estimate: compute time times `watts`, which is a stated figure for the class, not measured."""

    device_class: str
    hours: float
    tokens: int
    watts: float
    energy_kwh: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """One run's accepted work. note: what is not in it, when something is missing."""

    folder: str
    name: str
    rounds: int
    tokens: int
    hours: float
    energy_kwh: float
    devices: tuple[DeviceCost, ...]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """All runs whose database can be read, this one first; watts by device class; unread: folders that could not be."""

    runs: tuple[RunCost, ...]
    watts: dict[str, float]
    unread: tuple[str, ...]
