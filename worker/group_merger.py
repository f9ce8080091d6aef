"""Merging a group's contributions into one payload, when the coordinator asks for it.

Alone (two-level form: fetch the payloads, merge, encode) or with the group's other peers (butterfly: their vectors are
averaged among themselves). What comes out is said by its hash; the payload is pushed when the coordinator wants it, and
served to others.
"""

import asyncio
import hashlib

import structlog

from protocol.codecs import get_codec
from protocol.documents import MergeOrder
from protocol.errors import ButterflyError, ConnectionFailedError, ManyhandsError
from protocol.exchange.fetch import fetch_blobs
from protocol.exchange.peer import PeerNode
from protocol.exchange.piece_index import has_index, make_piece_index
from protocol.exchange.store import BlobStore
from protocol.replica import merge_group
from protocol.signing import canonical_json
from protocol.wire import coordinator_pb2 as pb
from worker.contributor import Contributor
from worker.follower import Follower
from worker.link import CoordinatorLink

log = structlog.get_logger()


class GroupMerger:
    """At most one merge at a time: a newer order replaces an older one."""

    def __init__(self, node: PeerNode, follower: Follower, store: BlobStore) -> None:
        self.payload_hash = ""  # of the last merged payload
        self._node = node
        self._follower = follower
        self._store = store
        self._task: asyncio.Task[None] | None = None

    async def begin(
        self, order: MergeOrder, notice: pb.MergeOrderNotice, contributor: Contributor, link: CoordinatorLink
    ) -> None:
        """Merge, and tell the coordinator what came of it."""
        await self.end()
        self._task = asyncio.create_task(self._merge(order, notice, contributor, link))

    async def end(self) -> None:
        """Stop; nothing is told."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def reveal(self, link: CoordinatorLink) -> None:
        """Push the payload: the coordinator wants it."""
        self._task = asyncio.create_task(self._push(link))

    async def _push(self, link: CoordinatorLink) -> None:
        try:
            await link.push_blob(self.payload_hash, self._store)
        except ManyhandsError as error:
            log.warning("the merged group was not sent", error=str(error))

    async def _merge(
        self, order: MergeOrder, notice: pb.MergeOrderNotice, contributor: Contributor, link: CoordinatorLink
    ) -> None:
        answer = pb.GroupMerged(round=order.round, group=order.group, attempt=order.attempt)
        try:
            if order.butterfly:
                payload = await self._average(order, notice, contributor, link)
            else:
                payload = await self._gather(order, notice, link)
            self.payload_hash = await asyncio.to_thread(self._store.put, payload)
            answer.payload_hash, answer.payload_bytes = self.payload_hash, len(payload)
            if has_index(len(payload)):
                answer.pieces_hash = await asyncio.to_thread(lambda: self._store.put(make_piece_index(payload)))
        except ConnectionFailedError:
            return  # ordered again when this worker has joined again
        except ManyhandsError as error:
            log.warning("the group was not merged", round=order.round, group=order.group, error=str(error))
            answer.blamed = error.peer if isinstance(error, ButterflyError) else ""
        link.send(group_merged=answer)

    async def _gather(self, order: MergeOrder, notice: pb.MergeOrderNotice, link: CoordinatorLink) -> bytes:
        """Two-level: the group's mean, from its peers' payloads."""
        wanted = [self._follower.locate(entry, order.base_digest, notice, link) for entry in order.contributions]
        await fetch_blobs(self._store, wanted)
        codec, size = get_codec(order.codec), link.genesis.num_parameters
        return await asyncio.to_thread(merge_group, order.contributions, codec, size, self._store.read)

    async def _average(
        self, order: MergeOrder, notice: pb.MergeOrderNotice, contributor: Contributor, link: CoordinatorLink
    ) -> bytes:
        """Butterfly: the group's mean, by all-reduce with its peers."""
        # here, since it imports all of hivemind, which other runs do without
        from protocol.exchange.butterfly import ButterflyGroup, ButterflyTimeouts, average_butterfly

        vector = await asyncio.to_thread(contributor.contributed, order.round)
        peers = tuple(entry.peer for entry in order.contributions)
        if len(peers) > 1:
            group = ButterflyGroup(
                group_id=_group_id(order),
                peers=peers,
                weights=tuple(entry.weight for entry in order.contributions),
                addresses={source.peer: tuple(source.addresses) for source in notice.sources},
            )
            timeouts = ButterflyTimeouts(  # such that a silent peer is found out with time left for another attempt
                start_s=order.deadline_in_s / 4,
                sender_s=order.deadline_in_s / 6,
                reducer_s=order.deadline_in_s / 4,
                round_s=order.deadline_in_s,
            )
            vector = await average_butterfly(
                self._node, group=group, vector=vector, codec=order.codec, timeouts=timeouts
            )
        return await asyncio.to_thread(get_codec(order.codec).encode, vector)


def _group_id(order: MergeOrder) -> str:
    facts = ["butterfly", order.run_id, order.round, order.group, order.attempt]
    return hashlib.sha256(canonical_json(facts)).hexdigest()
