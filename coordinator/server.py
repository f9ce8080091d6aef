"""One running coordinator: engine, gRPC service, page, and the validator beside it, started and stopped together.

It ends when the operator stops it, when a write fails (the disk is full), or, if asked to, when the run is finished.
The run folder can be started again at any time.
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator import operations, tls
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import State
from coordinator.engine import Committed, Engine
from coordinator.ledger import LedgerWriter
from coordinator.payloads import PayloadChecker
from coordinator.records.watch import Watch, free_bytes_of
from coordinator.run_folder import RunFolder
from coordinator.run_status import RunStatus, public_address
from coordinator.service import CoordinatorService
from coordinator.sessions import Sessions
from coordinator.storage.database import Database
from coordinator.witness import Witness
from protocol.codecs import get_codec
from protocol.documents import Genesis, Invite, OperatorCommand
from protocol.errors import ConfigError, ManyhandsError
from protocol.exchange.dial import split_address
from protocol.invite import decode_invite, encode_invite
from protocol.run_spec import AUTO, RunSpec
from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb
from protocol.wire.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server

log = structlog.get_logger()
MAX_MESSAGE_BYTES = 4 << 20
VALIDATOR_RESTART_S = (1.0, 30.0)
_GRPC_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 10_000),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not two coordinators taking turns
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


# What of an operator's command each verb looks at.
_OPTIONS: dict[str, set[str]] = {
    "invite": {"uses", "expires_hours"},
    "revoke": {"invite"},
    "ban": {"peer", "reason"},
    "unban": {"peer"},
    "approve": {"peer"},
    "round-time": {"seconds"},
}


@dataclass
class Server:
    """A coordinator of one run folder. `validator_command(invite)`: how to start the validator, or None for none."""

    folder: RunFolder
    database: Database
    genesis: Signed
    validator_command: Callable[[str], Sequence[str]] | None = None
    exit_when_finished: bool = False
    keep_writing: Callable[[], Awaitable[None]] | None = None  # coordinator.records.writers
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.run = Genesis.model_validate_json(self.genesis.body)
        self.identity = self.folder.identity()
        self.key_pem, self.certificate_pem = self.folder.tls()
        self.fingerprint = tls.fingerprint(self.certificate_pem)
        self.spec = self.folder.spec()  # addresses may have changed since the genesis; what is trained may not
        self.store = self.folder.store
        self.operator_token = self.folder.operator_token()
        self.invite = ""  # the one that is announced; empty before the start, and once it is revoked
        ledger = LedgerWriter(self.identity, self.run.run_id, self.run.spec, self.database.last_ledger_entry())
        fresh = machine.create(
            self.run.spec,
            num_shards=self.run.num_shards,
            num_parameters=self.run.num_parameters,
            initial_digest=self.run.initial_digest,
        )
        self.engine = Engine.recover(self.database, ledger, fresh)
        if self.run.spec.exchange.codec != AUTO:
            get_codec(
                self.run.spec.exchange.codec, self.run.spec.exchange.codec_options
            )  # raises what is wrong with it
        self.payloads = PayloadChecker(self.store, self.run.num_parameters, self.engine.submit)
        self.sessions = Sessions(self.engine, self.identity, self.genesis, self.payloads)
        self.witness = Witness(self.sessions)
        self._status = RunStatus(
            run=self.run,
            spec=self.spec,
            folder=self.folder.path,
            engine=self.engine,
            database=self.database,
            sessions=self.sessions,
            witness=self.witness,
            validator_expected=self.validator_command is not None,
        )

    @property
    def state(self) -> State:
        return self.engine.state

    @property
    def address(self) -> str:
        """host:port as invites give it."""
        return public_address(self.spec)

    def issue_invite(self, role: str = "worker", uses: int | None = None, expires_hours: float | None = None) -> str:
        """A new invite as one string; its token is in the journal before anybody can use it up."""
        uses = uses or self.spec.invite.uses
        hours = expires_hours or self.spec.invite.expires_hours
        now_unix_s = time.time()
        invite = Invite(
            run_id=self.run.run_id,
            address=self.address,
            tls_fingerprint=self.fingerprint,
            token_id=os.urandom(8).hex(),
            role="validator" if role == "validator" else "worker",
            expires_unix_s=int(now_unix_s + hours * 3600),
            uses=uses,
        )
        self.engine.submit(
            ev.InviteIssued(
                token_id=invite.token_id,
                uses=uses,
                role=invite.role,
                issued_unix_s=now_unix_s,
                expires_unix_s=invite.expires_unix_s,
            )
        )
        return encode_invite(invite, self.identity)

    def status(self) -> dict[str, object]:
        """What `coordinator status` and the page show (run_status)."""
        return self._status.read()

    async def operate(self, command: OperatorCommand) -> dict[str, object]:
        """Carry out an operator's signed command, and answer once it holds. Raises ManyhandsError as `perform` does."""
        options = command.model_dump(include=_OPTIONS.get(command.verb, set()))
        if command.verb not in operations.PLANS:
            return self.perform(command.verb, **options)
        holds = asyncio.Event()
        message = self._change(command.verb, options, lambda _: holds.set())
        await holds.wait()
        return {"message": message}

    def perform(self, verb: str, **options: Any) -> dict[str, object]:
        """Do what the operator asks; whoever calls has made sure that it is the operator.

        status, stop, pause, resume, invites; invite(uses=0, expires_hours=0.0), where 0 means as run.toml says;
        revoke(invite=); ban(peer=, reason=""), unban(peer=), approve(peer=); round-time(seconds=), 0: as run.toml says.
        The answer has a `message`, but for status, `invites` (a list) and `invite` (the invite as text). Raises
        ManyhandsError with one sentence.
        """
        match verb:
            case "status":
                return self.status()
            case "stop":
                self.stop.set()
                return {"message": "stopping; `manyhands coordinator start` on the run folder goes on from here"}
            case "invite":
                uses, hours = options.get("uses") or None, options.get("expires_hours") or None
                return {"invite": self.issue_invite(uses=uses, expires_hours=hours)}
            case "invites":
                return {"invites": operations.list_invites(self.state, time.time())}
        return {"message": self._change(verb, options)}

    def _change(
        self, verb: str, options: dict[str, Any], on_committed: Callable[[Committed], None] | None = None
    ) -> str:
        """Submit the event of a verb that changes the run; the sentence for the operator."""
        plan = operations.PLANS.get(verb)
        if plan is None:
            raise ManyhandsError(f"unknown command {verb!r}")
        event, message = plan(self.state, **options)
        if isinstance(event, ev.InviteRevoked) and self.invite and event.token_id == _token_id(self.invite):
            self.invite = ""
        self.engine.submit(event, on_committed=on_committed)
        log.info("operator", verb=verb, message=message)
        return message

    async def serve(
        self, on_ready: Callable[[str], None], *, page: Callable[["Server"], "asyncio.Task[None]"] | None = None
    ) -> None:
        """Run until `stop` is set. `on_ready(invite)` is called once peers can join.

        Raises ConfigError when a port is taken, DiskFullError when a write fails.
        """
        grpc_server = await self._listen()
        page_task = page(self) if page is not None else None
        await grpc_server.start()
        self.engine.submit(ev.CoordinatorRestarted())
        self._expect_payloads_again()
        self.invite = self.issue_invite()
        tasks = [asyncio.create_task(self.engine.run(self.witness), name="engine")]
        tasks.append(asyncio.create_task(self.witness.keep_looking(), name="witness"))
        watch = Watch(self.engine, self.witness, free_bytes_of(self.folder.path))
        tasks.append(asyncio.create_task(watch.keep_watching(), name="watch"))
        if self.keep_writing is not None:
            tasks.append(asyncio.ensure_future(self.keep_writing()))
        if page_task is not None:
            tasks.append(page_task)
        if self.validator_command is not None:
            command = self.validator_command(self.issue_invite("validator", uses=1))
            tasks.append(asyncio.create_task(self._keep_validator(command), name="validator"))
        self._write_running()
        if self.exit_when_finished:
            tasks.append(asyncio.create_task(self._wait_until_finished(), name="finish"))
        stopping = asyncio.create_task(self.stop.wait(), name="stop")
        try:
            on_ready(self.invite)
            done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # raises what ended it
        finally:
            for task in [*tasks[1:], stopping]:  # the validator ends while it can still say goodbye
                task.cancel()
            await asyncio.gather(*tasks[1:], stopping, return_exceptions=True)
            self.sessions.close_all()
            await grpc_server.stop(grace=1.0)
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            self.folder.running_path.unlink(missing_ok=True)
            self.database.close()

    async def _listen(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=_GRPC_OPTIONS, maximum_concurrent_rpcs=10_000)
        add_CoordinatorServiceServicer_to_server(
            CoordinatorService(
                genesis=self.genesis,
                public_key=self.identity.public_key,
                engine=self.engine,
                sessions=self.sessions,
                payloads=self.payloads,
                store=self.store,
                database=self.database,
                operate=self.operate,
                approval=self.spec.invite.approval,
            ),
            server,
        )
        name = pb.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
        servicer = health.aio.HealthServicer()  # type: ignore[attr-defined] # there since 1.32; the stubs lack it
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        credentials = grpc.ssl_server_credentials([(self.key_pem, self.certificate_pem)])
        listen = self.spec.coordinator.listen
        try:
            server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {listen}; change coordinator.listen in run.toml") from error
        return server

    def _expect_payloads_again(self) -> None:
        """Contributions that were committed before a restart still wait for their payloads."""
        for effect in machine.pending_checks(self.state):
            self.payloads.expect(effect)

    async def _keep_validator(self, command: Sequence[str]) -> None:
        """Start the validator again, with growing pauses, whenever it ends."""
        shortest_s, longest_s = VALIDATOR_RESTART_S
        pause_s = shortest_s
        while True:
            started = time.monotonic()
            process = await asyncio.create_subprocess_exec(*command)
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                await _end(process)
                raise
            log.warning("the validator ended; starting it again", exit_code=code, pause_s=pause_s)
            pause_s = shortest_s if time.monotonic() - started > 60 else min(2 * pause_s, longest_s)
            await asyncio.sleep(pause_s)

    async def _wait_until_finished(self) -> None:
        """Return when all tokens are trained and, with a validator, the last state is evaluated."""
        while True:
            await asyncio.sleep(0.5)
            if self.engine.is_finished():
                last = self.database.read_rounds(last=1)
                if self.validator_command is None or (last and last[0].held_out_loss is not None):
                    return

    def _write_running(self) -> None:
        running = {
            "pid": os.getpid(),
            "listen": self.spec.coordinator.listen,
            "http": self.spec.coordinator.http,
            "run_id": self.run.run_id,
        }
        temporary = Path(f"{self.folder.running_path}.tmp")
        temporary.write_text(json.dumps(running))
        temporary.replace(self.folder.running_path)


def _token_id(invite: str) -> str:
    return decode_invite(invite)[0].token_id


def check_addresses(spec: RunSpec) -> None:
    """Raise ConfigError when a port is taken: better told before the text is cut than after."""
    for key, address in (("listen", spec.coordinator.listen), ("http", spec.coordinator.http)):
        host, port = split_address(address)
        try:
            with socket.create_server((host, port)):
                pass
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror or error}; change coordinator.{key} in run.toml"
            ) from error


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and SIGKILL for a process that does not end within seconds."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(10.0):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
