"""Writes the hash chain: each entry names its place and the hash of the entry before it, and is signed."""

from collections.abc import Callable
from dataclasses import asdict

from coordinator.core.effects import CloseRound, Credit
from coordinator.storage.database import LedgerRow
from protocol.documents import (
    Accepted,
    Chained,
    Evaluation,
    Genesis,
    GroupPayload,
    Manifest,
    Receipt,
    ShardRef,
    sign,
)
from protocol.identity import Identity
from protocol.run_spec import RunSpec
from protocol.signing import Signed

FIRST_PREVIOUS = "0" * 64


class LedgerWriter:
    """Appends entries in memory; the caller stores the rows in its transaction.

    When that transaction fails the writer is ahead of the database: the process must end, as the coordinator does.
    """

    def __init__(self, identity: Identity, run_id: str, spec: RunSpec, last: LedgerRow | None) -> None:
        self._identity = identity
        self.run_id = run_id
        self._spec = spec
        self._next_seq = last.seq + 1 if last else 0
        self.head = last.signed.hash if last else FIRST_PREVIOUS

    def append_genesis(self, make: Callable[[int, str], Genesis], unix_s: float) -> LedgerRow:
        return self._append(make(self._next_seq, self.head), unix_s)

    def append_round(self, closed: CloseRound, headers: dict[str, Signed], unix_s: float) -> list[LedgerRow]:
        """The manifest of a closed round, then one receipt for each accepted contribution.

        `headers`: the workers' signed contributions by hash.
        """
        outer = self._spec.outer
        manifest = Manifest(
            run_id=self.run_id,
            seq=self._next_seq,
            previous=self.head,
            round=closed.round,
            base_digest=closed.base_digest,
            rule=self._spec.aggregation.rule,
            outer_optimizer=outer.optimizer,
            outer_learning_rate=outer.learning_rate,
            outer_momentum=outer.momentum,
            divisor=closed.divisor,
            contributions=tuple(accepted_of(credit) for credit in closed.credits),
            groups=tuple(GroupPayload(**asdict(group)) for group in closed.groups),
            leased_peers=closed.leased_peers,
            closed_because=closed.closed_because,
            inner_steps=closed.inner_steps,
            plan=closed.plan,
            learning_rate=closed.learning_rate,
            tokens_after=closed.tokens_after,
        )
        rows = [self._append(manifest, unix_s)]
        rows += [self._append(self._receipt(closed.round, credit, headers), unix_s) for credit in closed.credits]
        return rows

    def append_evaluation(self, report: Signed, unix_s: float) -> LedgerRow:
        entry = Evaluation(run_id=self.run_id, seq=self._next_seq, previous=self.head, report=report.to_json())
        return self._append(entry, unix_s)

    def _receipt(self, round_: int, credit: Credit, headers: dict[str, Signed]) -> Receipt:
        return Receipt(
            run_id=self.run_id,
            seq=self._next_seq,
            previous=self.head,
            round=round_,
            peer=credit.peer,
            lease_id=credit.lease_id,
            shards=tuple(ShardRef(pass_index=unit[0], index=unit[1]) for unit in credit.units),
            tokens=credit.tokens,
            contribution=headers[credit.contribution_hash].to_json(),
        )

    def _append(self, entry: Chained, unix_s: float) -> LedgerRow:
        signed = sign(entry, self._identity)
        row = LedgerRow(
            seq=self._next_seq,
            kind=entry.kind,  # type: ignore[attr-defined] # every ledger document has one
            round=getattr(entry, "round", None),
            unix_s=unix_s,
            body=signed.body,
            public_key=signed.public_key,
            signature=signed.signature,
        )
        self._next_seq += 1
        self.head = signed.hash
        return row


def accepted_of(credit: Credit) -> Accepted:
    """A credit as manifests and merge orders have it."""
    return Accepted(
        peer=credit.peer,
        name=credit.name,
        contribution_hash=credit.contribution_hash,
        payload_hash=credit.payload_hash,
        payload_bytes=credit.payload_bytes,
        pieces_hash=credit.pieces_hash,
        codec=credit.codec,
        tokens=credit.tokens,
        norm=credit.norm,
        weight=credit.weight,
        clip=credit.clip,
    )
