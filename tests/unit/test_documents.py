"""A document is what its signer signed, all of it, and nothing else; whatever a peer sends ends with one sentence."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.documents import (
    MAX_DOCUMENT_BYTES,
    Contribution,
    Document,
    EvaluationReport,
    Invite,
    JoinRequest,
    Lease,
    Manifest,
    OperatorCommand,
    Receipt,
    ShardRef,
    open_signed,
    sign,
)
from protocol.errors import VerificationError
from protocol.identity import Identity
from protocol.signing import Signed, canonical_json, sha256_hex

PEER = Identity.generate()
OTHER = Identity.generate()
RUN_ID = "0123456789abcdef"
HASH = sha256_hex(b"")


def contribution(**changes: Any) -> Contribution:
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "peer": PEER.peer_id,
        "round": 3,
        "lease_id": 12,
        "base_digest": HASH,
        "shards": (ShardRef(pass_index=0, index=7), ShardRef(pass_index=0, index=9)),
        "inner_steps": 20,
        "tokens": 4096,
        "mean_loss": 2.5,
        "compute_s": 1.25,
        "codec": "sign",
        "payload_hash": HASH,
        "payload_bytes": 1000,
    }
    return Contribution(**{**fields, **changes})


def lease(**changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "lease_id": 1,
        "peer": PEER.peer_id,
        "round": 0,
        "base_digest": HASH,
        "shards": (),
        "steps_per_shard": 1,
        "deadline_in_s": 60.0,
        "tokens_before": 0,
        "round_tokens": 4096,
        "codec": "sign",
        "codec_options": {},
    }
    return Lease(**{**fields, **changes})


def test_learning_rate_is_in_a_lease_only_when_the_run_leaves_it_to_leases() -> None:
    plain, rated = (sign(lease(learning_rate=rate), PEER) for rate in (None, 0.01))
    assert b"learning_rate" not in plain.body, "a worker of the last protocol version refuses what it does not know"
    assert open_signed(plain, Lease, signer=PEER.public_key).learning_rate is None
    assert open_signed(rated, Lease, signer=PEER.public_key).learning_rate == 0.01


def test_document_is_read_back_when_it_is_opened() -> None:
    document = contribution()
    assert open_signed(sign(document, PEER), Contribution, run_id=RUN_ID) == document
    assert (
        open_signed(Signed.from_json(sign(document, PEER).to_json()), Contribution, signer=PEER.public_key) == document
    )


def test_bytes_are_canonical_when_a_document_is_signed() -> None:
    assert sign(contribution(), PEER).body == canonical_json(json.loads(sign(contribution(), PEER).body))


def test_document_is_refused_when_any_byte_of_it_was_changed() -> None:
    signed = sign(contribution(), PEER)
    for field in ("body", "public_key", "signature"):
        data = getattr(signed, field)
        for place in range(len(data)):
            parts = {"body": signed.body, "public_key": signed.public_key, "signature": signed.signature}
            parts[field] = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            with pytest.raises(VerificationError):
                open_signed(Signed(**parts), Contribution)


@pytest.mark.parametrize("field", ["body", "public_key", "signature"])
def test_document_is_refused_when_a_part_is_cut_or_too_long(field: str) -> None:
    signed = sign(contribution(), PEER)
    for data in (b"", getattr(signed, field)[:-1], getattr(signed, field) + b"\0"):
        parts = {"body": signed.body, "public_key": signed.public_key, "signature": signed.signature, field: data}
        with pytest.raises(VerificationError):
            open_signed(Signed(**parts), Contribution)


def test_document_is_refused_when_another_key_signed_it() -> None:
    with pytest.raises(VerificationError, match="names a peer that did not sign it"):
        open_signed(sign(contribution(), OTHER), Contribution)
    with pytest.raises(VerificationError, match="not signed by the key"):
        open_signed(sign(contribution(), OTHER), Contribution, signer=PEER.public_key)


def test_document_is_refused_when_it_is_of_another_run() -> None:
    with pytest.raises(VerificationError, match="belongs to run"):
        open_signed(sign(contribution(), PEER), Contribution, run_id="f" * 16)


def test_document_is_refused_when_its_signature_was_made_for_another_protocol() -> None:
    body = sign(contribution(), PEER).body
    foreign = Signed(body=body, public_key=PEER.public_key, signature=PEER.private_key.sign(body))
    with pytest.raises(VerificationError, match="signature"):
        open_signed(foreign, Contribution)


@pytest.mark.parametrize("model", [Lease, EvaluationReport, Receipt, Manifest, JoinRequest, Invite, OperatorCommand])
def test_document_is_refused_when_it_is_passed_off_as_another(model: type[Document]) -> None:
    with pytest.raises(VerificationError):
        open_signed(sign(contribution(), PEER), model, signer=PEER.public_key)


def test_document_is_refused_unread_when_it_is_too_large() -> None:
    join = {"run_id": RUN_ID, "kind": "join_request", "name": "x" * 20_000}
    with pytest.raises(VerificationError, match="at most 16384"):
        open_signed(PEER.sign(json.dumps(join).encode()), JoinRequest)
    padded = sign(contribution(), PEER).body + b" " * MAX_DOCUMENT_BYTES
    with pytest.raises(VerificationError, match="at most"):
        open_signed(PEER.sign(padded), Contribution)


Change = Callable[[dict[str, Any]], Any]


def set_field(name: str, value: object) -> Change:
    return lambda body: {**body, name: value}


def remove_field(name: str) -> Change:
    return lambda body: {key: value for key, value in body.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        set_field("bonus", 1),
        set_field("shards", [{"pass_index": 0, "index": 1, "bonus": 1}]),
        remove_field("tokens"),
        set_field("tokens", -1),
        set_field("tokens", 2**53),
        set_field("tokens", 1.5),
        set_field("tokens", "4096"),
        set_field("tokens", True),
        set_field("tokens", None),
        set_field("mean_loss", float("nan")),
        set_field("mean_loss", float("inf")),
        set_field("compute_s", float("-inf")),
        set_field("compute_s", -1.0),
        set_field("codec", "si\ngn"),
        set_field("codec", "\x00"),
        set_field("codec", "x" * 65),
        set_field("codec", "\ud800"),
        set_field("payload_hash", HASH + "\n"),
        set_field("payload_hash", HASH.upper()),
        set_field("payload_hash", HASH[:-1]),
        set_field("peer", PEER.peer_id + " "),
        set_field("peer", "Qm" + PEER.peer_id[2:]),
        set_field("run_id", "../../etc/passwd"),
        set_field("kind", "lease"),
        set_field("shards", {"0": 1}),
        lambda _: [],
        lambda _: "contribution",
        lambda _: None,
    ],
)
def test_document_is_refused_when_a_field_is_not_what_it_must_be(change: Change) -> None:
    """A peer with a program of its own signs what it likes."""
    body = change(contribution().model_dump(mode="json"))
    with pytest.raises(VerificationError) as caught:
        open_signed(PEER.sign(json.dumps(body).encode()), Contribution)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b'"2.5"'])
def test_number_is_refused_when_it_is_not_finite(literal: bytes) -> None:
    body = sign(contribution(), PEER).body.replace(b'"mean_loss":2.5', b'"mean_loss":' + literal)
    assert literal in body
    with pytest.raises(VerificationError, match=r"mean_loss|body"):
        open_signed(PEER.sign(body), Contribution)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5_000, b'"\xed\xa0\x80"']
)
def test_bytes_are_refused_when_they_are_no_json_object(body: bytes) -> None:
    with pytest.raises(VerificationError, match="not a valid Contribution"):
        open_signed(PEER.sign(body), Contribution)


@settings(max_examples=200)
@given(st.binary(max_size=300), st.binary(max_size=40), st.binary(max_size=70))
def test_anything_is_refused_with_a_verification_error_when_it_is_random(
    body: bytes, public_key: bytes, signature: bytes
) -> None:
    with pytest.raises(VerificationError):
        open_signed(Signed(body=body, public_key=public_key, signature=signature), Contribution)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


@settings(max_examples=200)
@given(st.sampled_from(sorted(Contribution.model_fields)), JSON)
def test_signed_nonsense_is_refused_or_valid_but_never_a_crash(field: str, value: object) -> None:
    body = contribution().model_dump(mode="json")
    body[field] = value
    signed = PEER.sign(json.dumps(body).encode())
    try:
        document = open_signed(signed, Contribution)
    except VerificationError:
        return
    assert document.peer == PEER.peer_id
    assert document.mean_loss < float("inf")


@pytest.mark.parametrize("value", [{}, {"body": "x"}, {"body": 1, "public_key": "", "signature": ""}, [], None, "x"])
def test_embedded_document_is_refused_when_it_is_not_one(value: Any) -> None:
    with pytest.raises(VerificationError, match="not a signed document"):
        Signed.from_json(value)


def test_documents_cannot_be_changed_when_they_were_opened() -> None:
    document = open_signed(sign(contribution(), PEER), Contribution)
    with pytest.raises(ValueError, match="frozen"):
        document.tokens = 10**9  # type: ignore[misc] # what the test is about
