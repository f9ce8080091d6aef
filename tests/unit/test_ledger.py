"""The ledger that the coordinator writes: anybody can audit it, and nobody can change it unnoticed."""

from collections.abc import Callable, Sequence

import pytest

from coordinator.core import effects as fx
from coordinator.core import leases
from coordinator.core.state import Unit
from coordinator.ledger import LedgerWriter
from coordinator.storage.database import LedgerRow
from protocol.documents import (
    MAX_DOCUMENT_BYTES,
    PROTOCOL_VERSION,
    Contribution,
    EvaluationReport,
    Genesis,
    Manifest,
    Receipt,
    ShardRef,
    open_signed,
    sign,
)
from protocol.errors import VerificationError
from protocol.identity import Identity
from protocol.ledger import Audit, audit
from protocol.signing import Signed, canonical_json, sha256_hex
from tests.core_run import SHARD_TOKENS, CoreRun, digest_after

RUN_ID = "0123456789abcdef"
HASH = sha256_hex(b"")
COORDINATOR = Identity.generate()
WORKERS = {identity.peer_id: identity for identity in (Identity.generate() for _ in range(3))}


class LedgerRun:
    """A core with workers that sign their headers, and the ledger that is written of it."""

    def __init__(self) -> None:
        self.core = CoreRun(round={"inner_steps": 10, "min_peers": len(WORKERS)})
        self.writer = LedgerWriter(COORDINATOR, RUN_ID, self.core.spec, None)
        self.rows: list[LedgerRow] = [self.writer.append_genesis(self.make_genesis, 1.0)]
        self.core.start(*WORKERS)

    def make_genesis(self, seq: int, previous: str) -> Genesis:
        return Genesis(
            run_id=RUN_ID,
            seq=seq,
            previous=previous,
            protocol_version=PROTOCOL_VERSION,
            spec=self.core.spec,
            created_unix_s=1_800_000_000,
            num_parameters=10,
            initial_digest=digest_after(0),
            model_config_hash=HASH,
            tokenizer_hash=None,
            shard_index_hash=HASH,
            held_out_hash=HASH,
            num_shards=self.core.num_shards,
            vocabulary_size=256,
        )

    def play_round(self) -> list[LedgerRow]:
        """All contribute, the round closes, its entries are written, all merge. The round's entries."""
        headers = {}
        self.core.now_s += 10.0
        for peer, identity in WORKERS.items():
            lease = self.core.granted[peer]
            payload_hash = sha256_hex(f"{lease.lease_id}".encode())
            signed = sign(make_header(peer, lease.units, lease.round, lease.lease_id, payload_hash), identity)
            headers[signed.hash] = signed
            self.core.commit(peer, contribution_hash=signed.hash, payload_hash=payload_hash)
            self.core.check(peer, payload_hash)
        entries = self.writer.append_round(self.core.find(fx.CloseRound)[0], headers, 2.0)
        self.rows += entries
        self.core.report(*WORKERS)
        return entries

    def evaluate(self) -> None:
        peer, identity = next(iter(WORKERS.items()))
        report = EvaluationReport(
            run_id=RUN_ID,
            peer=peer,
            round=self.core.state.rounds_merged,
            digest=digest_after(self.core.state.rounds_merged),
            held_out_loss=2.0,
            held_out_tokens=100,
            checkpoint=False,
        )
        self.rows.append(self.writer.append_evaluation(sign(report, identity), 3.0))

    def entries(self) -> list[Signed]:
        return [row.signed for row in self.rows]


def make_header(peer: str, units: Sequence[Unit], round_: int, lease_id: int, payload_hash: str) -> Contribution:
    return Contribution(
        run_id=RUN_ID,
        peer=peer,
        round=round_,
        lease_id=lease_id,
        base_digest=digest_after(round_),
        shards=tuple(ShardRef(pass_index=unit[0], index=unit[1]) for unit in units),
        inner_steps=len(units),
        tokens=len(units) * SHARD_TOKENS,
        mean_loss=2.0,
        compute_s=10.0,
        codec="float32",
        payload_hash=payload_hash,
        payload_bytes=100,
    )


def play(num_rounds: int = 3) -> LedgerRun:
    run = LedgerRun()
    for _ in range(num_rounds):
        run.play_round()
        run.evaluate()
    return run


def test_audit_finds_the_cores_credit_when_rounds_were_written() -> None:
    run = play()
    result = Audit()
    kinds = [getattr(entry, "kind", "") for entry in audit(run.entries(), result)]
    assert kinds == ["genesis", *["manifest", "receipt", "receipt", "receipt", "evaluation"] * 3]
    assert result.head == run.writer.head
    assert (result.rounds, result.tokens) == (3, run.core.state.tokens_credited)
    assert result.credit == {peer: run.core.peer(peer).credited_tokens for peer in WORKERS}
    assert sum(result.credit.values()) == result.tokens > 0


