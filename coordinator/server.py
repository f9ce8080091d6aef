"""One running coordinator: engine, gRPC service, page, and the validator beside it, started and stopped together.

It ends when the operator stops it, when a write fails (the disk is full), or, if asked to, when the run is finished.
The run folder can be started again at any time.
"""

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator import tls
from coordinator.core import events as ev
from coordinator.core import machine, peers
from coordinator.core.state import PeerStatus, State
from coordinator.engine import Engine
from coordinator.ledger import LedgerWriter
from coordinator.payloads import PayloadChecker
from coordinator.run_folder import RunFolder
from coordinator.service import CoordinatorService
from coordinator.sessions import Sessions
from coordinator.storage.database import Database, RoundRow
from coordinator.verdict import judge
from coordinator.witness import Witness
from protocol.codecs import get_codec
from protocol.documents import Evaluation, EvaluationReport, Genesis, Invite, OperatorCommand
from protocol.errors import ConfigError
from protocol.exchange.dial import split_address
from protocol.invite import encode_invite
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


@dataclass
class Server:
    """A coordinator of one run folder. `validator_command(invite)`: how to start the validator, or None for none."""

    folder: RunFolder
    database: Database
    genesis: Signed
    validator_command: Callable[[str], Sequence[str]] | None = None
    exit_when_finished: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.run = Genesis.model_validate_json(self.genesis.body)
        self.identity = self.folder.identity()
        self.key_pem, self.certificate_pem = self.folder.tls()
        self.fingerprint = tls.fingerprint(self.certificate_pem)
        self.spec = self.folder.spec()  # addresses may have changed since the genesis; what is trained may not
        self.store = self.folder.store
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
        self.sessions = Sessions(self.engine, self.identity, self.run.run_id, self.payloads)
        self.witness = Witness(self.sessions)
        self._first_loss: float | None = None
        self._restarted, self._workers_before = bool(self.state.peers), self._count_workers_before()

    @property
    def state(self) -> State:
        return self.engine.state

    @property
    def address(self) -> str:
        """host:port as invites give it."""
        return self.spec.coordinator.advertise or self.spec.coordinator.listen

    def issue_invite(self, role: str = "worker", uses: int | None = None, expires_hours: float | None = None) -> str:
        """A new invite as one string; its token is in the journal before anybody can use it up."""
        uses = uses or self.spec.invite.uses
        hours = expires_hours or self.spec.invite.expires_hours
        invite = Invite(
            run_id=self.run.run_id,
            address=self.address,
            tls_fingerprint=self.fingerprint,
            token_id=os.urandom(8).hex(),
            role="validator" if role == "validator" else "worker",
            expires_unix_s=int(time.time() + hours * 3600),
            uses=uses,
        )
        self.engine.submit(ev.InviteIssued(token_id=invite.token_id, uses=uses))
        return encode_invite(invite, self.identity)

    def status(self) -> dict[str, object]:
        """What `coordinator status` and the page show."""
        state = self.state
        rounds = self.database.read_rounds(last=20)
        held_out = next((row.held_out_loss for row in reversed(rounds) if row.held_out_loss is not None), None)
        last_evaluated = rounds[-1].held_out_loss if rounds and self.engine.is_finished() else None
        sessions = {session.peer: session for session in self.sessions.connected()}
        self.witness.look()
        facts: dict[str, object] = {
            "name": self.run.spec.name,
            "run_id": self.run.run_id,
            "phase": state.phase.value,
            "reason": machine.describe_phase(state),
            "plan": state.plan.reason if state.plan else "",
            "round": state.rounds_merged,
            "tokens": state.tokens_credited,
            "tokens_target": state.spec.train.tokens,
            "num_parameters": self.run.num_parameters,
            "train_loss": rounds[-1].mean_loss if rounds else None,
            "held_out_loss": held_out,
            "first_held_out_loss": self._first_held_out_loss(),
            "final_held_out_loss": last_evaluated,
            "round_seconds": rounds[-1].seconds if rounds else None,
            "ledger_head": self.engine.ledger_head,
            "reference_digest": peers.reference_digest(state),
            "digests": dict(state.reports),
            "peers": [
                {
                    "peer": peer_id,
                    "name": peer.name,
                    "role": peer.role,
                    "device": peer.device,
                    "status": peer.status.value,
                    "pause_reason": peer.pause_reason,
                    "steps_per_s": round(peer.steps_per_s, 3),
                    "upload_bps": round(peer.upload_bps),
                    "download_bps": round(peer.download_bps),
                    "credited_tokens": peer.credited_tokens,
                    "accepted": peer.accepted,
                    "refused": peer.refused,
                    "lease": state.round.leases[peer_id].status.value
                    if state.round and peer_id in state.round.leases
                    else "",
                    **self.witness.describe_peer(peer_id, sessions.get(peer_id)),
                }
                for peer_id, peer in state.peers.items()
            ],
            "workers": sum(p.role == "worker" and p.status is not PeerStatus.GONE for p in state.peers.values()),
            "page": f"http://{self.spec.coordinator.http}",
            "address": self.address,
            **self._describe_pace(rounds),
            **self._describe_coordinator(),
        }
        return facts | {"verdict": asdict(judge(facts, time.time()))}

    def _describe_pace(self, rounds: Sequence[RoundRow]) -> dict[str, object]:
        """The open round's clock and the run's, from its last rounds (oldest first). Times are Unix seconds."""
        state, to_unix_s = self.state, time.time() - self.engine.now_s()
        round_ = state.round
        seconds = median(row.seconds for row in rounds[-5:]) if rounds else round_.expected_s if round_ else 0.0
        span_s = rounds[-1].unix_s - rounds[0].unix_s if rounds else 0.0
        speed = (rounds[-1].tokens_after - rounds[0].tokens_after) / span_s if span_s > 0.0 else None
        left = max(0, state.spec.train.tokens - state.tokens_credited)
        return {
            "last_merge_unix_s": rounds[-1].unix_s if rounds else None,
            "round_opened_unix_s": round_.opened_s + to_unix_s if round_ else None,
            "round_expected_unix_s": round_.opened_s + to_unix_s + seconds if round_ else None,
            "round_deadline_unix_s": round_.deadline_s + to_unix_s if round_ else None,
            "tokens_per_s": speed,
            "eta_s": left / speed if speed else None,
        }

    def _describe_coordinator(self) -> dict[str, object]:
        commits = self.engine.commit_seconds
        return {
            "started_unix_s": self.engine.started_unix_s,
            "restarted": self._restarted,
            "workers_before_restart": self._workers_before,
            "min_peers": self.state.spec.round.min_peers,
            "heartbeat_timeout_s": self.state.spec.round.heartbeat_timeout_s,
            "disk_free_bytes": shutil.disk_usage(self.folder.path).free,
            "validator_expected": self.validator_command is not None,
            "commit_p99_s": quantiles(commits, n=100)[-1] if len(commits) > 1 else None,
            "troubles": self.witness.describe_troubles({peer_id: p.name for peer_id, p in self.state.peers.items()}),
        }

    def _count_workers_before(self) -> int:
        """Workers that a restart cut off: those that were there, or, after an orderly stop, those of the last round."""
        there = sum(p.role == "worker" and p.status is not PeerStatus.GONE for p in self.state.peers.values())
        last = self.database.read_rounds(last=1)
        return max(there, last[0].contributions if last else 0)

    def _first_held_out_loss(self) -> float | None:
        if self._first_loss is None:
            entry = next(self.database.read_ledger(kinds=("evaluation",)), None)
            if entry is not None:
                report = Signed.from_json(Evaluation.model_validate_json(entry.body).report)
                self._first_loss = EvaluationReport.model_validate_json(report.body).held_out_loss
        return self._first_loss

    def operate(self, command: OperatorCommand) -> dict[str, object]:
        """Carry out an operator's command; the answer is for the command line."""
        match command.verb:
            case "status":
                return self.status()
            case "stop":
                self.stop.set()
                return {"message": "stopping; `manyhands coordinator start` on the run folder goes on from here"}
            case "pause" | "resume":
                self.engine.submit(ev.PauseRequested(paused=command.verb == "pause"))
                return {"message": f"{command.verb} noted"}
            case "invite":
                uses, hours = command.uses or None, command.expires_hours or None
                return {"invite": self.issue_invite(uses=uses, expires_hours=hours)}

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
