"""One lease at a time: worked on in a task beside the conversation, and delivered over whatever link there is.

The owner starts a lease with `begin`, stops it with `end`, and tells of links and of the coordinator's answers. A
broken connection does not end the work: the header is sent again when the worker has joined again.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from protocol.documents import Contribution, Lease
from protocol.envelope import pack
from protocol.errors import ConnectionFailedError, ManyhandsError
from protocol.exchange.store import BlobStore
from protocol.replica import State
from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb
from worker.contributor import Contributor
from worker.link import CoordinatorLink
from worker.saved_lease import HeldLease
from worker.trainer import StepReport

log = structlog.get_logger()
HOLD_S = 30.0  # a paused lease is kept so long, and no longer than it can still be finished


class Pace(Protocol):
    """Whether there is computing now, and how much: see worker.governor.governor."""

    @property
    def paused(self) -> bool: ...

    @property
    def throttle(self) -> float: ...

    def wait_while_paused(self, should_stop: Callable[[], bool]) -> bool:
        """Blocks. True as soon as there is no pause, False when `should_stop` says so first."""
        ...


class LeaseWork:
    """The lease that a worker holds, if any, and the work on it."""

    def __init__(
        self,
        contributor: Contributor,
        store: BlobStore,
        *,
        pace: Pace,
        show: Callable[[str], None],
        on_step: Callable[[StepReport], None],
    ) -> None:
        self.contributor = contributor
        self.lease: Lease | None = None
        self.bytes_pushed = 0
        self._store = store
        self._show = show
        self._pace = pace
        self._on_step = on_step
        self._last_step: StepReport | None = None
        self._task: asyncio.Task[None] | None = None
        self._ahead: asyncio.Task[None] | None = None  # training on while the contribution is exchanged and merged
        self._stopped = False
        self._sending = False
        self._reveal: asyncio.Future[bool] | None = None  # whether the header that was just sent is committed
        self._link: CoordinatorLink
        self._linked = asyncio.Event()

    @property
    def idle(self) -> bool:
        return all(task is None or task.done() for task in (self._task, self._ahead))

    async def begin(self, lease: Lease, state: State | None, held: HeldLease | None = None) -> None:
        """Work on a lease from `state`, and no longer on an earlier one; one that builds on another is handed back.

        Its shards are fetched first, while what is trained ahead goes on. held: that lease in the middle.
        """
        age_s = max(0.0, time.time() - held.facts.received_unix_s) if held else 0.0
        deadline_s = self.contributor.compute_deadline_s(lease, age_s)
        problem = await self._prepare(lease, state)
        await self.end()
        if problem or state is None:
            self._return(lease, problem)
            return
        self.lease, self._stopped, self._last_step = lease, False, None
        self._task = asyncio.create_task(self._fulfil(lease, state, held, deadline_s))

    async def _prepare(self, lease: Lease, state: State | None) -> str:
        """Why the lease cannot be worked on; empty when it can."""
        if state is None or lease.base_digest != state.digest:
            return "another state is held here"
        try:
            await self.contributor.fetch(lease, self._link)
        except ManyhandsError as error:
            log.warning("the lease's shards were not to be had", lease=lease.lease_id, error=str(error))
            return str(error)
        return ""

    async def end(self) -> None:
        """Stop after the current inner step. What was computed is in the error feedback, for the next contribution."""
        self._stopped = True
        await self._end_task()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            await ahead

    async def go_on(self, state: State | None) -> None:
        """Go on with the lease that a process before this one left in the middle, if there is one from this state."""
        held = self.contributor.take_held(state.digest if state else "")
        if held is not None:
            log.info("goes on with a lease", lease=held.lease.lease_id, after_steps=held.facts.steps_done)
            await self.begin(held.lease, state, held)

    async def close_round(self, round_: int) -> None:
        """A round is over: its lease is not delivered any more. Training ahead goes on until the next lease."""
        if self.lease is None or self.lease.round > round_:
            return
        if self._ahead is None:
            await self.end()
        else:
            await self._end_task()

    async def _end_task(self) -> None:
        task, self._task, self.lease = self._task, None, None
        if task is not None:
            if self._sending:  # what is sent after the round's close is lost time
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def attach(self, link: CoordinatorLink) -> None:
        """The worker has joined: deliver over this link from now on."""
        self._link = link
        self._linked.set()

    def detach(self) -> None:
        """The link is gone; a header that it may not have taken is sent again over the next one."""
        self._linked.clear()
        if self._reveal is not None and not self._reveal.done():
            self._reveal.set_exception(ConnectionFailedError("the connection broke before the header was taken"))

    def answer(self, *, wanted: bool) -> None:
        """The coordinator's word on the header: reveal the payload, or not."""
        if self._reveal is not None and not self._reveal.done():
            self._reveal.set_result(wanted)

    def hand_back(self, reason: str) -> None:
        """Tell the coordinator that the lease will not be fulfilled."""
        if self.lease is not None:
            self._return(self.lease, reason)

    def _return(self, lease: Lease, reason: str) -> None:
        if self._linked.is_set():
            self._link.send(lease_return=pb.LeaseReturn(lease_id=lease.lease_id, reason=reason[:200]))

    async def _fulfil(self, lease: Lease, state: State, held: HeldLease | None, deadline_s: float) -> None:
        """Train, encode, deliver. A failure hands the lease back and is told, not raised."""
        try:
            self._show("training")
            trained = await self.contributor.train(
                lease,
                state,
                held=held,
                should_stop=lambda: not self._may_go_on(deadline_s),
                on_step=self._note_step,
            )
            if lease.ahead and not self._stopped:
                self._ahead = asyncio.create_task(self._go_on(lease, state))
            residual = await self.contributor.keep(lease, state, trained)
            if self._stopped:
                return
            if trained.shards:
                done = await self.contributor.encode(lease, trained, residual)
                if asyncio.current_task() is not self._task:  # the round was closed, or the worker stops
                    return
                self._show("sending")
                self._sending = True
                await self._deliver(*done)
            elif lease.contribute:
                self._return(lease, "paused" if self._pace.paused else "no shard was finished in time")
            self._sending = False
            self._show("training ahead" if lease.ahead else "waiting for the merge")
            await self.contributor.save(lease.round, is_ahead=self._ahead is not None)
        except ManyhandsError as error:
            log.warning("the lease was not fulfilled", lease=lease.lease_id, error=str(error))
            self._return(lease, str(error))
        finally:
            self._sending = False

    def _may_go_on(self, deadline_s: float) -> bool:
        """Asked before every inner step, in the training thread. A pause is waited out while it is worth it."""

        def is_over() -> bool:
            return self._stopped or time.monotonic() > deadline_s

        if is_over():
            return False
        if not self._pace.paused:
            return True
        step = self._last_step
        left_s = (step.num_inner_steps - step.inner_step) * step.compute_s / self._pace.throttle if step else 0.0
        give_up_s = min(time.monotonic() + HOLD_S, deadline_s - left_s)
        return self._pace.wait_while_paused(lambda: is_over() or time.monotonic() > give_up_s)

    def _note_step(self, step: StepReport) -> None:
        self._last_step = step
        self._on_step(step)

    async def _go_on(self, lease: Lease, state: State) -> None:
        try:
            await self.contributor.go_on(
                lease,
                state,
                should_stop=lambda: not self._pace.wait_while_paused(lambda: self._stopped),
                on_step=self._on_step,
            )
        except ManyhandsError as error:
            log.warning("training ahead broke off", lease=lease.lease_id, error=str(error))

    async def _deliver(self, header: Contribution, signed: Signed) -> None:
        """Commit the header, then reveal the payload; over a new connection when the one in use breaks."""
        while True:
            await self._linked.wait()
            link = self._link
            self._reveal = asyncio.get_running_loop().create_future()
            try:
                link.send(contribution=pack(signed))
                if await self._reveal:
                    await link.push_blob(header.payload_hash, self._store)
                    self.bytes_pushed += header.payload_bytes
                return
            except ConnectionFailedError:
                if self._link is link:
                    self._linked.clear()  # set again when the worker has joined again
