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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import structlog

from protocol.documents import Invite, Lease, Manifest, MergeOrder, Receipt
from protocol.envelope import unpack
from protocol.errors import ConnectionFailedError, ManyhandsError, UnavailableError, VerificationError
from protocol.exchange.peer import PeerNode, PeerSource
from protocol.exchange.source import Source
from protocol.invite import decode_invite
from protocol.wire import coordinator_pb2 as pb
from worker.allowance import Allowance
from worker.contributor import Contributor
from worker.device import choose_device, describe_device, give_memory_back
from worker.follower import Follower
from worker.governor.ladder import Decision
from worker.governor.sensors import Sensors
from worker.governor.traffic import TrafficMeter
from worker.group_merger import GroupMerger
from worker.home import RunHome
from worker.kept_state import KeptState
from worker.lease_work import LeaseWork
from worker.link import CoordinatorLink, Introduction
from worker.preparation import Speed, prepare_trainer
from worker.saved_lease import SavedLease
from worker.saved_work import SavedWork
from worker.status import WorkerStatus
from worker.trainer import StepReport

log = structlog.get_logger()
MAX_CONFIG_BYTES = 1 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What the volunteer chose."""

    name: str
    device: str = "auto"
    throttle: float = 1.0  # share of the time that is computed
    threads: int | None = None  # of the CPU; None: as the settings say
    preferences_path: Path | None = None  # the volunteer's settings; None: compute always, whatever the machine does
    public: bool = True  # listen on all interfaces, or on loopback alone
    seed: bool = False  # serve everybody's payloads
    checkpoint_steps: int = 0  # inner steps after which a lease in hand is saved; 0: at its end
    retry_for_s: float = 24 * 3600.0  # how long a coordinator that went away is tried again


@dataclass
class Worker:
    """One worker of one run."""

    invite_text: str
    home: RunHome
    options: WorkerOptions
    on_status: Callable[[WorkerStatus], None] = lambda _: None
    make_sensors: Callable[[TrafficMeter], Sensors] | None = None  # None: this machine's
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.identity = self.home.identity()
        self.store = self.home.store
        self.status = WorkerStatus(name=self.options.name, peer=self.identity.peer_id)
        credit = self.home.receipts.credit()
        self.status.credited_tokens, self.status.accepted = credit.tokens, credit.accepted
        self._invite: Invite
        self._invite, self._coordinator_key = decode_invite(self.invite_text)
        self._work: LeaseWork | None = None  # from the first join on
        self._saved_lease = SavedLease(self.home.folder, self.options.checkpoint_steps)
        self._finished = False
        self._kept = KeptState(self.store)
        self._link: CoordinatorLink | None = None  # while joined
        self._allowance = Allowance(
            self.home,
            preferences_path=self.options.preferences_path,
            throttle=self.options.throttle,
            threads=self.options.threads,
            make_sensors=self.make_sensors,
            on_decision=self._take_decision,
        )
        self._claimed = Speed(0.0, 0.0)

    async def run(self) -> None:
        """Work until `stopping` is set or the run is finished. Raises ManyhandsError when it cannot go on."""
        async with await PeerNode.start(self.store, self.home.identity_path, public=self.options.public) as self._node:
            self._allowance.uploads = self._node.uploads
            await self._allowance.begin()
            self._follower = Follower(self.store, self._make_source, self._settle, self._allowance.downloads)
            self._groups = GroupMerger(self._node, self._follower, self.store)
            stop = asyncio.create_task(self.stopping.wait())
            died = asyncio.create_task(self._node.died.wait())
            run = asyncio.create_task(self._keep_joined())
            govern = asyncio.create_task(self._allowance.run())
            try:
                await asyncio.wait([stop, died, run, govern], return_when=asyncio.FIRST_COMPLETED)
                if govern.done():
                    govern.result()
                if run.done():
                    run.result()
                elif died.done():
                    raise ManyhandsError("this worker's libp2p daemon ended; start the worker again")
            finally:
                for task in (stop, died, run, govern):
                    task.cancel()
                await asyncio.gather(stop, died, run, govern, return_exceptions=True)
                await self._groups.end()
                if self._work is not None:
                    await self._work.end()
                    await self._work.contributor.save(self._follower.round, at_end=True)
                self._count_traffic()
                self._allowance.save_traffic()
                self._show("stopped")

    def _make_source(self, peer: str, addresses: Sequence[str]) -> Source | None:
        return PeerSource(self._node, peer, tuple(addresses)) if peer != self.identity.peer_id else None

    async def _keep_joined(self) -> None:
        """Join, and join again whenever the connection breaks, until the run is finished.

        The first connection must succeed: whoever has just typed an invite is told at once what is wrong with it.
        """
        pause_s, last_seen = FIRST_PAUSE_S, None

        def wait_for_approval(reason: str) -> None:
            nonlocal last_seen
            last_seen = time.monotonic()
            if self.status.activity != reason:
                log.info(reason)
            self._show(reason)

        while not self._finished:
            await self._allowance.online.wait()
            try:
                async with CoordinatorLink(
                    self.invite_text, self._invite, self._coordinator_key, self.identity, self._node.uploads
                ) as link:
                    await link.join(self._introduce(), wait_for_approval)
                    log.info("joined", run=link.genesis.spec.name, run_id=link.genesis.run_id)
                    pause_s, last_seen = FIRST_PAUSE_S, time.monotonic()
                    await self._converse_while_online(link)
                    last_seen = time.monotonic()
            except ConnectionFailedError as error:
                if last_seen is None or time.monotonic() - last_seen > self.options.retry_for_s:
                    raise
                log.warning("not connected; trying again", error=str(error), pause_s=round(pause_s, 1))
                self._show(f"reconnecting: {error}")
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the workers' calls
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _introduce(self) -> Introduction:
        held = self._saved_lease.load() if self._work is None else None
        lease = held.lease if held else self._work.lease if self._work else None
        return Introduction(
            name=self.options.name,
            device=describe_device(choose_device(self.options.device)),
            software=f"manyhands {version('manyhands')} {platform.system()}"[:64],
            addresses=self._node.addresses,
            lease_id=lease.lease_id if lease else None,
            seed=self.options.seed,
        )

    async def _converse_while_online(self, link: CoordinatorLink) -> None:
        """One joined session, which a pause that needs the network spared ends as the owner's stop does."""
        conversation = asyncio.create_task(self._converse(link))
        offline = asyncio.create_task(self._allowance.offline.wait())
        try:
            await asyncio.wait([conversation, offline], return_when=asyncio.FIRST_COMPLETED)
            if conversation.done():
                conversation.result()
        finally:
            offline.cancel()
            conversation.cancel()
            await asyncio.gather(conversation, return_exceptions=True)

    async def _converse(self, link: CoordinatorLink) -> None:
        """One joined session, from the state to its end."""
        self.status.run = link.genesis.spec.name
        self._link = link
        if self.status.pause_reason:
            link.send_availability(self.status.pause_reason)
        heartbeat = asyncio.create_task(self._send_heartbeats(link))
        try:
            if self._work is None:
                self._show("preparing")
                self._work = await self._prepare(link)
            await self._work.close_round(int(link.welcome.round) - 1)  # if that was while this worker was cut off
            await self._catch_up(link)
            self._work.attach(link)
            await self._work.go_on(self._follower.state)
            async for message in link.messages():
                await self._take(message, link, self._work)
                if self._finished:
                    break
        except asyncio.CancelledError:
            if self._work is not None:
                self._work.hand_back("the worker stops")
            why = f"paused: {self.status.pause_reason}" if self._allowance.offline.is_set() else "stopped by its owner"
            link.send(leaving=pb.Leaving(reason=why))
            await link.drain()
            raise
        finally:
            self._link = None
            if self._work is not None:
                self._work.detach()
            heartbeat.cancel()
        await link.drain()

    async def _catch_up(self, link: CoordinatorLink) -> None:
        self._show("fetching the state")
        try:
            await self._follower.catch_up(link)
        except UnavailableError as error:
            raise ConnectionFailedError(f"the state is not to be had yet: {error}") from error
        self._report_state(link)

    def _settle(self, manifest: Manifest) -> None:
        """A manifest was merged: what it lists of this worker's is no longer owed."""
        if self._work is not None:
            self._work.contributor.settle(manifest)

    async def _prepare(self, link: CoordinatorLink) -> LeaseWork:
        genesis = link.genesis
        await link.fetch_small_blobs([genesis.shard_index_hash], self.store, 80 * genesis.num_shards + 64)
        await link.fetch_small_blobs([genesis.model_config_hash], self.store, MAX_CONFIG_BYTES)
        hashes: list[str] = json.loads(self.store.read(genesis.shard_index_hash))
        model_config = self.store.read(genesis.model_config_hash)
        trainer, speed = await asyncio.to_thread(
            prepare_trainer, genesis, model_config, choose_device(self.options.device), self._allowance.compile_mode
        )
        self._claimed = speed._replace(steps_per_s=speed.steps_per_s * self.options.throttle)
        give_memory_back()
        contributor = Contributor(
            genesis=genesis,
            identity=self.identity,
            store=self.store,
            trainer=trainer,
            shard_hashes=hashes,
            throttle=lambda: self._allowance.throttle,
            threads=self._allowance.choose_threads,
            saved=SavedWork(self.home.folder),
            saved_lease=self._saved_lease,
        )
        saved_round = await asyncio.to_thread(contributor.restore)
        if saved_round is not None:
            self._follower.note_from(saved_round)
            log.info("goes on with the work of the last time", round=saved_round)
        return LeaseWork(contributor, self.store, pace=self._allowance, show=self._show, on_step=self._note_step)

    # ---- what the owner allows

    def _take_decision(self, decision: Decision) -> None:
        """Tell the coordinator and the volunteer."""
        reason = decision.reason
        self.status.pause_reason = reason.value if reason else ""
        self.status.pause_detail = decision.detail if reason else ""
        if self._link is not None:
            self._link.send_availability(self.status.pause_reason)
            self._send_heartbeat(self._link)
        self._show(self.status.activity)

    def _count_traffic(self) -> None:
        self._allowance.count_traffic(self.status.bytes_sent, self.status.bytes_received)

    # ---- messages

    async def _take(self, message: pb.CoordinatorMessage, link: CoordinatorLink, work: LeaseWork) -> None:
        match message.WhichOneof("message"):
            case "lease":
                await work.begin(link.open(unpack(message.lease), Lease), self._follower.state)
            case "manifest":
                await self._merge(message.manifest, link, work)
            case "receipt":
                signed = unpack(message.receipt)
                receipt = link.open(signed, Receipt)
                self.home.receipts.keep(signed)
                self.status.credited_tokens += receipt.tokens
                self.status.accepted += 1
            case "wanted":
                if message.wanted.payload_hash == self._groups.payload_hash:
                    self._groups.reveal(link)
                else:
                    work.answer(wanted=True)
            case "merge_order":
                order = link.open(unpack(message.merge_order.order), MergeOrder)
                await self._groups.begin(order, message.merge_order, work.contributor, link)
            case "verdict":
                work.answer(wanted=False)  # refused, or a payload that nobody needs to see
                if not message.verdict.accepted:
                    self.status.late_or_refused += 1
                    log.warning("contribution refused", reason=message.verdict.reason)
            case "resync":
                log.warning("fetching the state again", reason=message.resync.reason)
                await work.end()
                self._follower.forget()
                await self._catch_up(link)
            case "phase":
                self._take_phase(message.phase)

    def _take_phase(self, notice: pb.PhaseNotice) -> None:
        if notice.phase == "finished":
            self._show("the run is finished")
        elif self._work is None or self._work.idle:
            self._show(f"waiting: {notice.phase} ({notice.reason})")

    async def _merge(self, notice: pb.ManifestNotice, link: CoordinatorLink, work: LeaseWork) -> None:
        manifest = link.open(unpack(notice.manifest), Manifest)
        await self._groups.end()
        await work.close_round(manifest.round)
        self._show("merging")
        try:
            await self._follower.apply_notice(notice, manifest, link)
        except UnavailableError as error:
            raise ConnectionFailedError(f"round {manifest.round} cannot be merged yet: {error}") from error
        except VerificationError as error:
            log.warning("fetching the state again", round=manifest.round, reason=str(error))
            self._follower.forget()
            await self._follower.catch_up(link)
        self._report_state(link)
        every_rounds = link.genesis.spec.checkpoint.every_rounds
        await asyncio.to_thread(self._kept.tidy, self._follower.state, every_rounds, self._allowance.max_store_bytes)
        if manifest.tokens_after >= link.genesis.spec.train.tokens:
            self._send_heartbeat(link)
            self._finished = True

    # ---- what is told

    def _report_state(self, link: CoordinatorLink) -> None:
        state = self._follower.state
        if state is not None:
            self.status.round, self.status.digest = state.round, state.digest
            link.send(
                state=pb.StateReport(
                    round=state.round,
                    digest=state.digest,
                    claimed_steps_per_s=self._claimed.steps_per_s,
                    optimizer_share=self._claimed.optimizer_share,
                    download_bps=self._follower.download_bps,
                )
            )
            self._show("ready")

    def _note_step(self, step: StepReport) -> None:
        """Called in the training thread; plain assignments only."""
        self.status.inner_step, self.status.loss = step.inner_step, step.loss
        self.status.compute_s += step.compute_s

    async def _send_heartbeats(self, link: CoordinatorLink) -> None:
        while True:
            self._send_heartbeat(link)
            self._show(self.status.activity)
            await asyncio.sleep(link.welcome.heartbeat_every_s)

    def _send_heartbeat(self, link: CoordinatorLink) -> None:
        status = self.status
        if self._work is not None:
            contributor = self._work.contributor
            status.steps_per_s = contributor.steps_per_s
            status.tokens_per_s = contributor.steps_per_s * contributor.step_tokens
            status.steps_trained = contributor.steps_trained
        error = self._work.contributor.compression_error if self._work is not None else 0.0
        status.bytes_sent = (self._work.bytes_pushed if self._work else 0) + self._node.bytes_sent
        status.bytes_received = self._node.bytes_received
        self._count_traffic()
        link.send(
            heartbeat=pb.Heartbeat(
                activity=f"paused: {status.pause_detail or status.pause_reason}"[:200]
                if status.pause_reason
                else status.activity[:200],
                steps_per_s=status.steps_per_s,
                tokens_per_s=status.tokens_per_s,
                inner_step=status.inner_step,
                loss=status.loss,
                bytes_sent=status.bytes_sent,
                bytes_received=status.bytes_received,
                compression_error=error,
            )
        )

    def _show(self, activity: str) -> None:
        self.status.activity = activity
        self.on_status(self.status)
