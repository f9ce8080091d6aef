"""An invite: whole and unchanged it opens, and anything else is told what to do, before anything is dialled."""

import base64
import string
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.documents import Invite, sign
from protocol.errors import InviteError
from protocol.identity import Identity
from protocol.invite import decode_invite, encode_invite
from protocol.signing import sha256_hex

COORDINATOR = Identity.generate()
OTHER = Identity.generate()
NOW_S = 1_800_000_000


def make_invite(**changes: object) -> Invite:
    fields: dict[str, object] = {
        "run_id": "0123456789abcdef",
        "address": "train.example.org:7640",
        "tls_fingerprint": sha256_hex(b"certificate"),
        "token_id": "fedcba9876543210",
        "role": "worker",
        "expires_unix_s": NOW_S + 3600,
        "uses": 100,
    }
    return Invite.model_validate({**fields, **changes})


TEXT = encode_invite(make_invite(), COORDINATOR)


def pack(packed: bytes) -> str:
    """The string form of packed bytes, with the checksum that belongs to them."""
    return "mh1." + base64.urlsafe_b64encode(zlib.crc32(packed).to_bytes(4, "big") + packed).decode().rstrip("=")


def test_invite_is_read_back_with_the_key_that_signed_it_when_it_is_whole() -> None:
    assert decode_invite(TEXT, now_unix_s=NOW_S) == (make_invite(), COORDINATOR.public_key)


def test_invite_is_short_enough_for_a_chat_message() -> None:
    assert len(TEXT) < 700
    assert all(character.isalnum() or character in "-_." for character in TEXT)


def test_invite_opens_when_a_mail_program_wrapped_it() -> None:
    wrapped = (
        "  " + "\r\n > ".join(TEXT[place : place + 60] for place in range(0, len(TEXT), 60)).replace(">", "") + "\n"
    )
    assert decode_invite(wrapped)[0] == make_invite()


def test_invite_is_refused_when_it_is_cut_at_any_length() -> None:
    for length in range(len(TEXT)):
        with pytest.raises(InviteError, match="send the whole invite again"):
            decode_invite(TEXT[:length])


def opens(text: str) -> bool:
    try:
        decode_invite(text)
    except InviteError:
        return False
    return True


def test_invite_is_refused_when_any_character_was_changed() -> None:
    for place, character in enumerate(TEXT[:-1]):
        for other in {"A", "z", "-", "é", "!"} - {character}:
            assert not opens(TEXT[:place] + other + TEXT[place + 1 :]), f"{other} at {place}"


def test_invite_is_refused_or_the_same_when_its_last_character_was_changed() -> None:
    """Base64's last character has bits that stand for nothing."""
    for other in string.ascii_letters + string.digits + "-_":
        changed = TEXT[:-1] + other
        assert not opens(changed) or decode_invite(changed) == decode_invite(TEXT)


def test_invite_is_refused_when_its_time_is_over() -> None:
    assert decode_invite(TEXT, now_unix_s=NOW_S + 3599)
    with pytest.raises(InviteError, match="expired"):
        decode_invite(TEXT, now_unix_s=NOW_S + 3600)


def test_forgers_key_is_told_when_another_coordinator_signed_the_invite() -> None:
    forged = encode_invite(make_invite(), OTHER)
    assert decode_invite(forged)[1] == OTHER.public_key != COORDINATOR.public_key


def test_invite_is_forged_when_its_checksum_holds_but_its_signature_does_not() -> None:
    signed = sign(make_invite(), COORDINATOR)
    richer = signed.body.replace(b'"uses":100', b'"uses":999')
    for signature, key, body in (
        (signed.signature, signed.public_key, richer),
        (signed.signature, OTHER.public_key, signed.body),
        (OTHER.sign(signed.body).signature, signed.public_key, signed.body),
    ):
        with pytest.raises(InviteError, match="forged"):
            decode_invite(pack(signature + key + zlib.compress(body)))


def test_invite_is_refused_when_it_would_unpack_to_gigabytes() -> None:
    bomb = zlib.compress(b"{" + b" " * 3_000_000)
    with pytest.raises(InviteError):
        decode_invite(pack(bytes(96) + bomb))
    with pytest.raises(InviteError, match="too long"):
        decode_invite("mh1." + "A" * 10_000)


def test_invite_is_refused_when_it_is_another_signed_document() -> None:
    signed = COORDINATOR.sign(b'{"kind":"lease","run_id":"0123456789abcdef"}')
    with pytest.raises(InviteError):
        decode_invite(pack(signed.signature + signed.public_key + zlib.compress(signed.body)))


@settings(max_examples=300)
@given(st.text(max_size=60) | st.binary(max_size=200).map(lambda data: pack(data)))
def test_anything_else_is_refused_with_an_invite_error(text: str) -> None:
    for candidate in (text, "mh1." + text):
        with pytest.raises(InviteError):
            decode_invite(candidate)
