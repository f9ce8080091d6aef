"""The long-lived facts of a run, as signed documents.

Each document is a pydantic model whose canonical JSON is signed (protocol.signing). `kind` and `run_id` are inside what
is signed, so no document can be passed off as another or in another run. Documents come from peers: `open_signed`
limits the size, verifies the signature, then validates strictly; nothing else reads their bytes.

    genesis -> (manifest -> receipts, evaluations)*      the ledger: chained by `seq` and `previous`, coordinator's key
    invite, lease, merge_order                            coordinator's key, not chained
    join_request, contribution, evaluation_report         the peer's key
"""

from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from protocol.errors import VerificationError
from protocol.identity import Identity, peer_id_of
from protocol.run_spec import RunSpec
from protocol.signing import Signed, canonical_json

PROTOCOL_VERSION = 2  # 2: workers say when they pause
OLDEST_PROTOCOL_VERSION = 1  # that is still spoken
MAX_DOCUMENT_BYTES = 1 << 20
TLS_NAME = "manyhands.coordinator"  # the name in the certificate; the pinned key is what is trusted

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
PeerId = Annotated[str, StringConstraints(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
RunId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Name = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Reason = Annotated[str, StringConstraints(max_length=300, pattern=r"^[^\x00-\x1f\x7f]*$")]
Verb = Literal[
    "status", "stop", "pause", "resume", "invite", "invites", "revoke", "ban", "unban", "approve", "round-time"
]
ALL_SLICES = ("all",)
_RATE = "the highest learning rate of this round, when it is not in run.toml"


def _is_missing(value: object) -> bool:
    """Whether a field stays out of the document, which workers of the last protocol version then read as well."""
    return value is None


class Document(BaseModel):
    """What all documents have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    max_bytes: ClassVar[int] = MAX_DOCUMENT_BYTES
    run_id: RunId


class Invite(Document):
    """What a volunteer pastes: where the coordinator is, how to know it, and leave to join."""

    kind: Literal["invite"] = "invite"
    max_bytes: ClassVar[int] = 4096
    address: Annotated[str, StringConstraints(max_length=255)]
    tls_fingerprint: Hash
    token_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    role: Literal["worker", "validator"]
    expires_unix_s: Count
    uses: Count


class JoinRequest(Document):
    """First message of a session. `nonce` is the coordinator's challenge, so a recorded one is worthless."""

    kind: Literal["join_request"] = "join_request"
    max_bytes: ClassVar[int] = 16_384
    peer: PeerId
    nonce: Hash
    invite: Annotated[str, StringConstraints(max_length=8192)]
    protocol_version: Count
    software: Name
    name: Name
    device: Name
    addresses: Annotated[tuple[Annotated[str, StringConstraints(max_length=256)], ...], Field(max_length=16)]
    lease_id: Count | None = Field(description="a lease still worked on after a broken connection")
    seed: bool = Field(False, description="serves everybody's payloads")


class ShardRef(BaseModel):
    """One unit of work: a data shard in one pass over the data."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    pass_index: Count
    index: Count


class Lease(Document):
    """Leave to train on some shards, from a given state, until a deadline."""

    kind: Literal["lease"] = "lease"
    lease_id: Count
    peer: PeerId
    round: Count
    base_digest: Hash
    slices: tuple[str, ...] = ALL_SLICES
    shards: tuple[ShardRef, ...]
    steps_per_shard: Count
    deadline_in_s: Share = Field(description="seconds from receipt; only the coordinator's own clock decides")
    tokens_before: Count = Field(description="tokens credited when the round opened: where the schedule stands")
    round_tokens: Count = Field(description="tokens leased to all peers in this round")
    codec: Name = Field(description="what the contribution is encoded with")
    codec_options: dict[str, int | float]
    learning_rate: Share | None = Field(None, description=_RATE, exclude_if=_is_missing)
    optimizer: Name | None = Field(
        None, description="the inner one, when it is not in run.toml", exclude_if=_is_missing
    )
    contribute: bool = Field(True, description="False: train and keep the result; this peer's turn comes later")
    ahead: tuple[ShardRef, ...] = Field((), description="shards to go on with while the round is exchanged and merged")


class Contribution(Document):
    """A worker's signed header: what it did, and the hash of what it will reveal."""

    kind: Literal["contribution"] = "contribution"
    max_bytes: ClassVar[int] = 320 << 10  # so that the receipt that holds it can be read too
    peer: PeerId
    round: Count
    lease_id: Count
    base_digest: Hash
    slices: tuple[str, ...] = ALL_SLICES
    shards: tuple[ShardRef, ...] = Field(description="those of the lease that were trained on, in full")
    inner_steps: Count
    tokens: Count
    mean_loss: Real
    compute_s: Share
    codec: Name
    payload_hash: Hash
    payload_bytes: Count
    pieces_hash: Hash | None = Field(None, description="blob: the payload's piece index; None when it is one piece")


class Accepted(BaseModel):
    """One contribution in a manifest, as it enters the merge."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    peer: PeerId
    name: Name
    contribution_hash: Hash
    payload_hash: Hash
    payload_bytes: Count
    pieces_hash: Hash | None = None
    codec: Name
    tokens: Count
    norm: Share
    weight: Share
    clip: Share


class GroupPayload(BaseModel):
    """Contributions that were merged into one payload before the round was merged: that payload stands for them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    peers: tuple[PeerId, ...]
    mergers: tuple[PeerId, ...] = Field(description="who came to this payload, each by itself")
    payload_hash: Hash
    payload_bytes: Count
    pieces_hash: Hash | None = None
    codec: Name
    weight: Share = Field(description="that of its contributions together")


class MergeOrder(Document):
    """The coordinator has a peer merge a group's contributions, which are in canonical order.

    butterfly: the peers of the contributions average their vectors among themselves; else the peer fetches the
    contributions' payloads and merges them.
    """

    kind: Literal["merge_order"] = "merge_order"
    peer: PeerId
    round: Count
    base_digest: Hash
    group: Count
    attempt: Count
    butterfly: bool
    contributions: tuple[Accepted, ...]
    codec: Name = Field(description="of the merged payload")
    deadline_in_s: Share = Field(description="seconds from receipt")


class Chained(Document):
    """A ledger entry: its place and the hash of the entry before it (64 zeros for the first)."""

    seq: Count
    previous: Hash


class Genesis(Chained):
    """What the run is. Everything that later entries refer to is named here by hash."""

    kind: Literal["genesis"] = "genesis"
    protocol_version: Count
    spec: RunSpec
    created_unix_s: Count
    num_parameters: Count
    initial_digest: Hash
    model_config_hash: Hash = Field(description="blob: the model's config.json")
    tokenizer_hash: Hash | None = Field(description="blob: tokenizer.json; None for bytes")
    shard_index_hash: Hash = Field(description="blob: JSON list of the shards' hashes")
    held_out_hash: Hash
    num_shards: Count
    vocabulary_size: Count


class Manifest(Chained):
    """The commit of a round. Contributions are in canonical order (by payload hash)."""

    kind: Literal["manifest"] = "manifest"
    round: Count
    base_digest: Hash = Field(description="state before this merge; equals the digest after the last one")
    slices: tuple[str, ...] = ALL_SLICES
    rule: Name
    outer_optimizer: Name
    outer_learning_rate: Share
    outer_momentum: Share
    divisor: Share = Field(description="total weight; every coordinate is divided by it, absent ones count as zero")
    contributions: tuple[Accepted, ...]
    groups: tuple[GroupPayload, ...] = Field((), description="when there are any, their payloads are merged")
    leased_peers: Count
    closed_because: Name
    inner_steps: Count = Field(description="H of a peer of median speed in this round")
    plan: Reason = Field(description="why this codec, H and learning rate")
    learning_rate: Share | None = Field(None, description=_RATE, exclude_if=_is_missing)
    tokens_after: Count = Field(description="tokens credited in the whole run, this round's included")


class Receipt(Chained):
    """Credit for one accepted contribution, with the worker's own signed header as proof."""

    kind: Literal["receipt"] = "receipt"
    round: Count
    peer: PeerId
    lease_id: Count
    shards: tuple[ShardRef, ...]
    tokens: Count
    contribution: dict[str, str] = Field(description="Signed.to_json() of the Contribution")


class EvaluationReport(Document):
    """The validator's word on one state."""

    kind: Literal["evaluation_report"] = "evaluation_report"
    max_bytes: ClassVar[int] = 4096
    peer: PeerId
    round: Count
    digest: Hash
    held_out_loss: Real
    held_out_tokens: Count
    checkpoint: bool = Field(description="whether this state was written as a checkpoint and pushed as a blob")


class OperatorCommand(Document):
    """What the operator asks of its own coordinator; signed with the coordinator's key, from the run folder."""

    kind: Literal["operator_command"] = "operator_command"
    max_bytes: ClassVar[int] = 4096
    verb: Verb
    nonce: Hash = Field(description="random; one that was seen is refused")
    unix_s: Count = Field(description="refused when more than a minute away from the coordinator's clock")
    uses: Count = Field(0, description="invite: how many identities may join with it")
    expires_hours: Share = Field(0.0, description="invite: for how long")
    invite: Name = Field("", description="revoke: which, the beginning of its id")
    peer: Name = Field("", description="ban, unban, approve: a name, or the beginning of a peer id")
    reason: Reason = Field("", description="ban: what the worker is told")
    seconds: Share = Field(0.0, description="round-time: what a round should take; 0: as run.toml says")


class Evaluation(Chained):
    """A validator's report, taken into the ledger."""

    kind: Literal["evaluation"] = "evaluation"
    report: dict[str, str] = Field(description="Signed.to_json() of the EvaluationReport")


LEDGER_KINDS: dict[str, type[Chained]] = {
    "genesis": Genesis,
    "manifest": Manifest,
    "receipt": Receipt,
    "evaluation": Evaluation,
}

D = TypeVar("D", bound=Document)


def sign(document: Document, identity: Identity) -> Signed:
    """Sign a document's canonical JSON."""
    return identity.sign(canonical_json(document.model_dump(mode="json")))


def open_signed(signed: Signed, model: type[D], *, signer: bytes | None = None, run_id: str | None = None) -> D:
    """Verify and parse a signed document; the only way from bytes to a document.

    `signer`: the public key that must have signed. A document with a `peer` field must be signed by that peer when no
    signer is given. Raises VerificationError naming what does not hold.
    """
    if len(signed.body) > model.max_bytes:
        raise VerificationError(f"a {model.__name__} of {len(signed.body)} bytes; at most {model.max_bytes} are read")
    if signer is not None and signed.public_key != signer:
        raise VerificationError(f"the {model.__name__} is not signed by the key that it must be signed by")
    signed.verify()
    try:
        document = model.model_validate_json(signed.body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise VerificationError(f"not a valid {model.__name__}: {place}: {first['msg']}") from error
    if run_id is not None and document.run_id != run_id:
        raise VerificationError(f"the {model.__name__} belongs to run {document.run_id}, not to {run_id}")
    if signer is None and getattr(document, "peer", None) not in (None, peer_id_of(signed.public_key)):
        raise VerificationError(f"the {model.__name__} names a peer that did not sign it")
    return document
