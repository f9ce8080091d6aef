"""CoordinatorService: what peers and the operator may ask over gRPC, and the limits on it.

Peer input is limited in bytes by the server's options, verified and parsed here and in coordinator.peer_messages, and
becomes an event. Bad input ends with INVALID_ARGUMENT or PERMISSION_DENIED and a sentence, never with INTERNAL.
Decisions are the core's.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from secrets import token_hex
from typing import Any

import grpc
import structlog

from coordinator.core import events as ev
from coordinator.core.effects import HoldPeer, RefusePeer
from coordinator.engine import Committed, Engine
from coordinator.payloads import PayloadChecker
from coordinator.peer_messages import PeerMessages
from coordinator.sessions import PeerSession, Sessions
from coordinator.storage.database import Database
from protocol.documents import (
    OLDEST_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    Genesis,
    Invite,
    JoinRequest,
    OperatorCommand,
    open_signed,
)
from protocol.envelope import pack, unpack
from protocol.errors import InviteError, ManyhandsError, VerificationError
from protocol.exchange.store import BlobStore
from protocol.invite import decode_invite
from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb
from protocol.wire.coordinator_pb2_grpc import CoordinatorServiceServicer

log = structlog.get_logger()
HANDSHAKE_TIMEOUT_S = 15.0
CHUNK_BYTES = 256 * 1024
MAX_BLOB_BYTES = 64 << 30
MAX_HASHES = 4096
COMMAND_MAX_AGE_S = 60

Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorService(CoordinatorServiceServicer):
    """One run's service."""

    def __init__(
        self,
        *,
        genesis: Signed,
        public_key: bytes,
        engine: Engine,
        sessions: Sessions,
        payloads: PayloadChecker,
        store: BlobStore,
        database: Database,
        operate: Callable[[OperatorCommand], Awaitable[dict[str, object]]],
        approval: bool = False,
    ) -> None:
        self._run = Genesis.model_validate_json(genesis.body)
        self._public_key = public_key
        self._engine = engine
        self._messages = PeerMessages(self._run, engine, payloads, store)
        self._sessions = sessions
        self._payloads = payloads
        self._store = store
        self._database = database
        self._operate = operate
        self._approval = approval
        self._seen_nonces: dict[str, float] = {}

    # ---- session

    async def Session(  # noqa: N802 - the name is the service's
        self, request_iterator: AsyncIterator[pb.PeerMessage], context: Context
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        nonce = token_hex(32)
        yield pb.CoordinatorMessage(challenge=pb.Challenge(nonce=nonce, protocol_version=PROTOCOL_VERSION))
        try:
            join, invite = await self._read_join(request_iterator, nonce)
        except InviteError as error:
            yield _refused("invite", str(error))
            return
        except (ManyhandsError, TimeoutError, StopAsyncIteration) as error:
            yield _refused("join", str(error) or "no join request arrived in time")
            return
        session = PeerSession(
            peer=join.peer, name=join.name, role=invite.role, addresses=join.addresses, seed=join.seed
        )
        decided: asyncio.Future[RefusePeer | None] = asyncio.get_running_loop().create_future()
        self._engine.submit(
            ev.PeerJoined(
                peer=join.peer,
                name=join.name,
                device=join.device,
                role=invite.role,
                token_id=invite.token_id,
                lease_id=join.lease_id,
                software=join.software,
                unix_s=time.time(),
                needs_approval=self._approval and invite.role == "worker",
            ),
            on_committed=lambda committed: self._let_in(committed, session, decided),
        )
        refusal = await decided
        if refusal is not None:
            yield _refused(refusal.code, refusal.reason)
            return
        log.info("joined", peer=join.peer, name=join.name, role=invite.role, device=join.device)
        reader = asyncio.create_task(self._read_messages(request_iterator, session))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            session.closed = True
            if self._sessions.remove(session):
                self._engine.submit(ev.PeerLeft(peer=session.peer, reason=session.goodbye or ev.SESSION_ENDED))
                log.info("left", peer=session.peer, name=session.name)

    async def _read_join(self, messages: AsyncIterator[pb.PeerMessage], nonce: str) -> tuple[JoinRequest, Invite]:
        """The verified first message. Raises InviteError or another ManyhandsError with the sentence for the peer."""
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            message = await anext(messages)
        if message.WhichOneof("message") != "join_request":
            raise VerificationError("a session begins with a join request")
        signed = unpack(message.join_request)
        join = open_signed(signed, JoinRequest, run_id=self._run.run_id)
        if not hmac.compare_digest(join.nonce, nonce):
            raise VerificationError("the join request answers another challenge")
        if not OLDEST_PROTOCOL_VERSION <= join.protocol_version <= PROTOCOL_VERSION:
            raise VerificationError(
                f"this run speaks protocol versions {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}, the worker "
                f"{join.protocol_version}; `pip install --upgrade manyhands`"
            )
        invite, issuer = decode_invite(join.invite, now_unix_s=time.time())
        if issuer != self._public_key or invite.run_id != self._run.run_id:
            raise InviteError("the invite is forged: this coordinator did not issue it; ask for a new one")
        return join, invite

    def _let_in(self, committed: Committed, session: PeerSession, decided: "asyncio.Future[RefusePeer | None]") -> None:
        refusal = next((effect for effect in committed.effects if isinstance(effect, RefusePeer)), None)
        held = next((effect for effect in committed.effects if isinstance(effect, HoldPeer)), None)
        if refusal is None:
            self._sessions.add(session)
        if held is not None:
            session.waiting, session.heartbeat = True, pb.Heartbeat(activity=held.reason)
            session.send(phase=pb.PhaseNotice(phase="waiting_for_approval", reason=held.reason))
        elif refusal is None:
            self._sessions.welcome(session)
        if not decided.done():
            decided.set_result(refusal)

    async def _read_messages(self, messages: AsyncIterator[pb.PeerMessage], session: PeerSession) -> None:
        """Turn a peer's messages into events until it leaves, falls silent or says something malformed."""
        try:
            while True:
                message = await self._next_message(messages, session)
                if session.closed:
                    break
                self._messages.take(message, session)
                if message.WhichOneof("message") == "leaving":
                    break
        except TimeoutError:
            log.warning("silent peer", peer=session.peer, timeout_s=self._run.spec.round.heartbeat_timeout_s)
            session.send(refused=pb.Refused(code="silent", reason="nothing was heard from this worker for too long"))
        except StopAsyncIteration:
            pass
        except ManyhandsError as error:
            log.warning("bad message", peer=session.peer, error=str(error))
            session.send(refused=pb.Refused(code="bad_message", reason=str(error)))
        except (grpc.RpcError, asyncio.CancelledError):
            raise
        finally:
            session.close()

    async def _next_message(self, messages: AsyncIterator[pb.PeerMessage], session: PeerSession) -> pb.PeerMessage:
        """Raises TimeoutError after too long a silence. Who waits for approval may be silent: it knows no pace yet."""
        timeout_s = self._run.spec.round.heartbeat_timeout_s
        if not session.waiting:
            async with asyncio.timeout(timeout_s):  # see Engine._next_submissions
                return await anext(messages)
        read, may_be_silent = asyncio.ensure_future(anext(messages)), True
        try:
            while may_be_silent and not read.done():
                may_be_silent = session.waiting
                await asyncio.wait({read}, timeout=timeout_s)
            if not read.done():
                raise TimeoutError
            return read.result()
        finally:
            read.cancel()

    # ---- blobs and ledger

    async def PushBlob(  # noqa: N802 - the name is the service's
        self, request_iterator: AsyncIterator[pb.BlobChunk], context: Context
    ) -> pb.PushBlobReply:
        started_s = time.monotonic()
        session = await self._authenticate(context)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                first = await anext(request_iterator)
            size = self._allowed_size(first, session)
            if size is None:
                return pb.PushBlobReply(stored=False, reason="nobody announced this blob")
            if not self._store.has(first.hash):
                with self._store.receive(first.hash, size, resume=False) as writer:
                    writer.write(first.data)
                    async for chunk in request_iterator:
                        await asyncio.to_thread(writer.write, chunk.data)
                    await asyncio.to_thread(partial(writer.commit, durable=True))
        except (VerificationError, ValueError) as error:
            return pb.PushBlobReply(stored=False, reason=str(error))
        except (TimeoutError, StopAsyncIteration):
            return pb.PushBlobReply(stored=False, reason="no data arrived")
        self._payloads.arrived(first.hash, upload_bps=8 * first.size / max(time.monotonic() - started_s, 1e-6))
        return pb.PushBlobReply(stored=True)

    def _allowed_size(self, first: pb.BlobChunk, session: PeerSession) -> int | None:
        if session.role == "validator":
            return first.size if first.size <= MAX_BLOB_BYTES else None
        size = self._payloads.expected_size(first.hash, session.peer)
        return size if size == first.size else None

    async def FetchBlobs(  # noqa: N802 - the name is the service's
        self, request: pb.FetchBlobsRequest, context: Context
    ) -> AsyncIterator[pb.BlobChunk]:
        await self._authenticate(context)
        if len(request.hashes) > MAX_HASHES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"at most {MAX_HASHES} blobs at once")
        offset, length = request.offset, request.length
        for hash_ in request.hashes:
            try:
                size = self._store.size(hash_)
            except (ManyhandsError, ValueError) as error:
                await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            first = True
            end = min(size, offset + length) if length else size
            while first or offset < end:
                most = min(CHUNK_BYTES, max(0, end - offset))
                data = await asyncio.to_thread(self._store.read_piece, hash_, offset, most)
                yield pb.BlobChunk(hash=hash_ if first else "", size=size if first else 0, data=data)
                first = False
                offset += len(data)
            offset = length = 0

    async def GetLedger(  # noqa: N802 - the name is the service's
        self, request: pb.GetLedgerRequest, context: Context
    ) -> AsyncIterator[pb.SignedDocument]:
        await self._authenticate(context)
        if request.manifests_only:
            rows = self._database.read_ledger(request.from_seq, kinds=("manifest",), from_round=request.from_round)
        else:
            rows = self._database.read_ledger(request.from_seq)
        while (row := await asyncio.to_thread(next, rows, None)) is not None:
            yield pack(row.signed)

    async def _authenticate(self, context: Context) -> PeerSession:
        metadata = dict(context.invocation_metadata() or ())
        session = self._sessions.find_by_token(str(metadata.get("session-token", "")))
        if session is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "join first: the session token is not known")
            raise AssertionError  # abort has raised; this tells the type checker
        return session

    # ---- operator

    async def Operate(  # noqa: N802 - the name is the service's
        self, request: pb.OperatorRequest, context: Context
    ) -> pb.OperatorReply:
        try:
            command = open_signed(
                unpack(request.command), OperatorCommand, signer=self._public_key, run_id=self._run.run_id
            )
            self._refuse_replay(command)
            return pb.OperatorReply(json=json.dumps(await self._operate(command)))
        except ManyhandsError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise

    def _refuse_replay(self, command: OperatorCommand) -> None:
        now = time.time()
        self._seen_nonces = {n: t for n, t in self._seen_nonces.items() if now - t < 2 * COMMAND_MAX_AGE_S}
        if abs(now - command.unix_s) > COMMAND_MAX_AGE_S or command.nonce in self._seen_nonces:
            raise VerificationError("the command is old or was seen before")
        self._seen_nonces[command.nonce] = now


def _refused(code: str, reason: str) -> pb.CoordinatorMessage:
    return pb.CoordinatorMessage(refused=pb.Refused(code=code, reason=reason))
