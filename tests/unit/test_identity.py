"""A peer's key: made once, kept from others' eyes, and the same peer to libp2p as to us."""

import os
import stat
from pathlib import Path

import pytest

from protocol.errors import ManyhandsError, VerificationError
from protocol.identity import Identity, peer_id_of


def test_key_is_readable_by_its_owner_alone_when_it_is_made(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Identity.load_or_create(tmp_path / "deep" / "identity.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "identity.key").stat().st_mode) == 0o600


def test_peer_id_stays_when_the_key_is_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first, second = Identity.load_or_create(path), Identity.load_or_create(path)
    assert first.peer_id == second.peer_id
    assert first.sign(b"x") == second.sign(b"x")
    assert Identity.load_or_create(tmp_path / "other.key").peer_id != first.peer_id


def test_peer_id_is_libp2ps_when_hivemind_reads_the_same_file(tmp_path: Path) -> None:
    from hivemind.p2p import PeerID
    from hivemind.proto import crypto_pb2

    path = tmp_path / "identity.key"
    identity = Identity.load_or_create(path)
    private = crypto_pb2.PrivateKey.FromString(path.read_bytes())
    assert private.key_type == crypto_pb2.Ed25519
    assert private.data[32:] == identity.public_key
    public = crypto_pb2.PublicKey(key_type=crypto_pb2.Ed25519, data=private.data[32:]).SerializeToString()
    # So short a key is its own hash: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
    peer_id = PeerID(b"\x00" + bytes([len(public)]) + public)
    assert identity.peer_id == peer_id.to_base58()
    assert PeerID.from_base58(identity.peer_id) == peer_id


def test_peer_id_is_known_when_the_key_is_a_published_test_vector() -> None:
    public_key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert peer_id_of(public_key) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


@pytest.mark.parametrize("size", [0, 31, 33])
def test_key_of_wrong_size_is_no_peer(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_of(bytes(size))


@pytest.mark.parametrize("content", [b"", b"x" * 68, b"\x08\x00\x12\x40" + bytes(64), b"\x08\x01\x12\x40" + bytes(63)])
def test_remedy_is_told_and_the_file_kept_when_it_is_no_identity(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(ManyhandsError, match="move it away"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_signature_holds_only_for_its_own_key_and_bytes() -> None:
    signed = Identity.generate().sign(b"a lease")
    signed.verify()
    for changed in (
        type(signed)(body=b"another", public_key=signed.public_key, signature=signed.signature),
        type(signed)(body=signed.body, public_key=Identity.generate().public_key, signature=signed.signature),
    ):
        with pytest.raises(VerificationError):
            changed.verify()
