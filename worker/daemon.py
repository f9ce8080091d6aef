"""The worker: joins a run, computes what it is leased, merges what the run decides, until it is told to stop.

One task reads the coordinator's messages in order; a lease is worked on in a task beside it. When the connection
breaks the worker joins again with growing pauses and goes on with the lease that it holds. SIGTERM and Ctrl-C drain:
the lease is handed back and the session closed.
"""

import asyncio
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

import structlog

from protocol.documents import Contribution, Genesis, Invite, Lease, Manifest, Receipt
from protocol.envelope import pack, unpack
from protocol.errors import ConnectionFailedError, ManyhandsError, VerificationError
from protocol.exchange.fetch import Source
from protocol.exchange.peer import PeerNode, PeerSource
from protocol.invite import decode_invite
from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb
from worker.contributor import Contributor
from worker.device import choose_device, describe_device
from worker.follower import Follower
from worker.home import RunHome
from worker.link import CoordinatorLink, Introduction
from worker.trainer import StepReport, Trainer

log = structlog.get_logger()
MAX_STORE_BYTES = 4 << 30
MAX_CONFIG_BYTES = 1 << 20
BENCHMARK_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What the volunteer chose."""

    name: str
    device: str = "auto"
    throttle: float = 1.0  # share of the time that is computed
    public: bool = True  # listen on all interfaces, or on loopback alone
    retry_for_s: float = 24 * 3600.0  # how long a coordinator that went away is tried again


@dataclass(slots=True, kw_only=True)
class WorkerStatus:
    """What the worker is doing, for the terminal, status.json and heartbeats."""

    name: str
    peer: str
    activity: str = "joining"
    run: str = ""
    round: int = -1
    inner_step: int = 0
    loss: float = 0.0
    steps_per_s: float = 0.0
    tokens_per_s: float = 0.0
    credited_tokens: int = 0
    accepted: int = 0
    late_or_refused: int = 0
    bytes_sent: int = 0  # payloads: pushed to the coordinator and served to other workers
    bytes_received: int = 0  # payloads from other workers
    steps_trained: int = 0
    digest: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Worker:
    """One worker of one run."""

    invite_text: str
    home: RunHome
    options: WorkerOptions
    on_status: Callable[[WorkerStatus], None] = lambda _: None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.identity = self.home.identity()
        self.store = self.home.store
        self.status = WorkerStatus(name=self.options.name, peer=self.identity.peer_id)
        self._invite: Invite
        self._invite, self._coordinator_key = decode_invite(self.invite_text)
        self._contributor: Contributor | None = None
        self._lease: Lease | None = None
        self._work: asyncio.Task[None] | None = None
        self._stop_work = False
        self._sending = False
        self._finished = False
        self._bytes_pushed = 0
        self._kept_state = ""
        self._reveal: asyncio.Future[bool] | None = None  # whether the header that was just sent is committed
        self._link: CoordinatorLink
        self._linked = asyncio.Event()
        self._claimed_steps_per_s = 0.0

    async def run(self) -> None:
        """Work until `stopping` is set or the run is finished. Raises ManyhandsError when it cannot go on."""
        async with await PeerNode.start(self.store, self.home.identity_path, public=self.options.public) as self._node:
            self._follower = Follower(self.store, self._make_source)
            stop = asyncio.create_task(self.stopping.wait())
            died = asyncio.create_task(self._node.died.wait())
            run = asyncio.create_task(self._keep_joined())
            try:
                await asyncio.wait([stop, died, run], return_when=asyncio.FIRST_COMPLETED)
                if run.done():
                    run.result()
                elif died.done():
                    raise ManyhandsError("this worker's libp2p daemon ended; start the worker again")
            finally:
                for task in (stop, died, run):
                    task.cancel()
                await asyncio.gather(stop, died, run, return_exceptions=True)
                await self._end_work()
                self._show("stopped")

    def _make_source(self, peer: str, addresses: Sequence[str]) -> Source | None:
        return PeerSource(self._node, peer, tuple(addresses)) if peer != self.identity.peer_id else None

    async def _keep_joined(self) -> None:
        """Join, and join again whenever the connection breaks, until the run is finished.

        The first connection must succeed: whoever has just typed an invite is told at once what is wrong with it.
        """
        pause_s, last_seen = FIRST_PAUSE_S, None
        while not self._finished:
            try:
                async with CoordinatorLink(
                    self.invite_text, self._invite, self._coordinator_key, self.identity
                ) as link:
                    await link.join(self._introduce())
                    log.info("joined", run=link.genesis.spec.name, run_id=link.genesis.run_id)
                    pause_s, last_seen = FIRST_PAUSE_S, time.monotonic()
                    await self._converse(link)
                    last_seen = time.monotonic()
            except ConnectionFailedError as error:
                if last_seen is None or time.monotonic() - last_seen > self.options.retry_for_s:
                    raise
                log.warning("not connected; trying again", error=str(error), pause_s=round(pause_s, 1))
                self._show(f"reconnecting: {error}")
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the workers' calls
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _introduce(self) -> Introduction:
        return Introduction(
            name=self.options.name,
            device=describe_device(choose_device(self.options.device)),
            software=f"manyhands {version('manyhands')} {platform.system()}"[:64],
            addresses=self._node.addresses,
            lease_id=self._lease.lease_id if self._lease else None,
        )

    async def _converse(self, link: CoordinatorLink) -> None:
        """One joined session, from the state to its end."""
        self.status.run = link.genesis.spec.name
        heartbeat = asyncio.create_task(self._send_heartbeats(link))
        try:
            if self._contributor is None:
                self._show("preparing")
                self._contributor = await self._prepare(link)
            self._show("fetching the state")
            await self._follower.catch_up(link)
            self._report_state(link)
            self._link = link
            self._linked.set()
            async for message in link.messages():
                await self._take(message, link)
                if self._finished:
                    break
        except asyncio.CancelledError:
            self._hand_back(link)
            await link.drain()
            raise
        finally:
            self._linked.clear()
            if self._reveal is not None and not self._reveal.done():
                self._reveal.set_exception(ConnectionFailedError("the connection broke before the header was taken"))
            heartbeat.cancel()
        await link.drain()

    async def _prepare(self, link: CoordinatorLink) -> Contributor:
        genesis = link.genesis
        await link.fetch_small_blobs([genesis.shard_index_hash], self.store, 80 * genesis.num_shards + 64)
        await link.fetch_small_blobs([genesis.model_config_hash], self.store, MAX_CONFIG_BYTES)
        hashes: list[str] = json.loads(self.store.read(genesis.shard_index_hash))
        trainer = await asyncio.to_thread(self._build_trainer, genesis)
        self._claimed_steps_per_s = await asyncio.to_thread(trainer.benchmark, BENCHMARK_S) * self.options.throttle
        return Contributor(
            genesis=genesis,
            identity=self.identity,
            store=self.store,
            trainer=trainer,
            shard_hashes=hashes,
            throttle=self.options.throttle,
        )

    def _build_trainer(self, genesis: Genesis) -> Trainer:
        trainer = Trainer(
            genesis.spec,
            genesis.vocabulary_size,
            choose_device(self.options.device),
            model_config=self.store.read(genesis.model_config_hash),
        )
        if trainer.num_parameters != genesis.num_parameters:
            raise VerificationError(
                f"the run's model has {genesis.num_parameters} parameters, the one that its config gives here "
                f"{trainer.num_parameters}"
            )
        trainer.tune()
        return trainer

    # ---- messages

    async def _take(self, message: pb.CoordinatorMessage, link: CoordinatorLink) -> None:
        match message.WhichOneof("message"):
            case "lease":
                self._begin_lease(link.open(unpack(message.lease), Lease), link)
            case "manifest":
                await self._merge(message.manifest, link)
            case "receipt":
                receipt = link.open(unpack(message.receipt), Receipt)
                self.status.credited_tokens += receipt.tokens
                self.status.accepted += 1
            case "wanted":
                self._decide_reveal(True)
            case "verdict":
                if not message.verdict.accepted:
                    self._decide_reveal(False)
                    self.status.late_or_refused += 1
                    log.warning("contribution refused", reason=message.verdict.reason)
            case "resync":
                log.warning("fetching the state again", reason=message.resync.reason)
                await self._end_work()
                self._follower.forget()
                await self._follower.catch_up(link)
                self._report_state(link)
            case "phase":
                self._take_phase(message.phase)

    def _decide_reveal(self, wanted: bool) -> None:
        if self._reveal is not None and not self._reveal.done():
            self._reveal.set_result(wanted)

    def _take_phase(self, notice: pb.PhaseNotice) -> None:
        if notice.phase == "finished":
            self._show("the run is finished")
        elif self._work is None or self._work.done():
            self._show(f"waiting: {notice.phase} ({notice.reason})")

    def _begin_lease(self, lease: Lease, link: CoordinatorLink) -> None:
        state = self._follower.state
        if self._contributor is None or state is None or lease.base_digest != state.digest:
            link.send(lease_return=pb.LeaseReturn(lease_id=lease.lease_id, reason="another state is held here"))
            return
        self._lease, self._stop_work = lease, False
        self._work = asyncio.create_task(self._fulfil(lease, link))

    async def _fulfil(self, lease: Lease, link: CoordinatorLink) -> None:
        """Work on a lease and send what came of it; a failure hands the lease back and is told, not raised."""
        state = self._follower.state
        if self._contributor is None or state is None:
            return
        try:
            self._show("training")
            done = await self._contributor.work(
                lease, state, link, should_stop=lambda: self._stop_work, on_step=self._note_step
            )
            if self._stop_work:
                return
            if done is None:
                link.send(lease_return=pb.LeaseReturn(lease_id=lease.lease_id, reason="no shard was finished in time"))
                return
            header, signed = done
            self._show("sending")
            self._sending = True
            await self._deliver(header, signed)
            self._show("waiting for the merge")
        except ManyhandsError as error:
            log.warning("the lease was not fulfilled", lease=lease.lease_id, error=str(error))
            link.send(lease_return=pb.LeaseReturn(lease_id=lease.lease_id, reason=str(error)[:200]))
        finally:
            self._sending = False
            self.status.steps_per_s = self._contributor.steps_per_s
            self.status.tokens_per_s = self._contributor.steps_per_s * self._contributor.step_tokens
            self.status.steps_trained = self._contributor.steps_trained

    async def _deliver(self, header: Contribution, signed: Signed) -> None:
        """Commit the header, then reveal the payload; over a new connection when the one in use breaks."""
        while True:
            await self._linked.wait()
            link = self._link
            self._reveal = asyncio.get_running_loop().create_future()
            try:
                link.send(contribution=pack(signed))
                if await self._reveal:
                    await link.push_blob(header.payload_hash, self.store)
                    self._bytes_pushed += header.payload_bytes
                return
            except ConnectionFailedError:
                self._linked.clear()  # set again when the worker has joined again

    async def _merge(self, notice: pb.ManifestNotice, link: CoordinatorLink) -> None:
        manifest = link.open(unpack(notice.manifest), Manifest)
        if self._lease is not None and manifest.round == self._lease.round:
            await self._end_work()
        if self._contributor is not None:
            self._contributor.settle(manifest)
        self._show("merging")
        await self._follower.apply_notice(notice, manifest, link)
        self._report_state(link)
        await asyncio.to_thread(self._tidy_store, link.genesis.spec.checkpoint.every_rounds)
        if manifest.tokens_after >= link.genesis.spec.train.tokens:
            self._send_heartbeat(link)
            self._finished = True

    def _tidy_store(self, checkpoint_every_rounds: int) -> None:
        """Keep the state of each checkpoint round, for joiners that ask this peer, and drop what is old."""
        state = self._follower.state
        if state is None or state.round % checkpoint_every_rounds:
            return
        if self._kept_state and self._kept_state != state.digest:
            self.store.remove(self._kept_state)
        self._kept_state = self.store.put(state.to_bytes())
        self.store.prune({self._kept_state}, MAX_STORE_BYTES)

    async def _end_work(self) -> None:
        """Stop the lease that is worked on, after its current inner step; what was computed stays for the next."""
        self._stop_work = True
        work, self._work, self._lease = self._work, None, None
        if work is not None:
            if self._sending:  # what is sent after the round's close is lost time
                work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    # ---- what is told

    def _report_state(self, link: CoordinatorLink) -> None:
        state = self._follower.state
        if state is not None:
            self.status.round, self.status.digest = state.round, state.digest
            link.send(
                state=pb.StateReport(
                    round=state.round, digest=state.digest, claimed_steps_per_s=self._claimed_steps_per_s
                )
            )
            self._show("ready")

    def _note_step(self, step: StepReport) -> None:
        """Called in the training thread; plain assignments only."""
        self.status.inner_step, self.status.loss = step.inner_step, step.loss

    async def _send_heartbeats(self, link: CoordinatorLink) -> None:
        while True:
            self._send_heartbeat(link)
            self._show(self.status.activity)
            await asyncio.sleep(link.welcome.heartbeat_every_s)

    def _send_heartbeat(self, link: CoordinatorLink) -> None:
        status = self.status
        status.bytes_sent = self._bytes_pushed + self._node.bytes_sent
        status.bytes_received = self._node.bytes_received
        link.send(
            heartbeat=pb.Heartbeat(
                activity=status.activity[:200],
                steps_per_s=status.steps_per_s,
                tokens_per_s=status.tokens_per_s,
                inner_step=status.inner_step,
                loss=status.loss,
                bytes_sent=status.bytes_sent,
                bytes_received=status.bytes_received,
            )
        )

    def _hand_back(self, link: CoordinatorLink) -> None:
        if self._lease is not None:
            link.send(lease_return=pb.LeaseReturn(lease_id=self._lease.lease_id, reason="the worker stops"))
        link.send(leaving=pb.Leaving(reason="stopped by its owner"))

    def _show(self, activity: str) -> None:
        self.status.activity = activity
        self.on_status(self.status)