def test_manifest_and_receipts_say_what_the_core_decided_when_a_round_closes() -> None:
    run = LedgerRun()
    rows = run.play_round()
    closed = run.core.closed[0]
    manifest = open_signed(rows[0].signed, Manifest, signer=COORDINATOR.public_key, run_id=RUN_ID)
    assert [entry.payload_hash for entry in manifest.contributions] == [c.payload_hash for c in closed.credits]
    assert manifest.divisor == sum(entry.weight for entry in manifest.contributions)
    assert manifest.base_digest == digest_after(0)
    for row, credit in zip(rows[1:], closed.credits, strict=True):
        receipt = open_signed(row.signed, Receipt, signer=COORDINATOR.public_key)
        header = open_signed(Signed.from_json(receipt.contribution), Contribution)
        assert (receipt.peer, receipt.tokens, receipt.lease_id) == (credit.peer, credit.tokens, credit.lease_id)
        assert tuple((shard.pass_index, shard.index) for shard in receipt.shards) == credit.units
        assert header.peer == receipt.peer


def test_chain_goes_on_when_a_new_process_writes_it() -> None:
    run = play()
    run.writer = LedgerWriter(COORDINATOR, RUN_ID, run.core.spec, run.rows[-1])
    run.play_round()
    result = Audit()
    assert [row.seq for row in run.rows] == list(range(len(run.rows)))
    assert len(list(audit(run.entries(), result))) == len(run.rows)
    assert result.head == run.writer.head


Entries = list[Signed]


def resign(signed: Signed, old: bytes, new: bytes, identity: Identity = COORDINATOR) -> Signed:
    assert old in signed.body
    return identity.sign(signed.body.replace(old, new, 1))


@pytest.mark.parametrize("place", range(16))
@pytest.mark.parametrize(
    "change",
    [
        lambda entries, place: [*entries[:place], *entries[place + 1 :]],
        lambda entries, place: [*entries[:place], entries[place], *entries[place:]],
        lambda entries, place: [*entries[: place - 1], entries[place], entries[place - 1], *entries[place + 1 :]],
        lambda entries, place: [
            *entries[:place],
            resign(entries[place], b'"run_id":"0123', b'"run_id":"0124'),
            *entries[place + 1 :],
        ],
        lambda entries, place: [*entries[:place], Identity.generate().sign(entries[place].body), *entries[place + 1 :]],
    ],
    ids=["dropped", "doubled", "swapped", "of another run", "signed by another"],
)
def test_audit_fails_when_an_entry_was_tampered_with(change: Callable[[Entries, int], Entries], place: int) -> None:
    entries = play().entries()
    if place == 0 and len(change(entries, place)) == len(entries):
        place = 1  # the first entry has nothing to be swapped with, and names its own key and run
    if place == len(entries) - 1 and len(change(entries, place)) < len(entries):
        place -= 1  # that the newest entry is missing shows only to who knows the head
    with pytest.raises(VerificationError, match="ledger entry"):
        list(audit(change(entries, place), Audit()))


def test_audit_fails_when_the_coordinator_itself_rewrites_what_it_wrote() -> None:
    entries = play().entries()
    richer = resign(entries[2], b'"tokens":80', b'"tokens":88')
    with pytest.raises(VerificationError, match="ledger entry 2"):
        list(audit([*entries[:2], richer, *entries[3:]], Audit()))
    renamed = resign(entries[1], b'"leased_peers":3', b'"leased_peers":4')  # nothing adds up differently
    with pytest.raises(VerificationError, match="ledger entry 2"):
        list(audit([entries[0], renamed, *entries[2:]], Audit()))


def test_receipt_stays_readable_when_lease_and_carried_shards_are_as_many_as_can_be() -> None:
    peer, identity = next(iter(WORKERS.items()))
    units = [(10**6, 10**9 + index) for index in range(2 * leases.MAX_UNITS)]
    header = sign(make_header(peer, units, 10**6, 10**12, HASH), identity)
    receipt = Receipt(
        run_id=RUN_ID,
        seq=10**12,
        previous=HASH,
        round=10**6,
        peer=peer,
        lease_id=10**12,
        shards=tuple(ShardRef(pass_index=unit[0], index=unit[1]) for unit in units),
        tokens=2**52,
        contribution=header.to_json(),
    )
    assert len(canonical_json(receipt.model_dump(mode="json"))) < MAX_DOCUMENT_BYTES
