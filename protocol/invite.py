"""The invite string: `mh1.` + base64url(signature, public key, document).

One string carries the coordinator's address, run id, TLS fingerprint, signing key and the join token. The document is
signed by the coordinator, so a changed letter is noticed before anything is dialled; a checksum tells a truncated
invite from a forged one.
"""

import base64
import binascii
import zlib

from protocol.documents import Invite, open_signed, sign
from protocol.errors import InviteError, VerificationError
from protocol.identity import Identity
from protocol.signing import Signed

_PREFIX = "mh1."
_ASK = "ask whoever invited you to send the whole invite again"


def encode_invite(invite: Invite, identity: Identity) -> str:
    """Sign an invite and write it as one string of URL-safe characters."""
    signed = sign(invite, identity)
    packed = signed.signature + signed.public_key + zlib.compress(signed.body, 9)
    checksum = zlib.crc32(packed).to_bytes(4, "big")
    return _PREFIX + base64.urlsafe_b64encode(checksum + packed).decode().rstrip("=")


def decode_invite(text: str, *, now_unix_s: float | None = None) -> tuple[Invite, bytes]:
    """The invite in `text` and the public key that signed it. Raises InviteError with one line that says what to do.

    The caller compares the key with its own (a coordinator) or goes on to pin the TLS key that it names (a worker).
    """
    text = "".join(text.split())
    if not text.startswith(_PREFIX):
        raise InviteError(f"that is not an invite: an invite starts with {_PREFIX!r}; {_ASK}")
    if len(text) > 8192:
        raise InviteError(f"that invite is far too long; {_ASK}")
    encoded = text.removeprefix(_PREFIX)
    try:
        raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (binascii.Error, ValueError) as error:
        raise InviteError(f"the invite is damaged or incomplete; {_ASK}") from error
    checksum, packed = raw[:4], raw[4:]
    if len(packed) <= 96 or zlib.crc32(packed).to_bytes(4, "big") != checksum:
        raise InviteError(f"the invite is damaged or incomplete; {_ASK}")
    try:
        decompressor = zlib.decompressobj()
        body = decompressor.decompress(packed[96:], Invite.max_bytes)
        if decompressor.unconsumed_tail:
            raise VerificationError("the invite is larger than any invite")
        signed = Signed(body=body, public_key=packed[64:96], signature=packed[:64])
        invite = open_signed(signed, Invite, signer=signed.public_key)
    except (zlib.error, VerificationError) as error:
        raise InviteError(f"the invite is forged: its signature does not hold; {_ASK}") from error
    if now_unix_s is not None and now_unix_s >= invite.expires_unix_s:
        raise InviteError("the invite has expired; ask for a new one (`manyhands coordinator invite`)")
    return invite, signed.public_key
