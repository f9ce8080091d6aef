"""What the peers of a round tell each other beside the parts, over one stream for each pair of them.

    HELLO    32 bytes: the group as the peer sees it (ButterflyGroup.view_digest); first, from both sides
    DIGESTS  32 bytes for each reducer: its part of the average (parts.segment_digests); once, at the end
    FAILED   1 byte, the place of the peer to blame; then why, UTF-8: the round ends here

Of two peers the earlier one dials, again and again until the other one has come. A link that ends before its DIGESTS
came is a peer that is gone: that is how a death is noticed at once. Errors end the task that they are raised in, which
the round notices (`spawn`).
"""

import asyncio
from collections.abc import Callable, Container, Coroutine
from contextlib import suppress
from enum import IntEnum
from typing import Any, NoReturn

from protocol.errors import ButterflyError
from protocol.exchange.butterfly.group import ButterflyGroup, ButterflyTimeouts
from protocol.exchange.butterfly.streams import (
    CLOSE_TIMEOUT_S,
    MAX_REASON_BYTES,
    BrokenStreamError,
    FrameStream,
    UnreachableError,
    open_stream,
)
from protocol.exchange.peer import PeerNode

LINK_PROTOCOL = "/manyhands/butterfly/1/link/"
REDIAL_PAUSE_S = 0.25
GRACE_S = 1.0  # for a better reason to fail than the one at hand
DIGEST_BYTES = 32

Spawn = Callable[[Coroutine[Any, Any, None]], object]


class Tell(IntEnum):
    """First byte of a frame."""

    HELLO = 1
    DIGESTS = 2
    FAILED = 3


