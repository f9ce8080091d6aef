"""hivemind's all-reduce, as far as it is used here: who reduces which part, the order of parts, and the running sums.

hivemind.averaging.allreduce.AllReduceRunner in which nothing goes wrong quietly. Three things differ. Its streams are
ours (butterfly.streams), and every part that comes is checked before it is added or taken. Weights are
the group's, not the sender's. A reducer encodes an average once and sends those bytes to everybody, and takes what they
decode to itself, so all peers end with the same bits; hivemind encodes for each peer the difference to what that peer
sent, and keeps its own average unencoded.

Every failure reaches `on_failure`: hivemind itself would go on with what it has and report success.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException, TensorPartReducer
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2

from protocol.codecs.payload import Vector
from protocol.errors import ButterflyError, PayloadError
from protocol.exchange.butterfly.parts import PartCodec, check_request, parse_message, part_values
from protocol.exchange.butterfly.streams import FrameStream

OpenStream = Callable[[str], Awaitable[FrameStream]]
OnFailure = Callable[[Exception], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragedPart:
    """The average of one part: the frame that everybody gets, and float32 (V,), what it decodes to."""

    frame: bytes
    values_v: torch.Tensor


class PartReducer(TensorPartReducer):  # type: ignore[misc]  # hivemind ships no types
    """hivemind's running sums of our parts; an average comes out of `accumulate_part` as an AveragedPart."""

    def __init__(self, part_shapes: Sequence[torch.Size], num_senders: int, codec: PartCodec) -> None:
        self._codec = codec
        super().__init__(part_shapes, num_senders)

    def check_current_part_finished(self) -> None:
        if self.current_part_accumulated_from == self.num_current_senders:
            average_v = self.accumulator.div_(self.denominator)
            part = self._codec.encode(average_v)
            message = averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=part)
            decoded_v = self._codec.decode(part, average_v.numel())
            self.current_part_future.set_result(AveragedPart(frame=message.SerializeToString(), values_v=decoded_v))
            self.reset_accumulators()


