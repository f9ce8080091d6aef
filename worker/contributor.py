"""From a lease to a contribution: fetch its shards, run its inner steps, encode what came of it, sign a header.

Error feedback lives here: a lease begins at θ - e/4 (protocol.error_feedback), e takes in every pseudo-gradient, and
gives up what was sent only when a manifest lists it (`settle`). Work that came too late, was refused, or was not this
peer's turn is therefore in the next contribution, whose header names its shards again.

Before a lease Muon's momentum is turned towards the merge that led from the state of the last lease to this one's.

With overlap the worker goes on while its contribution is exchanged and merged (`go_on`). From θ it has come to θ - Δ;
it goes on from s = θ - OWN_SHARE Δ, since the others' average is not there yet. When the merge has given θ', the next
lease starts from where the worker stands, moved by θ' - e/4 - s, and its pseudo-gradient counts from θ' - e/4: no step
is lost, and what is agreed on, θ', is the same for all. Between the last step of a lease and the next step there is
little but one copy of the weights; all other passes over vectors are made beside the training (`keep`, `encode`).
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray
from torch import Tensor

from protocol import parameters
from protocol.codecs import codec_of, get_codec
from protocol.codecs.payload import Vector, measure_error
from protocol.documents import Contribution, Genesis, Lease, Manifest, ShardRef, sign
from protocol.error_feedback import KEPT_SHARE, ErrorFeedback
from protocol.errors import DiskFullError, DivergedError, PayloadError, VerificationError
from protocol.exchange.piece_index import has_index, make_piece_index
from protocol.exchange.store import BlobStore
from protocol.identity import Identity
from protocol.replica import State
from protocol.run_spec import AUTO
from protocol.shard_format import decode_shard
from protocol.signing import Signed
from worker.device import set_threads
from worker.link import CoordinatorLink
from worker.optimizers import sum_rates
from worker.saved_lease import HeldLease, LeaseFacts, SavedLease
from worker.saved_work import Pending, SavedWork, Unlisted
from worker.trainer import StepReport, Trainer, TrainResult

log = structlog.get_logger()
SHARD_OVERHEAD_BYTES = 4096
MAX_CARRIED = 4096  # shards; a header has its limit
OWN_SHARE = 0.5  # of a worker's own step, until the merge is there: best of five values (docs/averaging.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a lease came to. Valid until the next one is trained."""

    shards: tuple[ShardRef, ...]  # that a contribution can name; none: there is nothing to contribute now
    inner_steps: int
    mean_loss: float
    compute_s: float
    weights: Vector  # (D,): where the worker has come to


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
        throttle: Callable[[], float] = lambda: 1.0,
        threads: Callable[[], int | None] = lambda: None,
        saved: SavedWork,
        saved_lease: SavedLease,
    ) -> None:
        self.held: HeldLease | None = None  # a lease that a process before this one left in the middle
        self.pending: Pending | None = None
        self.carried: tuple[ShardRef, ...] = ()
        self.compression_error = 0.0  # of the last payload
        self.steps_trained = 0
        self.steps_per_s = 0.0  # of the last lease, by the wall clock
        self.step_tokens = genesis.spec.step_tokens
        self._genesis = genesis
        self._identity = identity
        self._store = store
        self._trainer = trainer
        self._shard_hashes = shard_hashes
        self._throttle = throttle
        self._threads = threads
        self._saved = saved
        self._saved_lease = saved_lease
        self._feedback = ErrorFeedback(genesis.num_parameters)
        self._rows: dict[str, NDArray[np.int64]] = {}  # by hash: the shards of the lease
        self._weights = np.zeros(genesis.num_parameters, np.float32)
        self._displacement = np.zeros(genesis.num_parameters, np.float32)
        self._start: Vector | None = None  # s
        self._is_ahead = False  # the model stands where training ahead has led
        self._base: State | None = None  # of the last lease
        self._merge: Manifest | None = None  # the last one
        self._lead_shards: tuple[ShardRef, ...] = ()
        self._optimizer_state: Mapping[str, Tensor] | None = None  # at the end of a lease, to be saved

    def compute_deadline_s(self, lease: Lease, age_s: float = 0.0) -> float:
        """When a lease that came `age_s` ago must be trained, by the monotonic clock."""
        return time.monotonic() - age_s + lease.deadline_in_s - self._genesis.spec.round.exchange_s

    async def fetch(self, lease: Lease, link: CoordinatorLink) -> None:
        """Have a lease's shards at hand. Raises ManyhandsError when they are not to be had."""
        hashes = [self._shard_hashes[shard.index] for shard in (*lease.shards, *lease.ahead)]
        most = SHARD_OVERHEAD_BYTES + 8 * self._genesis.spec.shard_tokens
        await link.fetch_small_blobs(hashes, self._store, most)
        rows = await asyncio.to_thread(
            lambda: {hash_: decode_shard(self._store.read(hash_), self._genesis.vocabulary_size) for hash_ in hashes}
        )
        self._rows = rows

    async def train(
        self,
        lease: Lease,
        state: State,
        *,
        held: HeldLease | None = None,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> Trained:
        """Do the inner steps of a lease whose shards were fetched. `should_stop` is asked between them.

        held: the same lease in the middle, to go on with.
        """
        self._keep_unlisted()
        return await asyncio.to_thread(self._train, lease, state, held, should_stop, on_step)

    async def keep(self, lease: Lease, state: State, trained: Trained) -> Vector:
        """Take what was trained into the error feedback e; returns e, float32 (D,), valid until the next time.

        Raises DivergedError, and keeps nothing, when it is not finite.
        """
        return await asyncio.to_thread(self._keep, state, trained, is_ahead=bool(lease.ahead))

    async def encode(self, lease: Lease, trained: Trained, residual: Vector) -> tuple[Contribution, Signed]:
        """The signed header of a contribution, its payload being in the store."""
        return await asyncio.to_thread(self._encode, lease, trained, residual)

    async def go_on(
        self,
        lease: Lease,
        state: State,
        *,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> None:
        """Train on the lease's `ahead` until told to stop, beside `keep`. The next lease goes on from there."""
        await asyncio.to_thread(self._go_on, lease, state, should_stop, on_step)

    async def save(self, round_: int, *, at_end: bool = False, is_ahead: bool = False) -> None:
        """Keep what no manifest before `round_` has listed over a restart. A disk that is full is told, not raised.

        is_ahead: training goes on, and the optimizer's state is kept as it was at the lease's end.
        """
        state, self._optimizer_state = self._optimizer_state, None
        if is_ahead and state is not None:
            await asyncio.to_thread(self._save, round_, state)
        elif at_end or (not is_ahead and self._saved.is_due):
            await asyncio.to_thread(self._save, round_, self._trainer.optimizer.state())

    def restore(self) -> int | None:
        """Take up what a process before this one saved: the round that it was saved for, None when there is nothing."""
        held = self._saved_lease.load()
        if held is not None and held.displacement.shape == self._displacement.shape:
            self.held = held
        if self._genesis.spec.train.optimizer == AUTO:
            self._trainer.use_optimizer(self._saved.optimizer_name or self._trainer.optimizer_name)
        try:
            found = self._saved.load(self._trainer.optimizer)
            if found is None:
                return self.held.lease.round if self.held else None
            unlisted, residual = found
            if unlisted.pending is not None and not self._store.has(unlisted.pending.payload_hash):
                raise VerificationError("the payload that was sent last is gone")
            self._feedback.restore(residual)
        except (VerificationError, PayloadError, ValueError) as error:
            log.warning("the work of the last time is not taken up", error=str(error))
            return None
        self.pending, self.carried = unlisted.pending, unlisted.carried
        return unlisted.round

    def contributed(self, round_: int) -> Vector:
        """float32 (D,): what this worker contributed to a round, as decoded. Raises VerificationError for nothing."""
        if self.pending is None or self.pending.round != round_:
            raise VerificationError(f"nothing was contributed to round {round_} here")
        payload = self._store.read(self.pending.payload_hash)
        vector = np.zeros(self._genesis.num_parameters, np.float32)
        codec_of(payload).accumulate(payload, 1.0, vector)
        return vector

    def settle(self, manifest: Manifest) -> bool:
        """Take a manifest into account: True when it lists the pending contribution, which is then done with."""
        self._merge, pending = manifest, self.pending
        if pending and any(entry.payload_hash == pending.payload_hash for entry in manifest.contributions):
            self._feedback.settle(self._store.read(pending.payload_hash))
            self.pending, self.carried = None, ()
            return True
        if any(entry.peer == self._identity.peer_id for entry in manifest.contributions):
            # Of a process before this one, which ended before it was saved: what was saved is older, and was sent.
            self._feedback.forget()
            self.pending, self.carried = None, ()
            if self.held is not None and self.held.lease.round == manifest.round:
                self.held = None
        self._keep_unlisted()
        return False

    def take_held(self, base_digest: str) -> HeldLease | None:
        """The lease of the last time, if it is from this state: it can be gone on with. Else its work is kept.

        Then it is in the error feedback, for the next contribution.
        """
        held, self.held = self.held, None
        if held is None or held.lease.base_digest == base_digest:
            return held
        try:
            self._feedback.compensate(held.displacement, 1.0 - KEPT_SHARE)
        except PayloadError as error:
            log.warning("the lease in hand of the last time is not taken up", error=str(error))
        return None

    def _save(self, round_: int, optimizer_state: Mapping[str, Tensor]) -> None:
        unlisted = Unlisted(round=round_, pending=self.pending, carried=self.carried)
        try:
            self._saved.save(unlisted, self._feedback.state(), optimizer_state)
            self._saved_lease.drop()  # what it held is in the other file now
        except DiskFullError as error:
            log.warning("the work so far cannot be saved", error=str(error))

    def _keep_unlisted(self) -> None:
        """The last contribution was in no manifest (late, refused, or a void round): its shards go with the next."""
        if self.pending is not None:
            self.carried, self.pending = self.pending.shards[:MAX_CARRIED], None

    def _train(
        self,
        lease: Lease,
        state: State,
        held: HeldLease | None,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> Trained:
        if lease.optimizer is not None:
            self._trainer.use_optimizer(lease.optimizer)
        self._turn_momentum(state)
        lead_shards = self._stand(state, held)
        received_unix_s = held.facts.received_unix_s if held else time.time()

        def note_step(step: StepReport) -> None:
            if self._saved_lease.is_due(step.inner_step, step.num_inner_steps):
                facts = LeaseFacts(
                    lease=lease,
                    received_unix_s=received_unix_s,
                    steps_done=step.inner_step,
                    lead_shards=lead_shards,
                )
                self._save_lease(facts, state)
            on_step(step)

        steps_done = held.facts.steps_done if held else 0
        result = self._run(lease, should_stop, note_step, steps_done=steps_done)
        weights = parameters.flatten(self._trainer.model, into=self._weights)
        if lease.ahead and self._saved.is_due:  # its steps go on before this can be written
            self._optimizer_state = self._trainer.optimizer.state(copy=True)
        self.steps_per_s = result.steps_per_s
        # each once: what was refused went back to the pool, and may have been leased to this worker again
        shards = tuple(dict.fromkeys((*lease.shards[: result.shards_done], *lead_shards, *self.carried)))
        if not lease.contribute or result.shards_done == 0:
            self.carried, shards = shards[:MAX_CARRIED], ()
        return Trained(
            shards=shards,
            inner_steps=result.inner_steps,
            mean_loss=result.mean_loss,
            compute_s=result.compute_s,
            weights=weights,
        )

    def _stand(self, state: State, held: HeldLease | None) -> tuple[ShardRef, ...]:
        """Put the model where the lease begins; returns the shards that were trained before it came."""
        lead_shards, self._lead_shards = self._lead_shards, ()
        if held is not None:
            lead_shards = held.facts.lead_shards
            parameters.assign(self._trainer.model, state.theta - held.displacement)
        elif self._is_ahead and self._start is not None:
            self._feedback.start(state.theta, out=self._displacement)
            self._displacement -= self._start
            parameters.shift(self._trainer.model, self._displacement)
        else:
            parameters.assign(self._trainer.model, self._feedback.start(state.theta, out=self._displacement))
        self._is_ahead, self._start = False, None
        return lead_shards

    def _turn_momentum(self, state: State) -> None:
        """Turn the inner optimizer's momentum towards the merge that made `state` of what was trained from last."""
        if self._trainer.optimizer_name != "muon":
            return  # nothing to turn, and no older state to hold
        base, self._base = self._base, state
        merge = self._merge
        if base is None or merge is None or not merge.contributions:
            return
        if merge.base_digest == base.digest and state.round == base.round + 1:
            np.subtract(base.theta, state.theta, out=self._displacement)
            tokens = [entry.tokens for entry in merge.contributions]
            rate_sum = sum_rates(tokens, merge.tokens_after, self._genesis.spec, merge.learning_rate)
            self._trainer.optimizer.turn_momentum(self._displacement, rate_sum)

    def _save_lease(self, facts: LeaseFacts, state: State) -> None:
        weights = parameters.flatten(self._trainer.model, into=self._weights)
        np.subtract(state.theta, weights, out=self._displacement)
        try:
            self._saved_lease.save(HeldLease(facts, self._displacement))
            self._saved.save_optimizer(self._trainer.optimizer)
        except DiskFullError as error:
            log.warning("the lease so far cannot be saved", error=str(error))

    def _keep(self, state: State, trained: Trained, *, is_ahead: bool) -> Vector:
        np.subtract(state.theta, trained.weights, out=self._displacement)
        try:
            decay = self._genesis.spec.exchange.error_feedback_decay - KEPT_SHARE
            residual = self._feedback.compensate(self._displacement, decay)
        except PayloadError as error:
            raise DivergedError("the lease gave no finite result; lower train.learning_rate") from error
        if is_ahead:
            self._displacement *= np.float32(-OWN_SHARE)
            self._displacement += state.theta
            self._start, self._displacement = self._displacement, self._weights
            self._weights = np.empty_like(self._start)
        return residual

    def _go_on(
        self, lease: Lease, state: State, should_stop: Callable[[], bool], on_step: Callable[[StepReport], None]
    ) -> None:
        parameters.move_towards(self._trainer.model, state.theta, 1.0 - OWN_SHARE)
        result = self._run(lease, should_stop, on_step, is_ahead=True)
        self._is_ahead, self._lead_shards = True, lease.ahead[: result.shards_done]

    def _run(
        self,
        lease: Lease,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
        *,
        is_ahead: bool = False,
        steps_done: int = 0,
    ) -> TrainResult:
        """The lease's own shards, or those to go on with, at the learning rate of the round's end."""
        refs = lease.ahead if is_ahead else lease.shards
        set_threads(self._threads())  # of this very thread
        result = self._trainer.train(
            [self._rows[self._shard_hashes[ref.index]] for ref in refs],
            tokens_before=lease.tokens_before + (lease.round_tokens if is_ahead else 0),
            round_tokens=0 if is_ahead else lease.round_tokens,
            lease_tokens=len(refs) * self._genesis.spec.shard_tokens,
            highest_rate=lease.learning_rate,
            should_stop=should_stop,
            on_step=on_step,
            throttle=self._throttle(),
            steps_done=steps_done,
        )
        self.steps_trained += result.inner_steps - steps_done
        return result

    def _encode(self, lease: Lease, trained: Trained, residual: Vector) -> tuple[Contribution, Signed]:
        codec = get_codec(lease.codec, lease.codec_options)
        payload = codec.encode(residual)
        self.compression_error = measure_error(codec, payload, residual)
        header = Contribution(
            run_id=self._genesis.run_id,
            peer=self._identity.peer_id,
            round=lease.round,
            lease_id=lease.lease_id,
            base_digest=lease.base_digest,
            shards=trained.shards,
            inner_steps=trained.inner_steps,
            tokens=len(trained.shards) * self._genesis.spec.shard_tokens,
            mean_loss=trained.mean_loss,
            compute_s=trained.compute_s,
            codec=codec.name,
            payload_hash=self._store.put(payload),
            payload_bytes=len(payload),
            pieces_hash=self._store.put(make_piece_index(payload)) if has_index(len(payload)) else None,
        )
        self.pending = Pending(round=lease.round, payload_hash=header.payload_hash, shards=trained.shards)
        return header, sign(header, self._identity)
