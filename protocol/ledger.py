"""The hash chain, checked by anybody: who holds the entries needs nothing and nobody else.

`audit` follows the entries one by one: the chain, the coordinator's signatures, the workers' own signatures inside the
receipts, and the credit. `replay` computes θ again from the payloads. Both name the entry that does not hold.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from protocol.documents import (
    LEDGER_KINDS,
    Accepted,
    Chained,
    Contribution,
    Evaluation,
    EvaluationReport,
    Genesis,
    Manifest,
    Receipt,
    open_signed,
)
from protocol.errors import VerificationError
from protocol.replica import State, apply_manifest
from protocol.signing import Signed

FIRST_PREVIOUS = "0" * 64


@dataclass(slots=True)
class Audit:
    """What an audited ledger says. Filled entry by entry; complete when `audit` has been exhausted."""

    genesis: Genesis | None = None
    entries: int = 0
    head: str = FIRST_PREVIOUS
    rounds: int = 0
    tokens: int = 0
    credit: dict[str, int] = field(default_factory=dict)  # peer -> tokens
    names: dict[str, str] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)  # round -> digest that somebody signed for
    _coordinator: bytes = b""
    _due: dict[str, Accepted] = field(default_factory=dict)  # contribution hash -> receipt still to come
    _credited: set[tuple[int, int]] = field(default_factory=set)


def audit(entries: Iterable[Signed], into: Audit) -> Iterator[Chained]:
    """Check entries in order and hand each on once it holds. Raises VerificationError naming the one that does not."""
    for signed in entries:
        try:
            document = _check_link(signed, into)
            _check_content(document, into)
        except VerificationError as error:
            raise VerificationError(f"ledger entry {into.entries}: {error}") from error
        into.entries += 1
        into.head = signed.hash
        yield document
    if into.genesis is None:
        raise VerificationError("the ledger is empty")
    if into._due:
        raise VerificationError(f"ledger entry {into.entries}: {len(into._due)} receipts of the last round are missing")


def replay(manifests: Iterable[Manifest], initial: State, read_payload: Callable[[str], bytes]) -> Iterator[State]:
    """The state after each manifest, computed from the payloads. Raises VerificationError naming the round."""
    state = initial
    for manifest in manifests:
        try:
            state = apply_manifest(state, manifest, read_payload)
        except VerificationError as error:
            raise VerificationError(f"round {manifest.round}: {error}") from error
        yield state


def _check_link(signed: Signed, into: Audit) -> Chained:
    if into.genesis is None:
        genesis = open_signed(signed, Genesis, signer=signed.public_key)
        into.genesis, into._coordinator = genesis, signed.public_key
        document: Chained = genesis
    else:
        document = open_signed(signed, _kind_of(signed), signer=into._coordinator, run_id=into.genesis.run_id)
    if document.seq != into.entries:
        raise VerificationError(f"it says that it is entry {document.seq}: an entry was dropped, added or moved")
    if document.previous != into.head:
        raise VerificationError("it does not follow from the entry before it: one of the two was replaced")
    return document


def _kind_of(signed: Signed) -> type[Chained]:
    for kind, model in LEDGER_KINDS.items():
        if f'"kind":"{kind}"'.encode() in signed.body:
            return model
    raise VerificationError("it is of no known kind")


def _check_content(document: Chained, into: Audit) -> None:
    match document:
        case Manifest():
            _check_manifest(document, into)
        case Receipt():
            _check_receipt(document, into)
        case Evaluation():
            report = open_signed(Signed.from_json(document.report), EvaluationReport, run_id=document.run_id)
            into.digests[report.round] = report.digest
        case _:
            into.digests[0] = into.genesis.initial_digest if into.genesis else ""


def _check_manifest(manifest: Manifest, into: Audit) -> None:
    if into._due:
        raise VerificationError(f"{len(into._due)} receipts of the round before are missing")
    if manifest.round != into.rounds:
        raise VerificationError(f"a manifest of round {manifest.round} where round {into.rounds} is due")
    into.tokens += sum(entry.tokens for entry in manifest.contributions)
    if manifest.tokens_after != into.tokens:
        raise VerificationError(f"it counts {manifest.tokens_after} tokens; its contributions add up to {into.tokens}")
    into.rounds += 1
    into._due = {entry.contribution_hash: entry for entry in manifest.contributions}
    into.names.update({entry.peer: entry.name for entry in manifest.contributions})
    into.digests[manifest.round] = manifest.base_digest


def _check_receipt(receipt: Receipt, into: Audit) -> None:
    signed = Signed.from_json(receipt.contribution)
    header = open_signed(signed, Contribution, run_id=receipt.run_id)
    entry = into._due.pop(signed.hash, None)
    if entry is None:
        raise VerificationError("a receipt for a contribution that the manifest does not list")
    if (receipt.peer, receipt.tokens) != (entry.peer, entry.tokens) or header.peer != receipt.peer:
        raise VerificationError("the receipt and the manifest disagree")
    named = (header.payload_hash, header.pieces_hash)
    if named != (entry.payload_hash, entry.pieces_hash) or not set(receipt.shards) <= set(header.shards):
        raise VerificationError("the receipt credits what the worker did not sign")
    units = {(shard.pass_index, shard.index) for shard in receipt.shards}
    shard_tokens = into.genesis.spec.shard_tokens if into.genesis else 0
    if len(units) * shard_tokens != receipt.tokens:
        raise VerificationError(f"{receipt.tokens} tokens are credited for {len(units)} shards")
    if units & into._credited:
        raise VerificationError(f"shard {min(units & into._credited)} is credited a second time in its pass")
    into._credited |= units
    into.credit[receipt.peer] = into.credit.get(receipt.peer, 0) + receipt.tokens
