"""The conversation with the coordinator: one session stream, and blobs and ledger beside it.

Opening a link joins the run. What the coordinator sends is verified here (its signature, this run) before anybody acts
on it. A link is used once: when the connection breaks, the owner opens another.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import grpc
import structlog

from protocol.documents import (
    OLDEST_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    Document,
    Genesis,
    Invite,
    JoinRequest,
    Manifest,
    open_signed,
    sign,
)
from protocol.envelope import pack, unpack
from protocol.errors import (
    ConnectionFailedError,
    InviteError,
    ManyhandsError,
    MissingBlobError,
    RefusedError,
    VerificationError,
)
from protocol.exchange.dial import dial
from protocol.exchange.source import UNLIMITED, BlobSink
from protocol.exchange.store import BlobStore
from protocol.exchange.throttle import Throttle
from protocol.identity import Identity
from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb
from protocol.wire.coordinator_pb2_grpc import CoordinatorServiceStub

log = structlog.get_logger()
ANSWER_TIMEOUT_S = 20.0
WAITING_TOLD_EVERY_S = 2.0
CHUNK_TIMEOUT_S = 60.0
CHUNK_BYTES = 256 * 1024
MAX_HASHES = 4096
D = TypeVar("D", bound=Document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What a peer says of itself when it joins."""

    name: str
    device: str
    software: str
    addresses: tuple[str, ...] = ()
    lease_id: int | None = None
    seed: bool = False


def choose_version(theirs: int) -> int:
    """The newest protocol version that both sides speak; the coordinator speaks `theirs` and the one before.

    Raises RefusedError with what to type.
    """
    if theirs < OLDEST_PROTOCOL_VERSION:
        raise RefusedError(
            f"the coordinator speaks protocol version {theirs}, this worker {OLDEST_PROTOCOL_VERSION} to "
            f"{PROTOCOL_VERSION}; its operator should type `pip install --upgrade manyhands`"
        )
    if theirs > PROTOCOL_VERSION:
        log.warning("the coordinator is newer; type `pip install --upgrade manyhands`", theirs=theirs)
    return min(theirs, PROTOCOL_VERSION)