class ButterflyRunner(AllReduceRunner):  # type: ignore[misc]  # hivemind ships no types
    """One round, at one peer. `average` does our side of it, `serve` is called for every peer that sends us parts.

    `peers`: peer ids in canonical order, ours among them; `weights`: theirs, adding up to 1; `vector`: float32 (D,).
    """

    _rpc_handlers = _stub_type = None  # hivemind caches both on the class, so that subclasses would inherit them

    def __init__(
        self,
        p2p: Any,
        group_id: bytes,
        peers: Sequence[str],
        weights: Sequence[float],
        vector: Vector,
        codec: PartCodec,
        *,
        open_part_stream: OpenStream,
        on_failure: OnFailure,
        sender_timeout_s: float,
        reducer_timeout_s: float,
    ) -> None:
        own = peers.index(p2p.peer_id.to_base58())
        super().__init__(
            p2p=p2p,
            servicer_type=AllReduceRunner,
            prefix=None,
            group_id=group_id,
            tensors=[torch.from_numpy(vector)],
            weight=weights[own],
            ordered_peer_ids=[PeerID.from_base58(peer) for peer in peers],
            peer_fractions=(1.0,) * len(peers),
            sender_timeout=sender_timeout_s,
            reducer_timeout=reducer_timeout_s,
            compression=codec.compression,
            part_size_bytes=codec.value_bytes * part_values(vector.size, len(peers)),
        )
        self._peers, self._own, self._weights, self._codec = peers, own, weights, codec
        self._open_part_stream, self._on_failure = open_part_stream, on_failure
        self._parts_by_peer = [
            self.parts_for_local_averaging if place == own else self.tensor_part_container.get_raw_input_parts(place)
            for place in range(len(peers))
        ]
        self.tensor_part_reducer.finished.set()  # or, when it goes, it would log that it missed everything
        shapes = [part.shape for part in self.parts_for_local_averaging]
        self.tensor_part_reducer: PartReducer = PartReducer(shapes, len(peers), codec)

    @property
    def segment_sizes(self) -> list[int]:
        """How many values each peer reduces; in this order they make up the vector."""
        return [sum(part.numel() for part in parts) for parts in self._parts_by_peer]

    async def average(self) -> Vector:
        """The weighted mean, float32 (D,). It does not end when a part fails: `on_failure` is told, the caller ends it.

        Raises ButterflyError when hivemind counts less than it should, which is its way to say that it went on without.
        """
        (average_d,) = [tensor async for tensor in self.run()]
        expected = self.tensor_part_reducer.num_parts * self.tensor_part_reducer.num_senders
        received = sum(self.tensor_part_reducer.num_parts_received)
        if self.tensor_part_container.failed_size or self.banned_senders or received != expected:
            raise ButterflyError(self._peers[self._own], f"got {received} of {expected} parts to average")
        average: Vector = average_d.numpy()
        return average

    def finalize(self, *, cancel: bool = False, exception: BaseException | None = None) -> None:
        super().finalize(cancel=cancel, exception=exception)
        if not self._future.cancelled():
            self._future.exception()  # nobody waits for this future, and asyncio complains of errors that nobody saw

    async def serve(self, stream: FrameStream) -> None:
        """Take one peer's parts, each checked before it is added, and answer each with the average of that part."""
        sender = self._peers.index(stream.peer_id)
        self.active_senders.add(self.ordered_peer_ids[sender])
        if len(self.active_senders) == len(self.sender_peer_ids):
            self.all_senders_started.set()
        try:
            for index, part in enumerate(self.parts_for_local_averaging):
                frame = await stream.receive(self.sender_timeout)
                values_v = await asyncio.to_thread(self._read_request, frame, sender, index, part.numel())
                averaged = await self.tensor_part_reducer.accumulate_part(
                    sender, index, values_v, weight=self._weights[sender]
                )
                await stream.send(averaged.frame, self.reducer_timeout)
        except Exception as error:
            self._report(sender, error)

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        """Have one reducer, perhaps ourselves, average our parts, and register what comes back.

        When it fails, what did not come keeps `run` waiting: hivemind would put our own values in its place.
        """
        reducer = self.ordered_peer_ids.index(peer_id)
        try:
            if reducer == self._own:
                await self._reduce_own_parts()
            else:
                await self._exchange_parts(reducer)
        except Exception as error:
            self._report(reducer, error)

    async def _reduce_own_parts(self) -> None:
        for index, part in enumerate(self.parts_for_local_averaging):
            averaged = await self.tensor_part_reducer.accumulate_part(self._own, index, part, weight=self.weight)
            self.tensor_part_container.register_processed_part(self._own, index, averaged.values_v)

    async def _exchange_parts(self, reducer: int) -> None:
        stream = await self._open_part_stream(self._peers[reducer])
        sending = asyncio.create_task(self._send_parts(reducer, stream))
        try:
            for index, part in enumerate(self._parts_by_peer[reducer]):
                frame = await stream.receive(self.reducer_timeout)
                values_v = await asyncio.to_thread(self._read_average, frame, part.numel())
                self.tensor_part_container.register_processed_part(reducer, index, values_v)
        finally:
            sending.cancel()
            await stream.close()  # first, because the wait may be cancelled
            await asyncio.wait({sending})

    async def _send_parts(self, reducer: int, stream: FrameStream) -> None:
        try:
            for index, part in enumerate(self._parts_by_peer[reducer]):
                frame = await asyncio.to_thread(self._write_request, part, index)
                await stream.send(frame, self.reducer_timeout)
        except Exception as error:
            self._report(reducer, error)

    async def _ban_sender(self, peer_id: PeerID) -> None:
        """hivemind calls it for a peer that never began, and would then average without it. We do not."""
        self._on_failure(ButterflyError(peer_id.to_base58(), f"sent no part within {self.sender_timeout:g} s"))

    def _report(self, peer: int, error: Exception) -> None:
        if isinstance(error, PayloadError):
            self._on_failure(ButterflyError(self._peers[peer], f"sent {error}"))
        elif not isinstance(error, AllreduceException):  # that one only says that the round is over
            self._on_failure(error)

    def _write_request(self, part_v: torch.Tensor, index: int) -> bytes:
        message = averaging_pb2.AveragingData(tensor_part=self._codec.encode(part_v), weight=self.weight)
        if index == 0:
            message.code, message.group_id = averaging_pb2.PART_FOR_AVERAGING, self.group_id
        frame: bytes = message.SerializeToString()
        return frame

    def _read_request(self, frame: bytes, sender: int, index: int, num_values: int) -> torch.Tensor:
        message = parse_message(frame)
        check_request(message, self.group_id, self._weights[sender], is_first=index == 0)
        return self._codec.decode(message.tensor_part, num_values)

    def _read_average(self, frame: bytes, num_values: int) -> torch.Tensor:
        message = parse_message(frame)
        if message.code != averaging_pb2.AVERAGED_PART:
            raise PayloadError("a message that is not an averaged part")
        return self._codec.decode(message.tensor_part, num_values)
