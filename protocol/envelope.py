"""Signed documents as protobuf messages: the bytes travel as they are."""

from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb


def pack(signed: Signed) -> pb.SignedDocument:
    """A signed document for the wire."""
    return pb.SignedDocument(body=signed.body, public_key=signed.public_key, signature=signed.signature)


def unpack(message: pb.SignedDocument) -> Signed:
    """A signed document from the wire; nothing is verified yet."""
    return Signed(body=message.body, public_key=message.public_key, signature=message.signature)