class CoordinatorLink:
    """A joined session. Use as an async context manager."""

    def __init__(
        self,
        invite_text: str,
        invite: Invite,
        coordinator_key: bytes,
        identity: Identity,
        uploads: Throttle = UNLIMITED,
    ) -> None:
        self._invite_text = invite_text
        self._invite = invite
        self._coordinator_key = coordinator_key
        self._identity = identity
        self._uploads = uploads
        self.protocol_version = PROTOCOL_VERSION
        self._outbox: asyncio.Queue[pb.PeerMessage | None] = asyncio.Queue()
        self._read: asyncio.Future[pb.CoordinatorMessage] | None = None  # under way
        self._metadata: tuple[tuple[str, str], ...] = ()
        self.genesis: Genesis
        self.welcome: pb.Welcome

    async def __aenter__(self) -> Self:
        self._channel = await dial(self._invite.address, self._invite.tls_fingerprint)
        self._stub = CoordinatorServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outbox.put_nowait(None)
        if self._read is not None:
            self._read.cancel()
            await asyncio.gather(self._read, return_exceptions=True)
        await self._channel.close(grace=1.0)

    async def join(self, introduction: Introduction, on_wait: Callable[[str], None] = lambda _: None) -> pb.Welcome:
        """Answer the challenge and be let in, at once or when the operator has approved this peer.

        `on_wait` is told what it waits for, again and again; what it raises ends the session. Raises InviteError,
        RefusedError or ConnectionFailedError.
        """
        self._call = self._stub.Session(self._outgoing())
        self._messages = self._call.__aiter__()
        challenge = await self._receive(ANSWER_TIMEOUT_S)
        self.protocol_version = choose_version(int(challenge.challenge.protocol_version))
        request = JoinRequest(
            run_id=self._invite.run_id,
            peer=self._identity.peer_id,
            nonce=challenge.challenge.nonce,
            invite=self._invite_text,
            protocol_version=self.protocol_version,
            software=introduction.software,
            name=introduction.name,
            device=introduction.device,
            addresses=introduction.addresses,
            lease_id=introduction.lease_id,
            seed=introduction.seed,
        )
        self.send(join_request=pack(sign(request, self._identity)))
        answer = await self._receive(ANSWER_TIMEOUT_S)
        if answer.WhichOneof("message") == "phase":
            answer = await self._wait_for_approval(answer.phase.reason, on_wait)
        if answer.WhichOneof("message") != "welcome":
            raise VerificationError("the coordinator answered a join request with something else")
        self.welcome = answer.welcome
        self.genesis = self.open(unpack(self.welcome.genesis), Genesis)
        self._metadata = (("session-token", self.welcome.session_token),)
        return self.welcome

    async def _wait_for_approval(self, reason: str, on_wait: Callable[[str], None]) -> pb.CoordinatorMessage:
        try:
            done = False
            while not done:
                on_wait(reason)
                done = await self._wait_for_message(WAITING_TOLD_EVERY_S)
            return await self._receive(None)
        except (asyncio.CancelledError, ManyhandsError):
            self.send(leaving=pb.Leaving(reason="stopped by its owner"))
            await self.drain()
            raise

    def open(self, signed: Signed, model: type[D]) -> D:
        """A document that the coordinator signed for this run. Raises VerificationError."""
        return open_signed(signed, model, signer=self._coordinator_key, run_id=self._invite.run_id)

    def send_availability(self, pause_reason: str) -> None:
        """Say whether this worker takes leases: why not, or nothing. A coordinator of version 1 is not told."""
        if self.protocol_version >= 2:
            self.send(availability=pb.Availability(pause_reason=pause_reason))

    def send(self, **message: object) -> None:
        """Queue one message (one field of PeerMessage)."""
        self._outbox.put_nowait(pb.PeerMessage(**message))  # type: ignore[arg-type] # one field of the oneof

    async def messages(self) -> AsyncIterator[pb.CoordinatorMessage]:
        """What the coordinator says, until the link ends (ConnectionFailedError) or it refuses this peer."""
        while True:
            yield await self._receive(None)

    async def _receive(self, timeout_s: float | None) -> pb.CoordinatorMessage:
        if not await self._wait_for_message(timeout_s) or self._read is None:
            raise ConnectionFailedError(f"{self._invite.address} does not answer")
        read, self._read = self._read, None
        try:
            message = read.result()
        except StopAsyncIteration as error:
            raise ConnectionFailedError("the coordinator ended the session") from error
        except grpc.aio.AioRpcError as error:
            raise ConnectionFailedError(f"the connection to {self._invite.address} broke: {error.details()}") from error
        if message.WhichOneof("message") == "refused":
            refused = message.refused
            if refused.code.startswith("invite"):
                raise InviteError(refused.reason)
            if refused.code == "silent":
                raise ConnectionFailedError(f"the coordinator ended the session: {refused.reason}")
            raise RefusedError(f"the coordinator refused this worker: {refused.reason}")
        return message

    async def _wait_for_message(self, timeout_s: float | None) -> bool:
        """Whether the next message, or the end, is here."""
        # Whoever is cancelled here must still be able to say goodbye, and gRPC ends a call whose read is cancelled.
        self._read = self._read or asyncio.ensure_future(anext(self._messages))
        done, _ = await asyncio.wait({self._read}, timeout=timeout_s)
        return bool(done)

    async def drain(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, end the session and wait until the coordinator has taken it."""
        self._outbox.put_nowait(None)
        with suppress(TimeoutError, ManyhandsError):  # the last message raises, too: the session is over then
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._receive(None)

    async def _outgoing(self) -> AsyncIterator[pb.PeerMessage]:
        while (message := await self._outbox.get()) is not None:
            yield message

    # ---- blobs and ledger

    @property
    def name(self) -> str:
        return "the coordinator"

    @property
    def peer_id(self) -> str:
        """This side's own."""
        return self._identity.peer_id

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        """As an exchange Source: stream part of one blob from the coordinator into `sink`."""
        request = pb.FetchBlobsRequest(hashes=[blob_hash], offset=sink.offset, length=sink.end - sink.offset)
        async with aclosing(self._stream_blobs(request)) as chunks:
            async for chunk in chunks:
                await sink.write(chunk.data)
                if sink.offset >= sink.end:
                    return

    async def fetch_small_blobs(self, hashes: Sequence[str], store: BlobStore, max_bytes: int) -> None:
        """Fetch the blobs that `store` lacks, each of at most `max_bytes`, into the store."""
        missing = [hash_ for hash_ in dict.fromkeys(hashes) if not store.has(hash_)]
        for start in range(0, len(missing), MAX_HASHES):
            wanted = missing[start : start + MAX_HASHES]
            parts: dict[str, list[bytes]] = {}
            sizes = 0
            async for chunk in self._stream_blobs(pb.FetchBlobsRequest(hashes=wanted)):
                if chunk.hash:
                    current, sizes = chunk.hash, 0
                    parts[current] = []
                sizes += len(chunk.data)
                if sizes > max_bytes:
                    raise VerificationError(f"the coordinator sent more than {max_bytes} bytes for {current}")
                parts[current].append(chunk.data)
            for hash_ in wanted:
                if store.put(b"".join(parts.get(hash_, []))) != hash_:
                    raise VerificationError(f"the coordinator sent something else for {hash_}")

    async def push_blob(self, hash_: str, store: BlobStore) -> None:
        """Push a blob of `store` to the coordinator. Raises RefusedError with its reason."""
        try:
            reply = await self._stub.PushBlob(self._chunks(hash_, store), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise ConnectionFailedError(f"sending to {self._invite.address} broke off: {error.details()}") from error
        if not reply.stored:
            raise RefusedError(f"the coordinator did not take blob {hash_[:12]}: {reply.reason}")

    async def _chunks(self, hash_: str, store: BlobStore) -> AsyncIterator[pb.BlobChunk]:
        size, offset = store.size(hash_), 0
        while offset < size or offset == 0:
            data = await asyncio.to_thread(store.read_piece, hash_, offset, min(CHUNK_BYTES, self._uploads.chunk_bytes))
            await self._uploads.wait(len(data))
            first = offset == 0
            yield pb.BlobChunk(hash=hash_ if first else "", size=size if first else 0, data=data)
            offset += len(data)
            if not data:
                return

    async def manifests_from(self, round_: int) -> AsyncIterator[Manifest]:
        """The manifests of this round and later, in order, verified."""
        request = pb.GetLedgerRequest(manifests_only=True, from_round=round_)
        try:
            async for message in self._stub.GetLedger(request, metadata=self._metadata):
                yield self.open(unpack(message), Manifest)
        except grpc.aio.AioRpcError as error:
            raise ConnectionFailedError(f"the ledger broke off: {error.details()}") from error

    async def _stream_blobs(self, request: pb.FetchBlobsRequest) -> AsyncGenerator[pb.BlobChunk, None]:
        call = self._stub.FetchBlobs(request, metadata=self._metadata)
        stream = call.__aiter__()
        try:
            while True:
                async with asyncio.timeout(CHUNK_TIMEOUT_S):  # wait_for would lose a cancellation that comes with data
                    chunk = await anext(stream)
                yield chunk
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise ConnectionFailedError("the coordinator stopped sending") from error
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise MissingBlobError(f"the coordinator does not have it: {error.details()}") from error
            raise ConnectionFailedError(f"the connection broke: {error.details()}") from error
        finally:
            call.cancel()  # whoever has enough before the end