class Links:
    """Our links with the other peers of a group."""

    def __init__(
        self, node: PeerNode, group: ButterflyGroup, view_digest: bytes, timeouts: ButterflyTimeouts, spawn: Spawn
    ) -> None:
        self.met = asyncio.Event()  # with everybody
        self.digests: dict[str, bytes] = {}
        self._node, self._group, self._timeouts, self._spawn = node, group, timeouts, spawn
        self._peers = group.peers
        own = self._peers.index(node.peer_id)
        self._earlier, self._later = self._peers[:own], self._peers[own + 1 :]
        self._hello = bytes([Tell.HELLO]) + view_digest
        self._max_frame_bytes = 2 + max(MAX_REASON_BYTES, DIGEST_BYTES * len(self._peers))
        self._links: dict[str, FrameStream] = {}
        self._greeting: set[str] = set()
        self._parted: dict[str, asyncio.Future[None]] = {}  # done when the peer has ended the round
        self._streams: set[FrameStream] = set()
        self._confirmed = asyncio.Event()
        self._closed = False

    async def meet(self) -> None:
        """Return when all are linked and agree about the group. Raises ButterflyError."""
        for peer in self._later:
            self._spawn(self._dial(peer))
        await self._wait_for(self.met, self._timeouts.start_s, self._links, "did not come")

    async def exchange_digests(self, own_digests: bytes) -> list[bytes]:
        """Tell everybody ours and return those of all, in the order of the group. Raises ButterflyError."""
        self._take_digests(self._node.peer_id, own_digests)
        for link in self._links.values():
            await link.send(bytes([Tell.DIGESTS]) + own_digests, self._timeouts.reducer_s)
        await self._wait_for(self._confirmed, self._timeouts.reducer_s, self.digests, "did not confirm its result")
        return [self.digests[peer] for peer in self._peers]

    async def tell_failure(self, accused: str, reason: str) -> None:
        """Tell those that are linked, and wait a moment until they end the round too; what cannot be sent is left.

        Closing at once could lose what was just sent: libp2p resets a stream when more comes for a reader that is gone.
        """
        frame = bytes([Tell.FAILED, self._peers.index(accused)]) + reason.encode()[:MAX_REASON_BYTES]
        links = list(self._links.items())
        await asyncio.gather(*(link.send(frame, CLOSE_TIMEOUT_S) for _, link in links), return_exceptions=True)
        if links:
            await asyncio.wait([self._parted[peer] for peer, _ in links], timeout=GRACE_S)

    async def accept(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A peer dials us. This call ends at once, because asyncio complains when it is cancelled."""
        peer = info.peer_id.to_base58()
        if self._closed or peer not in self._earlier or peer in self._links or peer in self._greeting:
            writer.close()
            return
        self._greeting.add(peer)
        link = FrameStream(peer, reader, writer, self._max_frame_bytes)
        self._streams.add(link)
        self._spawn(self._welcome(link))

    async def close(self) -> None:
        """End all links, once the spawned tasks are over. Whoever dials later is sent away."""
        self._closed = True
        await asyncio.gather(*(link.close(CLOSE_TIMEOUT_S) for link in self._streams))

    async def _dial(self, peer: str) -> None:
        name, addresses = LINK_PROTOCOL + self._group.group_id, self._group.addresses.get(peer, ())
        while True:
            with suppress(UnreachableError):
                link = await open_stream(
                    self._node, name, peer, addresses, self._max_frame_bytes, self._timeouts.start_s
                )
                self._streams.add(link)
                if await self._greet(link):
                    break
            await asyncio.sleep(REDIAL_PAUSE_S)
        await self._watch(link)

    async def _welcome(self, link: FrameStream) -> None:
        if await self._greet(link):
            await self._watch(link)
        self._greeting.discard(link.peer_id)

    async def _greet(self, link: FrameStream) -> bool:
        """Compare what both take the group to be. False when the stream broke: there may be another one."""
        try:
            await link.send(self._hello, self._timeouts.start_s)
            frame = await link.receive(self._timeouts.start_s)
        except BrokenStreamError:  # libp2p may open a stream before it knows that nobody is listening for it
            self._streams.discard(link)
            await link.close()
            return False
        if frame != self._hello:
            raise ButterflyError(link.peer_id, "has another view of the group: peers, weights, codec or vector size")
        return True

    async def _watch(self, link: FrameStream) -> None:
        """Take what a peer tells us, until it has told its digests and ends."""
        peer = link.peer_id
        self._links[peer] = link
        self._parted[peer] = parted = asyncio.get_running_loop().create_future()
        if len(self._links) == len(self._peers) - 1:
            self.met.set()
        while True:
            try:
                frame = await link.receive(None)  # the wait for digests has the limit
            except BrokenStreamError:
                parted.set_result(None)
                if peer in self.digests:
                    return
                raise
            kind, content = frame[:1], frame[1:]
            if kind == bytes([Tell.FAILED]):
                parted.set_result(None)
                if self._node.peer_id in self.digests:
                    await asyncio.sleep(GRACE_S)  # who compares digests himself need not believe others
                self._take_failure(peer, content)
            elif kind == bytes([Tell.DIGESTS]) and peer not in self.digests:
                self._take_digests(peer, content)
            else:
                raise ButterflyError(peer, "sent a message that does not belong here")

    def _take_digests(self, peer: str, digests: bytes) -> None:
        if len(digests) != DIGEST_BYTES * len(self._peers):
            raise ButterflyError(peer, "sent digests of another group")
        self.digests[peer] = digests
        if len(self.digests) == len(self._peers):
            self._confirmed.set()

    def _take_failure(self, peer: str, content: bytes) -> NoReturn:
        accused = self._peers[content[0]] if content and content[0] < len(self._peers) else peer
        text = content[1:].decode(errors="replace")
        reason = "".join(char if char.isprintable() else " " for char in text)
        raise ButterflyError(accused, reason, reported_by=peer)

    async def _wait_for(self, event: asyncio.Event, timeout_s: float, came: Container[str], what: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError as error:
            missing = next((peer for peer in self._earlier + self._later if peer not in came), self._node.peer_id)
            raise ButterflyError(missing, f"{what} within {timeout_s:g} s") from error
