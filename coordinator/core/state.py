"""Everything that the coordinator's decisions depend on.

The state is mutable inside the core and belongs to it alone; the shell reads it. It is made of plain values, so a
snapshot is its JSON and nothing else. Invariant: every unit (a shard in one pass) is in exactly one place: ahead of the
pool's cursor, returned to the pool, in one lease that is not closed (to train now, or ahead), carried by one peer, or
credited.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import TypeAdapter

from protocol.policy import ExchangePlan
from protocol.run_spec import RunSpec

Unit = tuple[int, int]  # (pass over the data, shard index)
# What an exchange is allowed at most, unless the spec says more: a peer whose payload never ends must not hold a round.
MAX_EXCHANGE_S = 3600.0


class Phase(StrEnum):
    """Where the run stands. All transitions are in machine.py."""

    WAITING_FOR_PEERS = "waiting_for_peers"
    WARMUP = "warmup"  # enough peers have joined, not enough hold the state yet
    TRAIN = "train"
    MERGE = "merge"
    PAUSED = "paused"
    FINISHED = "finished"


class PeerStatus(StrEnum):
    SYNCING = "syncing"  # joined or behind: fetching the state
    READY = "ready"  # in State.reports, or in State.awaited: holds the current state, or is merging it
    GONE = "gone"


class LeaseStatus(StrEnum):
    OPEN = "open"
    COMMITTED = "committed"  # header here, payload not checked yet
    ACCEPTED = "accepted"
    ASIDE = "aside"  # trains without contributing: its peer's turn comes in a later round
    AWAY = "away"  # its peer left: the round does not wait for it, but is still there if the peer comes back
    CLOSED = "closed"  # refused, returned or expired: its units are elsewhere again


@dataclass(slots=True, kw_only=True)
class Peer:
    """A worker or validator that has joined at least once."""

    name: str
    device: str
    role: str
    token_id: str
    software: str = ""
    joined_unix_s: float = 0.0  # for the first time
    waiting_for_approval: bool = False  # joined, but gets no state and no leases yet
    banned: bool = False
    ban_reason: str = ""
    status: PeerStatus = PeerStatus.SYNCING
    state_round: int = -1  # rounds merged in the state that it last reported; -1: none since it joined
    pause_reason: str = ""  # why it takes no leases for now; empty: it does
    steps_per_s: float = 0.0
    observed: bool = False  # False: steps_per_s is only what the peer claimed
    upload_bps: float = 0.0  # bits a second, as the coordinator saw it; 0: not yet
    download_bps: float = 0.0  # as the peer said; 0: not yet
    optimizer_share: float = 0.0  # of an inner step, that the optimizer's update takes, as the peer said; 0: not yet
    last_turn: int = -1  # the last round that it was to contribute to
    carried: list[Unit] = field(default_factory=list)  # trained on, not yet merged: kept for its next contribution
    credited_tokens: int = 0
    credited_shards: int = 0
    accepted: int = 0
    refused: int = 0


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A committed contribution, as far as the merge and the credit need it."""

    contribution_hash: str
    payload_hash: str
    payload_bytes: int
    codec: str
    lease_units: list[Unit]
    carried_units: list[Unit]
    mean_loss: float
    pieces_hash: str | None = None
    norm: float = 0.0


@dataclass(slots=True, kw_only=True)
class LeaseRecord:
    lease_id: int
    peer: str
    units: list[Unit]
    ahead: list[Unit]  # to go on with once it is committed; carried by the peer when the round closes
    inner_steps: int
    granted_s: float
    status: LeaseStatus = LeaseStatus.OPEN
    candidate: Candidate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """What one merger came to: a payload, or none and who was in the way."""

    payload_hash: str
    payload_bytes: int
    pieces_hash: str | None = None
    blamed: str = ""


@dataclass(slots=True, kw_only=True)
class Group:
    """Contributions that are merged into one payload first (groups.py)."""

    index: int
    peers: list[str]
    codec: str = ""
    attempt: int = 0
    mergers: list[str] = field(default_factory=list)  # asked in this attempt
    results: dict[str, GroupResult] = field(default_factory=dict)  # by merger
    source: str | None = None  # the merger whose payload is awaited: it agrees with the others
    merged: GroupResult | None = None
    failed: bool = False


@dataclass(slots=True, kw_only=True)
class Round:
    """An open round. What is set at its opening does not change until it closes; only its leases do.

    Once they are settled, and the round is merged in groups, the deadline is that of the groups.
    """

    index: int
    base_digest: str
    opened_s: float
    deadline_s: float
    expected_s: float  # compute time that the leases were sized for
    tokens_before: int
    leased_tokens: int
    due_tokens: int  # of those that contribute
    plan: ExchangePlan
    leases: dict[str, LeaseRecord]  # by peer
    unsettled: int = 0  # leases that the round still waits for
    because: str = ""  # why the leases are settled
    groups: list[Group] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class ShardPool:
    """Which units can be leased next. Order: returned ones first, then the current pass's permutation."""

    num_shards: int
    seed: int
    pass_index: int = 0
    cursor: int = 0
    returned: list[Unit] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class InviteRecord:
    uses_left: int
    revoked: bool = False
    role: str = "worker"
    uses: int = 0  # 0: issued by a version that did not keep it
    issued_unix_s: float = 0.0
    expires_unix_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class State:
    """The whole of it. Rounds are counted from 0; `rounds_merged` manifests exist."""

    spec: RunSpec
    num_parameters: int
    pool: ShardPool
    phase: Phase = Phase.WAITING_FOR_PEERS
    paused: bool = False
    rounds_merged: int = 0
    tokens_credited: int = 0
    next_lease_id: int = 1
    round: Round | None = None
    plan: ExchangePlan | None = None  # of the last round that was opened
    round_time_s: float | None = None  # what the operator wants a round to take; None: as the spec says
    late_rounds: int = 0  # void ones with a payload on its way at the deadline, less those that needed half the time
    peers: dict[str, Peer] = field(default_factory=dict)
    invites: dict[str, InviteRecord] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)  # peer -> digest after `rounds_merged` rounds
    awaited: dict[str, None] = field(default_factory=dict)  # peers that held the last state and have not merged yet
    wait_until_s: float | None = None  # the next round opens no sooner, unless no worker is awaited any more
    checkpoint_round: int = 0
    checkpoint_digest: str = ""

    @property
    def exchange_s(self) -> float:
        """Time for encoding and sending in a round."""
        return allow_exchange_s(self.spec.round.exchange_s, self.late_rounds)


def allow_exchange_s(wanted_s: float, late_rounds: int) -> float:
    """What the spec says, doubled with every round that was too short for any payload, halved when that would do.

    Nothing is known of links before a payload has come over them, and with too little time none ever would.
    """
    return max(wanted_s, min(wanted_s * 2.0 ** min(late_rounds, 64), MAX_EXCHANGE_S))


_ADAPTER = TypeAdapter(State)


def dump_state(state: State) -> bytes:
    """The state as JSON."""
    return _ADAPTER.dump_json(state)


def load_state(data: bytes) -> State:
    """The inverse of `dump_state`. Raises pydantic.ValidationError."""
    return _ADAPTER.validate_json(data)
