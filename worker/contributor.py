"""From a lease to a contribution: fetch its shards, run its inner steps, encode what came of it, sign a header.

Error feedback lives here: e takes in every pseudo-gradient, and gives up what was sent only when a manifest lists it
(`settle`). Work that came too late, or was refused, is therefore in the next contribution, whose header names its
shards again.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from protocol.codecs import get_codec
from protocol.documents import Contribution, Genesis, Lease, Manifest, ShardRef, sign
from protocol.error_feedback import ErrorFeedback
from protocol.exchange.piece_index import has_index, make_piece_index
from protocol.exchange.store import BlobStore
from protocol.identity import Identity
from protocol.replica import State
from protocol.shard_format import decode_shard
from protocol.signing import Signed
from worker.link import CoordinatorLink
from worker.trainer import LeaseResult, StepReport, Trainer

log = structlog.get_logger()
SHARD_OVERHEAD_BYTES = 4096
MAX_CARRIED = 4096  # shards; a header has its limit


@dataclass(slots=True, kw_only=True)
class Pending:
    """A contribution that no manifest has listed yet."""

    round: int
    payload_hash: str
    shards: tuple[ShardRef, ...]


class Contributor:
    """One worker's work on one run."""

    def __init__(
        self,
        *,
        genesis: Genesis,
        identity: Identity,
        store: BlobStore,
        trainer: Trainer,
        shard_hashes: Sequence[str],
        throttle: float = 1.0,
    ) -> None:
        self.pending: Pending | None = None
        self.carried: tuple[ShardRef, ...] = ()
        self.steps_trained = 0
        self.steps_per_s = 0.0  # of the last lease, by the wall clock
        self.step_tokens = genesis.spec.step_tokens
        self._genesis = genesis
        self._identity = identity
        self._store = store
        self._trainer = trainer
        self._shard_hashes = shard_hashes
        self._throttle = throttle
        self._feedback = ErrorFeedback(genesis.num_parameters)
        self._codec = get_codec(genesis.spec.exchange.codec, genesis.spec.exchange.codec_options)

    async def work(
        self,
        lease: Lease,
        state: State,
        link: CoordinatorLink,
        *,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> tuple[Contribution, Signed] | None:
        """Do a lease and return the signed header, its payload being in the store; None when no shard was finished.

        `should_stop` is asked between inner steps. Whatever was computed is in the error feedback afterwards.
        """
        self._keep_unlisted()
        deadline = time.monotonic() + lease.deadline_in_s - self._genesis.spec.round.exchange_s
        hashes = [self._shard_hashes[shard.index] for shard in lease.shards]
        most = SHARD_OVERHEAD_BYTES + 8 * self._genesis.spec.shard_tokens
        await link.fetch_small_blobs(hashes, self._store, most)
        started = time.monotonic()
        result = await asyncio.to_thread(
            self._train, lease, state, hashes, lambda: should_stop() or time.monotonic() > deadline, on_step
        )
        return await asyncio.to_thread(self._encode, lease, result, time.monotonic() - started)

    def settle(self, manifest: Manifest) -> bool:
        """Take a manifest into account: True when it lists the pending contribution, which is then done with."""
        pending = self.pending
        if pending and any(entry.payload_hash == pending.payload_hash for entry in manifest.contributions):
            self._feedback.settle(self._store.read(pending.payload_hash))
            self.pending, self.carried = None, ()
            return True
        self._keep_unlisted()
        return False

    def _keep_unlisted(self) -> None:
        """The last contribution was in no manifest (late, refused, or a void round): its shards go with the next."""
        if self.pending is not None:
            self.carried, self.pending = self.pending.shards[:MAX_CARRIED], None

    def _train(
        self,
        lease: Lease,
        state: State,
        hashes: Sequence[str],
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> LeaseResult:
        shards = [decode_shard(self._store.read(hash_), self._genesis.vocabulary_size) for hash_ in hashes]
        return self._trainer.run_lease(
            state.theta,
            shards,
            tokens_before=lease.tokens_before,
            round_tokens=lease.round_tokens,
            lease_tokens=len(shards) * self._genesis.spec.shard_tokens,
            should_stop=should_stop,
            on_step=on_step,
            throttle=self._throttle,
        )

    def _encode(self, lease: Lease, result: LeaseResult, compute_s: float) -> tuple[Contribution, Signed] | None:
        residual = self._feedback.compensate(result.pseudo_gradient, self._genesis.spec.exchange.error_feedback_decay)
        self.steps_trained += result.inner_steps
        self.steps_per_s = result.steps_per_s
        shards = (*lease.shards[: result.shards_done], *self.carried)
        if result.shards_done == 0:
            return None
        payload = self._codec.encode(residual)
        header = Contribution(
            run_id=self._genesis.run_id,
            peer=self._identity.peer_id,
            round=lease.round,
            lease_id=lease.lease_id,
            base_digest=lease.base_digest,
            shards=shards,
            inner_steps=result.inner_steps,
            tokens=len(shards) * self._genesis.spec.shard_tokens,
            mean_loss=result.mean_loss,
            compute_s=compute_s,
            codec=self._codec.name,
            payload_hash=self._store.put(payload),
            payload_bytes=len(payload),
            pieces_hash=self._store.put(make_piece_index(payload)) if has_index(len(payload)) else None,
        )
        self.pending = Pending(round=lease.round, payload_hash=header.payload_hash, shards=shards)
        return header, sign(header, self._identity)
