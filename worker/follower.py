"""A replica that follows the run: fetches the state once, then applies every manifest in order.

Used by workers and by the validator. The state only ever moves by `apply_manifest` on verified manifests and payloads
whose hashes hold, so it is bitwise the run's, or an error says why not.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from protocol.documents import Accepted, Genesis, GroupPayload, Manifest
from protocol.errors import UnavailableError, VerificationError
from protocol.exchange.fetch import Wanted, fetch_blob, fetch_blobs
from protocol.exchange.order import order_sources
from protocol.exchange.source import PATIENCE, UNLIMITED, Patience, Source
from protocol.exchange.store import BlobStore
from protocol.exchange.throttle import Throttle
from protocol.replica import State, apply_manifest, state_bytes_size
from protocol.wire import coordinator_pb2 as pb
from worker.link import CoordinatorLink

log = structlog.get_logger()
MakeSource = Callable[[str, Sequence[str]], Source | None]  # (peer id, addresses) -> where to try first
NUM_SPEEDS = 5
MERGE_PATIENCE = Patience(absent_s=2.0)  # everybody fetches at once: those above in the tree may not have begun


class Follower:
    """The state of one run on this machine. `state` is None until `catch_up`."""

    def __init__(
        self,
        store: BlobStore,
        make_source: MakeSource | None = None,
        on_manifest: Callable[[Manifest], object] | None = None,
        downloads: Throttle = UNLIMITED,
    ) -> None:
        self.state: State | None = None
        self._store = store
        self._make_source = make_source
        self._on_manifest = on_manifest  # called once for each manifest that is applied, in order
        self._downloads = downloads
        self._speeds_bps: deque[float] = deque(maxlen=NUM_SPEEDS)
        self._noted = -1  # manifests before this round were given to on_manifest; -1: none was due yet

    @property
    def round(self) -> int:
        """Rounds merged; -1 before the first state."""
        return self.state.round if self.state else -1

    def forget(self) -> None:
        """Drop the state: the run's is another."""
        self.state = None

    @property
    def download_bps(self) -> float:
        """Bits a second of the fastest of the last merges' downloads; 0 before the first."""
        return max(self._speeds_bps, default=0.0)

    async def catch_up(self, link: CoordinatorLink) -> State:
        """Bring the state to the newest manifest: from where it stands, or from the run's last checkpoint.

        Whichever takes fewer bytes; when the payloads on the one way are not to be had, the other. Raises
        UnavailableError when neither is: then it is worth waiting.
        """
        if self.state is None:
            await self._take_checkpoint(link)
        elif await self._is_checkpoint_nearer(link, self.state):
            with suppress(UnavailableError):
                await self._take_checkpoint(link)
        try:
            return await self._replay(link)
        except UnavailableError:
            if self.round >= link.welcome.checkpoint_round:
                raise
        await self._take_checkpoint(link)
        return await self._replay(link)

    async def _replay(self, link: CoordinatorLink) -> State:
        async for manifest in link.manifests_from(self.round):
            if manifest.round >= self.round:
                await self._apply(manifest, None, link)
        if self.state is None:
            raise VerificationError("there is no state to merge into")
        return self.state

    async def _is_checkpoint_nearer(self, link: CoordinatorLink, state: State) -> bool:
        """Whether the checkpoint has fewer bytes than the payloads between `state` and it."""
        bytes_left = self._checkpoint_size(link)
        async for manifest in link.manifests_from(state.round):
            if manifest.round >= link.welcome.checkpoint_round:
                return False
            bytes_left -= sum(entry.payload_bytes for entry in _payloads(manifest))
            if bytes_left < 0:
                return True
        return False

    async def _take_checkpoint(self, link: CoordinatorLink) -> None:
        """Take the run's last checkpoint for the state, and note the manifests that it leaves out."""
        state = await self._fetch_state(link, link.welcome.checkpoint_digest, int(link.welcome.checkpoint_round))
        if self._on_manifest is not None and 0 <= self._noted < state.round:
            async for manifest in link.manifests_from(self._noted):
                if manifest.round < state.round:
                    await self._note(manifest)
        self.state, self._noted = state, max(self._noted, state.round)

    async def apply_notice(self, notice: pb.ManifestNotice, manifest: Manifest, link: CoordinatorLink) -> State:
        """Apply a manifest that was just announced; one that is older than the state is ignored."""
        if self.state is None or manifest.round > self.state.round:
            return await self.catch_up(link)
        if manifest.round == self.state.round:
            await self._apply(manifest, notice, link)
        return self.state

    async def _apply(self, manifest: Manifest, notice: pb.ManifestNotice | None, link: CoordinatorLink) -> None:
        if self.state is None:
            raise VerificationError("there is no state to merge into")
        wanted = [self.locate(entry, manifest.base_digest, notice, link) for entry in _payloads(manifest)]
        patience = MERGE_PATIENCE if notice else PATIENCE
        bits = 8 * sum(blob.size_bytes for blob in wanted if not self._store.has(blob.blob_hash))
        started_s = time.monotonic()
        await fetch_blobs(self._store, wanted, patience=patience, throttle=self._downloads, on_failure=_log_failure)
        if bits:
            self._speeds_bps.append(bits / max(time.monotonic() - started_s, 1e-6))
        self.state = await asyncio.to_thread(_merge, self.state, manifest, self._store)
        await self._note(manifest)

    def note_from(self, round_: int) -> None:
        """Manifests before this round were given to `on_manifest` by a process before this one."""
        self._noted = round_

    async def _note(self, manifest: Manifest) -> None:
        if manifest.round < self._noted:
            return
        self._noted = max(self._noted, manifest.round + 1)
        if self._on_manifest is not None:
            await asyncio.to_thread(self._on_manifest, manifest)

    def locate(
        self,
        entry: Accepted | GroupPayload,
        base_digest: str,
        notice: pb.ManifestNotice | pb.MergeOrderNotice | None,
        link: CoordinatorLink,
    ) -> Wanted:
        """Where to look for a payload: at peers, in an order that spares everybody's uplink, then the coordinator."""
        peers = notice.peers if isinstance(notice, pb.ManifestNotice) else () if notice else link.welcome.state_sources
        makers = (entry.peer,) if isinstance(entry, Accepted) else entry.mergers
        addresses = {peer.peer: tuple(peer.addresses) for peer in peers}
        sources = notice.sources if notice else ()
        addresses |= {source.peer: tuple(source.addresses) for source in sources if source.addresses}
        contributor = next((peer for peer in makers if peer in addresses), makers[0])
        order = order_sources(
            entry.payload_hash,
            me=link.peer_id,
            contributor=contributor,
            seeds=[peer.peer for peer in peers if peer.seed],
            others=[peer.peer for peer in peers if not peer.seed],
            salt=base_digest,
            contributor_dialable=contributor in addresses,
        )
        found = [self._make_source(peer, addresses[peer]) for peer in order.peers if self._make_source]
        return Wanted(
            blob_hash=entry.payload_hash,
            size_bytes=entry.payload_bytes,
            sources=[*(source for source in found if source is not None), link],
            pieces_hash=entry.pieces_hash,
            parallel=order.parallel,
        )

    @staticmethod
    def _checkpoint_size(link: CoordinatorLink) -> int:
        return state_bytes_size(link.genesis.num_parameters, _has_momentum(link.genesis, link.welcome.checkpoint_round))

    async def _fetch_state(self, link: CoordinatorLink, digest: str, round_: int) -> State:
        genesis = link.genesis
        has_momentum = _has_momentum(genesis, round_)
        size = self._checkpoint_size(link)
        log.info("fetching the state", round=round_, megabytes=round(size / 1e6, 1))
        peers = [self._make_source(s.peer, s.addresses) for s in link.welcome.state_sources if self._make_source]
        sources = [*(source for source in peers if source is not None), link]
        await fetch_blob(self._store, digest, size, sources, throttle=self._downloads, on_failure=_log_failure)
        data = await asyncio.to_thread(self._store.read, digest)
        return State.from_bytes(data, round_, genesis.num_parameters, has_momentum)


def _payloads(manifest: Manifest) -> Sequence[Accepted | GroupPayload]:
    """What is merged: the contributions, or what stands for groups of them."""
    return manifest.groups or manifest.contributions


def _has_momentum(genesis: Genesis, round_: int) -> bool:
    return genesis.spec.outer.momentum > 0.0 and round_ > 0


def _merge(state: State, manifest: Manifest, store: BlobStore) -> State:
    merged = apply_manifest(state, manifest, store.read)
    _ = merged.digest  # computed here, in the thread
    return merged


def _log_failure(source: Source, reason: str) -> None:
    log.warning("a source failed", source=source.name, reason=reason)
