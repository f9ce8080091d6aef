"""Canonical bytes, signing and verifying.

A signed document is its canonical JSON bytes, the Ed25519 public key that signed them, and the signature. The bytes
travel and are stored as they are; nothing is ever re-serialised to be checked, so two peers cannot disagree about what
was signed.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import VerificationError

_DOMAIN = b"manyhands/1\0"  # so that a signature made here means nothing in any other protocol


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; NaN and infinities are refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of `data` as 64 hex digits, the form in which every hash is written."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """Canonical bytes with the key that signed them. Nothing is verified until `verify` is called."""

    body: bytes
    public_key: bytes  # 32 bytes, Ed25519
    signature: bytes  # 64 bytes

    @property
    def hash(self) -> str:
        """SHA-256 of the body: what the ledger chains."""
        return sha256_hex(self.body)

    def verify(self) -> None:
        """Raise VerificationError unless the signature holds for body and key."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(self.signature, _DOMAIN + self.body)
        except (InvalidSignature, ValueError) as error:
            raise VerificationError("the signature does not hold: the document was altered or forged") from error

    def to_json(self) -> dict[str, str]:
        """As a JSON object, for embedding one signed document in another and for files."""
        return {"body": self.body.decode(), "public_key": self.public_key.hex(), "signature": self.signature.hex()}

    @classmethod
    def from_json(cls, value: dict[str, str]) -> "Signed":
        """The inverse of `to_json`. Raises VerificationError for anything else."""
        try:
            return cls(
                body=value["body"].encode(),
                public_key=bytes.fromhex(value["public_key"]),
                signature=bytes.fromhex(value["signature"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VerificationError("not a signed document") from error


def signing_bytes(body: bytes) -> bytes:
    """What is given to Ed25519 for a document's canonical bytes."""
    return _DOMAIN + body
