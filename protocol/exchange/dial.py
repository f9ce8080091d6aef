"""Dialling a coordinator: TLS always, and only to the key that the invite pins.

The certificate is fetched first and its key compared with the fingerprint; the channel then trusts that certificate and
no other, so whoever answers the second connection must hold the same key.
"""

import asyncio
import hashlib
import socket
import ssl
from collections.abc import Sequence

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from protocol.documents import TLS_NAME
from protocol.errors import ConnectionFailedError, VerificationError

_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.ssl_target_name_override", TLS_NAME),
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # a mapping that a router forgot is noticed; 60 s by default
)


async def dial(address: str, fingerprint: str, timeout_s: float = 10.0) -> grpc.aio.Channel:
    """A channel to `address` (host:port) whose TLS key has this fingerprint.

    Raises ConnectionFailedError when nobody answers there, VerificationError when somebody else does.
    """
    certificate = await asyncio.to_thread(_fetch_certificate, address, timeout_s)
    found = _fingerprint(certificate)
    if found != fingerprint:
        raise VerificationError(
            f"{address} is not the coordinator of this invite: its TLS key is {found[:16]}…, the invite names"
            f" {fingerprint[:16]}…; ask for a new invite, and whether somebody listens in between"
        )
    return open_channel(address, certificate.public_bytes(serialization.Encoding.PEM))


def open_channel(address: str, certificate_pem: bytes) -> grpc.aio.Channel:
    """A channel that trusts this certificate and no other."""
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate_pem)
    return grpc.aio.secure_channel(address, credentials, options=_OPTIONS)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of host:port or [v6]:port. Raises ConnectionFailedError when it is neither."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConnectionFailedError(f"{address!r} is not an address; it should be host:port")
    return host.strip("[]"), int(port)


def _fetch_certificate(address: str, timeout_s: float) -> x509.Certificate:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the caller compares the key with the pinned fingerprint
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(split_address(address), timeout=timeout_s) as plain,
            context.wrap_socket(plain) as secure,
        ):
            der = secure.getpeercert(binary_form=True)
    except OSError as error:
        raise ConnectionFailedError(
            f"cannot reach the coordinator at {address}: {error.strerror or error};"
            " is it running, and is the port open?"
        ) from error
    if der is None:
        raise ConnectionFailedError(f"{address} shows no certificate")
    return x509.load_der_x509_certificate(der)


def _fingerprint(certificate: x509.Certificate) -> str:
    public_key = certificate.public_key()
    return hashlib.sha256(
        public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()
