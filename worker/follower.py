"""A replica that follows the run: fetches the state once, then applies every manifest in order.

Used by workers and by the validator. The state only ever moves by `apply_manifest` on verified manifests and payloads
whose hashes hold, so it is bitwise the run's, or an error says why not.
"""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from protocol.documents import Genesis, Manifest
from protocol.errors import VerificationError
from protocol.exchange.fetch import Source, fetch_blob, fetch_blobs
from protocol.exchange.store import BlobStore
from protocol.replica import State, apply_manifest, state_bytes_size
from protocol.wire import coordinator_pb2 as pb
from worker.link import CoordinatorLink

log = structlog.get_logger()
MakeSource = Callable[[str, Sequence[str]], Source | None]  # (peer id, addresses) -> where to try first


class Follower:
    """The state of one run on this machine. `state` is None until `catch_up`."""

    def __init__(
        self,
        store: BlobStore,
        make_source: MakeSource | None = None,
        on_manifest: Callable[[Manifest], object] | None = None,
    ) -> None:
        self.state: State | None = None
        self._store = store
        self._make_source = make_source
        self._on_manifest = on_manifest  # called once for each manifest that is applied, in order

    @property
    def round(self) -> int:
        """Rounds merged; -1 before the first state."""
        return self.state.round if self.state else -1

    def forget(self) -> None:
        """Drop the state: the run's is another."""
        self.state = None

    async def catch_up(self, link: CoordinatorLink) -> State:
        """Bring the state to the newest manifest: from where it stands, or from the run's last checkpoint."""
        checkpoint_round = int(link.welcome.checkpoint_round)
        if self.state is None:
            self.state = await self._fetch_state(link, link.welcome.checkpoint_digest, checkpoint_round)
        async for manifest in link.manifests_from(self.state.round):
            if manifest.round >= self.state.round:
                await self._apply(manifest, {}, link)
        return self.state

    async def apply_notice(self, notice: pb.ManifestNotice, manifest: Manifest, link: CoordinatorLink) -> State:
        """Apply a manifest that was just announced; one that is older than the state is ignored."""
        if self.state is None or manifest.round > self.state.round:
            return await self.catch_up(link)
        if manifest.round == self.state.round:
            sources = {source.payload_hash: (source.peer, tuple(source.addresses)) for source in notice.sources}
            await self._apply(manifest, sources, link)
        return self.state

    async def _apply(
        self, manifest: Manifest, sources: dict[str, tuple[str, tuple[str, ...]]], link: CoordinatorLink
    ) -> None:
        if self.state is None:
            raise VerificationError("there is no state to merge into")
        wanted = [
            (entry.payload_hash, entry.payload_bytes, self._sources_of(entry.payload_hash, sources, link))
            for entry in manifest.contributions
        ]
        await fetch_blobs(self._store, wanted, on_failure=_log_failure)
        self.state = await asyncio.to_thread(_merge, self.state, manifest, self._store)
        if self._on_manifest is not None:
            self._on_manifest(manifest)

    def _sources_of(
        self, payload_hash: str, hints: dict[str, tuple[str, tuple[str, ...]]], link: CoordinatorLink
    ) -> list[Source]:
        """The contributor itself, then the coordinator, which holds every payload."""
        peer, addresses = hints.get(payload_hash, ("", ()))
        source = self._make_source(peer, addresses) if self._make_source and addresses else None
        return [source, link] if source else [link]

    async def _fetch_state(self, link: CoordinatorLink, digest: str, round_: int) -> State:
        genesis: Genesis = link.genesis
        has_momentum = genesis.spec.outer.momentum > 0.0 and round_ > 0
        size = state_bytes_size(genesis.num_parameters, has_momentum)
        log.info("fetching the state", round=round_, megabytes=round(size / 1e6, 1))
        peers = [self._make_source(s.peer, s.addresses) for s in link.welcome.state_sources if self._make_source]
        sources = [*(source for source in peers if source is not None), link]
        await fetch_blob(self._store, digest, size, sources, on_failure=_log_failure)
        data = await asyncio.to_thread(self._store.read, digest)
        return State.from_bytes(data, round_, genesis.num_parameters, has_momentum)


def _merge(state: State, manifest: Manifest, store: BlobStore) -> State:
    merged = apply_manifest(state, manifest, store.read)
    _ = merged.digest  # computed here, in the thread
    return merged


def _log_failure(source: Source, reason: str) -> None:
    log.warning("a source failed", source=source.name, reason=reason)
