"""A peer's identity: one Ed25519 key that signs its documents and is its libp2p key.

The file is libp2p's own format (protobuf `PrivateKey`: key type Ed25519, 32-byte seed and 32-byte public key), so the
libp2p daemon reads it as it is, and the peer id is the one that libp2p computes. Mode 0600, made at first start.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import ManyhandsError
from protocol.signing import Signed, signing_bytes

_PRIVATE_PREFIX = b"\x08\x01\x12\x40"  # field 1: key type Ed25519; field 2: 64 bytes
_PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"  # identity multihash, 36 bytes, of the protobuf PublicKey


def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id (base58) of a 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return str(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and what follows from it."""

    private_key: Ed25519PrivateKey

    @property
    def public_key(self) -> bytes:
        return self.private_key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    @property
    def peer_id(self) -> str:
        return peer_id_of(self.public_key)

    def sign(self, body: bytes) -> Signed:
        """Sign canonical bytes (see protocol.signing)."""
        return Signed(body=body, public_key=self.public_key, signature=self.private_key.sign(signing_bytes(body)))

    @classmethod
    def generate(cls) -> "Identity":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Read the key at `path`, or make one there with mode 0600. Raises ManyhandsError when it is no such file."""
        try:
            return cls._from_bytes(path.read_bytes(), path)
        except FileNotFoundError:
            identity = cls.generate()
            identity._write(path)
            return identity

    @classmethod
    def _from_bytes(cls, data: bytes, path: Path) -> "Identity":
        if len(data) != 68 or not data.startswith(_PRIVATE_PREFIX):
            raise ManyhandsError(f"{path} is not an Ed25519 identity; move it away to have a new one made")
        return cls(Ed25519PrivateKey.from_private_bytes(data[4:36]))

    def _write(self, path: Path) -> None:
        seed = self.private_key.private_bytes(
            serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_PRIVATE_PREFIX + seed + self.public_key)
            file.flush()
            os.fsync(file.fileno())
