"""One butterfly round as one peer goes through it.

It links up with everybody and compares the group, exchanges parts, and compares a hash of each reducer's part.

Invariants: who takes part, in which order and with which weight is the caller's word alone, never the DHT's or a
sender's. It is all or nothing: a vector comes back only when every part of every peer was checked and averaged and all
peers hold the same bits; any failure is a ButterflyError that names the peer to blame, as far as it can be told, and is
told to the others, so that they end too. Nothing that the caller holds is changed. Every wait has a limit.

What stays open: a peer that dies, or lies, in the last message can leave others without a result that some already
have, so the digest of the state is still to be compared by whoever leads the run. And a report of a failure can name
the wrong peer.
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from protocol.codecs.payload import Vector
from protocol.errors import ButterflyError
from protocol.exchange.butterfly.group import ButterflyGroup, ButterflyTimeouts
from protocol.exchange.butterfly.links import GRACE_S, LINK_PROTOCOL, Links
from protocol.exchange.butterfly.parts import (
    PartCodec,
    find_disagreement,
    get_part_codec,
    part_values,
    segment_digests,
)
from protocol.exchange.butterfly.reduce import ButterflyRunner
from protocol.exchange.butterfly.streams import CLOSE_TIMEOUT_S, BrokenStreamError, FrameStream, open_stream
from protocol.exchange.peer import PeerNode

PART_PROTOCOL = "/manyhands/butterfly/1/parts/"
DIED_S = 0.5  # for our daemon's end to be noticed
TIMEOUTS = ButterflyTimeouts()


async def average_butterfly(
    node: PeerNode,
    *,
    group: ButterflyGroup,
    vector: Vector,
    codec: str = "float16",
    timeouts: ButterflyTimeouts = TIMEOUTS,
) -> Vector:
    """The weighted mean of the group's vectors, float32 (D,), bit for bit the same at every peer.

    All peers call it at about the same time, with the same `group` and `codec` ("float32", "float16" or "uniform8",
    hivemind's, which clips at 3 sigma). `vector`: float32 (D,), finite, the same D everywhere; it must not change
    meanwhile, and is not changed. The sums are in the order in which parts arrive, so another round with the same
    vectors may differ in the last bits, but never between peers.

    Raises ButterflyError when the round failed, whoever is to blame; PayloadError for a vector, ConfigError for a
    codec that cannot be used, ValueError when this node is not in the group.
    """
    part_codec = get_part_codec(codec)
    await asyncio.to_thread(part_codec.check_input, vector)
    return await ButterflyRound(node, group, vector, part_codec, timeouts).run()


class ButterflyRound:
    """`run` is called once."""

    runner_type: ClassVar[type[ButterflyRunner]] = ButterflyRunner

    def __init__(
        self, node: PeerNode, group: ButterflyGroup, vector: Vector, codec: PartCodec, timeouts: ButterflyTimeouts
    ) -> None:
        if node.peer_id not in group.peers:
            raise ValueError(f"{node.peer_id} is not in the group")
        self._node, self._group, self._timeouts = node, group, timeouts
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._over = False
        self._part_streams: dict[str, FrameStream] = {}  # those that peers opened
        self._max_frame_bytes = codec.message_bytes_max(part_values(vector.size, len(group.peers)))
        self._links = Links(node, group, group.view_digest(codec.name, vector.size), timeouts, self._spawn)
        self._runner = self.runner_type(
            node.p2p,
            group.group_id.encode(),
            group.peers,
            group.fractions,
            np.require(vector, requirements=["C", "W"]),  # torch takes no read-only array
            codec,
            open_part_stream=self._open_part_stream,
            on_failure=self._fail_part,
            sender_timeout_s=timeouts.sender_s,
            reducer_timeout_s=timeouts.reducer_s,
        )

    async def run(self) -> Vector:
        """See average_butterfly."""
        try:
            await _to_the_end(self._listen())
            work = self._spawn(self._work())
            await asyncio.wait(
                {work, self._failed}, timeout=self._timeouts.round_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not work.done():
                self._fail(ButterflyError(self._find_latest(), f"was not done within {self._timeouts.round_s:g} s"))
            if self._failed.done():
                raise await self._give_up(self._failed.result())
            average: Vector = work.result()
            return average
        finally:
            await _to_the_end(self._end())

    async def _work(self) -> Vector:
        await self._links.meet()
        average = await self._runner.average()
        own_digests = await asyncio.to_thread(segment_digests, average, self._runner.segment_sizes)
        digests = await self._links.exchange_digests(own_digests)
        disagreement = find_disagreement(self._node.peer_id, self._group.peers, digests)
        if disagreement is not None:
            raise disagreement
        return average

    async def _listen(self) -> None:
        try:
            async with asyncio.timeout(self._timeouts.start_s):
                await self._node.p2p.add_binary_stream_handler(PART_PROTOCOL + self._group.group_id, self._accept_parts)
                await self._node.p2p.add_binary_stream_handler(LINK_PROTOCOL + self._group.group_id, self._links.accept)
        except (OSError, EOFError, TimeoutError) as error:
            raise self._daemon_gone() from error

    async def _accept_parts(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A peer begins to send us parts. This call ends at once, because asyncio complains when it is cancelled."""
        peer = info.peer_id.to_base58()
        expected = peer in self._group.peers and peer != self._node.peer_id
        if self._over or not expected or peer in self._part_streams:
            writer.close()
            return
        self._part_streams[peer] = FrameStream(peer, reader, writer, self._max_frame_bytes)
        self._spawn(self._runner.serve(self._part_streams[peer]))

    async def _open_part_stream(self, peer: str) -> FrameStream:
        name, addresses = PART_PROTOCOL + self._group.group_id, self._group.addresses.get(peer, ())
        return await open_stream(self._node, name, peer, addresses, self._max_frame_bytes, self._timeouts.start_s)

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it beside the rest; its failure is the round's."""
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._notice_end)
        self._tasks.add(task)
        return task

    def _notice_end(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail_part(self, error: Exception) -> None:
        """The runner failed. That a stream broke counts only when no better reason comes over the links in a moment."""
        if isinstance(error, BrokenStreamError):
            asyncio.get_running_loop().call_later(GRACE_S, self._fail, error)
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the round. The first reason counts."""
        if not self._failed.done():
            self._failed.set_result(error if self._node.alive else self._daemon_gone())

    async def _give_up(self, error: BaseException) -> BaseException:
        """Tell everybody why the round ends here, and return the error to raise."""
        accused, reason = self._node.peer_id, "ended the round"
        if isinstance(error, ButterflyError) and error.peer in self._group.peers:
            accused, reason = error.peer, error.reason
        if not self._links.met.is_set():
            with suppress(TimeoutError):  # who links up in this moment need not find out by waiting
                await _within(self._links.met.wait(), GRACE_S)
        await self._links.tell_failure(accused, reason)
        if isinstance(error, BrokenStreamError):
            with suppress(TimeoutError):  # when our daemon dies, broken streams are what we see first
                await _within(self._node.died.wait(), DIED_S)
                return self._daemon_gone()
        return error

    def _daemon_gone(self) -> ButterflyError:
        return ButterflyError(self._node.peer_id, "this machine's libp2p daemon is gone")

    def _find_latest(self) -> str:
        """Somebody who is not done yet."""
        return next((peer for peer in self._group.peers if peer not in self._links.digests), self._node.peer_id)

    async def _end(self) -> None:
        """Leave nothing behind: no task, stream or handler."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._runner.finalize(cancel=True)
        await self._links.close()
        await asyncio.gather(*(stream.close() for stream in self._part_streams.values()))
        for name in (PART_PROTOCOL, LINK_PROTOCOL):
            with suppress(OSError, EOFError, KeyError, TimeoutError):
                await _within(self._node.p2p.remove_binary_stream_handler(name + self._group.group_id), CLOSE_TIMEOUT_S)


async def _within(awaitable: Awaitable[object], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        await awaitable


async def _to_the_end(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await it, and when we are cancelled, only then leave: half done, it leaves sockets and handlers behind."""
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
