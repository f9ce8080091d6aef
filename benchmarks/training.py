"""Whole runs in one process: the product's own pieces, workers one after the other, no sockets, no processes.

`train_together` drives the coordinator's core on a virtual clock, so leases, plans, weights, clip factors and the
schedule are those of a real run; workers train with worker.trainer, keep their error feedback, and encode as their
lease says; the ledger writes signed manifests, and the state moves by `apply_manifest` alone. All replicas being equal,
one stands for all. With a `Link`, payloads take their time on that clock and the core is told of what was measured, so
`exchange.codec` and `round.inner_steps` may be "auto". What it leaves out: transport, turns, overlap, late and failing
peers. `train_single` is what it is compared with: one optimizer on one stream of batches.

Same spec, data and speeds on the same machine with the same number of threads: the same bits.

Shape letters: R sequences in a shard, T tokens a sequence.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import Phase, Unit
from coordinator.ledger import LedgerWriter
from coordinator.shards import cut_shards
from protocol import parameters
from protocol.codecs import codec_of, get_codec
from protocol.documents import Contribution, Manifest, ShardRef, open_signed, sign
from protocol.error_feedback import ErrorFeedback
from protocol.exchange.store import BlobStore
from protocol.identity import Identity
from protocol.replica import State, apply_manifest
from protocol.run_spec import RunSpec
from protocol.shard_format import decode_shard
from protocol.signing import Signed, sha256_hex
from protocol.tokenizer import load_tokenizer
from worker.optimizers import sum_rates
from worker.trainer import LeaseResult, Trainer

Rows = NDArray[np.int64]
RUN_ID = "00000000000000c0"
INVITE_ID = "0000000000000001"
DEVICE = torch.device("cpu")
EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What a run trains on and is evaluated on, in memory: shards int64 (R, T + 1), held-out rows int64 (*, T + 1)."""

    vocabulary_size: int
    shards: tuple[Rows, ...]
    held_out: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A worker's line to everybody else, in bits a second."""

    upload_bps: float
    download_bps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What training came to. loss: held out, in nats a token."""

    loss: float
    tokens: int
    inner_steps: tuple[int, ...]  # of each worker
    upload_bytes: tuple[int, ...]  # of each worker: the lengths of its accepted payloads
    state: State
    plans: tuple[str, ...] = ()  # why codec and H were chosen, whenever they changed


@dataclass(kw_only=True)
class VirtualWorker:
    """One worker: a key, a model with its inner optimizer's state, and what the codec has left out so far."""

    identity: Identity
    trainer: Trainer
    steps_per_s: float  # on the virtual clock
    feedback: ErrorFeedback
    inner_steps: int = 0
    upload_bytes: int = 0


def load_dataset(spec: RunSpec) -> Dataset:
    """Cut `spec.data.source` as a coordinator does, and read the shards back. Raises DataError."""
    tokenizer = load_tokenizer(spec.data.tokenizer)
    size = tokenizer.vocabulary_size
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        plan = cut_shards(spec, tokenizer, store)
        shards = tuple(decode_shard(store.read(hash_), size) for hash_ in plan.shard_hashes)
        return Dataset(vocabulary_size=size, shards=shards, held_out=decode_shard(store.read(plan.held_out_hash), size))


def train_single(
    spec: RunSpec, data: Dataset, batches_per_step: int, on_step: Callable[[], None] = lambda: None
) -> Outcome:
    """One optimizer, no rounds: every inner step takes `batches_per_step` times the spec's batch.

    1 is a worker alone; N is N workers that average their gradients at every step. It trains spec.train.tokens.
    """
    train = spec.train.model_copy(update={"batch_sequences": spec.train.batch_sequences * batches_per_step})
    wide = spec.model_copy(update={"train": train, "data": spec.data.model_copy(update={"shard_steps": 1})})
    num_steps = spec.train.tokens // wide.step_tokens
    rows = np.concatenate(data.shards)
    order = np.arange(num_steps * wide.train.batch_sequences) % len(rows)
    batches = np.split(rows[order], num_steps)
    trainer = Trainer(wide, data.vocabulary_size, DEVICE)
    theta = parameters.flatten(trainer.model)
    tokens = num_steps * wide.step_tokens
    result = trainer.run_lease(
        theta,
        batches,
        tokens_before=0,
        round_tokens=tokens,
        lease_tokens=tokens,
        should_stop=lambda: False,
        on_step=lambda _: on_step(),
    )
    return Outcome(
        loss=trainer.evaluate(None, data.held_out, EVALUATION_BATCH),
        tokens=tokens,
        inner_steps=(num_steps,),
        upload_bytes=(0,),
        state=State(0, theta - result.pseudo_gradient),
    )


def train_together(
    spec: RunSpec,
    data: Dataset,
    speeds: Sequence[float],
    link: Link | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Outcome:
    """A whole run of len(speeds) workers, which make so many inner steps a second on the virtual clock.

    link: of each of them; None: payloads take no time and nothing is measured.
    """
    return _Run(spec, data, speeds, link, on_step).finish()


class _Run:
    """The coordinator's side of a run, on a virtual clock, and its workers."""

    def __init__(
        self, spec: RunSpec, data: Dataset, speeds: Sequence[float], link: Link | None, on_step: Callable[[], None]
    ) -> None:
        # the first round is to open when the last worker has joined, not before
        spec = spec.model_copy(update={"round": spec.round.model_copy(update={"min_peers": len(speeds)})})
        self._spec, self._data, self._link, self._on_step = spec, data, link, on_step
        self._operator = _identity("coordinator")
        self._ledger = LedgerWriter(self._operator, RUN_ID, spec, None)
        self._workers = {worker.identity.peer_id: worker for worker in self._make_workers(speeds)}
        first = next(iter(self._workers.values()))
        self._state = State(0, parameters.flatten(first.trainer.model))
        self._core = machine.create(
            spec,
            num_shards=len(data.shards),
            num_parameters=first.trainer.num_parameters,
            initial_digest=self._state.digest,
        )
        self._payloads: dict[str, bytes] = {}
        self._headers: dict[str, Signed] = {}
        self._plans: list[str] = []
        self._now_s = 0.0

    def finish(self) -> Outcome:
        """Run to the end."""
        granted = self._admit_all()
        while self._core.phase is not Phase.FINISHED:
            granted = self._play_round(granted)
        workers = list(self._workers.values())
        return Outcome(
            loss=workers[0].trainer.evaluate(self._state.theta, self._data.held_out, EVALUATION_BATCH),
            tokens=self._core.tokens_credited,
            inner_steps=tuple(worker.inner_steps for worker in workers),
            upload_bytes=tuple(worker.upload_bytes for worker in workers),
            state=self._state,
            plans=tuple(self._plans),
        )

    def _make_workers(self, speeds: Sequence[float]) -> Iterator[VirtualWorker]:
        for number, steps_per_s in enumerate(speeds):
            trainer = Trainer(self._spec, self._data.vocabulary_size, DEVICE)
            yield VirtualWorker(
                identity=_identity(f"worker {number}"),
                trainer=trainer,
                steps_per_s=steps_per_s,
                feedback=ErrorFeedback(trainer.num_parameters),
            )

    def _handle(self, event: ev.Event) -> list[fx.Effect]:
        return machine.handle(self._core, event, self._now_s)

    def _admit_all(self) -> list[fx.GrantLease]:
        """Join every worker, then let all report the initial state: the first round opens with all of them."""
        self._handle(ev.InviteIssued(token_id=INVITE_ID, uses=len(self._workers)))
        for peer in self._workers:
            self._handle(
                ev.PeerJoined(peer=peer, name=peer[-4:], device="", role="worker", token_id=INVITE_ID, lease_id=None)
            )
        return self._report_all(download_bps=0.0)

    def _report_all(self, download_bps: float) -> list[fx.GrantLease]:
        """Tell the core that every worker holds the state; returns the leases of the round that this opens."""
        effects: list[fx.Effect] = []
        for peer, worker in self._workers.items():
            effects += self._handle(
                ev.StateReported(
                    peer=peer,
                    round=self._state.round,
                    digest=self._state.digest,
                    claimed_steps_per_s=worker.steps_per_s,
                    download_bps=download_bps,
                )
            )
        self._plans += [effect.reason for effect in effects if isinstance(effect, fx.AnnouncePlan)]
        return [effect for effect in effects if isinstance(effect, fx.GrantLease)]

    def _play_round(self, granted: Sequence[fx.GrantLease]) -> list[fx.GrantLease]:
        """Work on the leases, tell the core of each in the order of the clock, merge, and open the next round."""
        events = [event for lease in granted for event in self._work(lease, self._workers[lease.peer])]
        effects: list[fx.Effect] = []
        for self._now_s, event in sorted(events, key=lambda timed: timed[0]):
            effects += self._handle(event)
        for effect in effects:
            if isinstance(effect, fx.CloseRound):
                self._download(effect)
                self._merge(effect)
        return self._report_all(self._link.download_bps if self._link else 0.0)

    def _work(self, lease: fx.GrantLease, worker: VirtualWorker) -> list[tuple[float, ev.Event]]:
        """Train and encode; what the core hears of it, and when."""
        result = self._train(lease, worker)
        residual = worker.feedback.compensate(result.pseudo_gradient, self._spec.exchange.error_feedback_decay)
        payload = get_codec(lease.codec, dict(lease.codec_options)).encode(residual)
        hash_, header = sha256_hex(payload), self._sign_header(lease, worker, result, payload)
        self._payloads[hash_], self._headers[header.hash] = payload, header
        worker.inner_steps += result.inner_steps
        committed = ev.ContributionCommitted(
            peer=lease.peer,
            lease_id=lease.lease_id,
            base_digest=lease.base_digest,
            units=lease.units,
            inner_steps=result.inner_steps,
            tokens=result.tokens,
            mean_loss=result.mean_loss,
            codec=lease.codec,
            contribution_hash=header.hash,
            payload_hash=hash_,
            payload_bytes=len(payload),
        )
        checked = ev.PayloadChecked(
            peer=lease.peer,
            payload_hash=hash_,
            norm=codec_of(payload).inspect(payload, self._state.theta.size).norm,
            upload_bps=self._link.upload_bps if self._link else 0.0,
        )
        trained_s = self._now_s + result.inner_steps / worker.steps_per_s
        upload_s = 8.0 * len(payload) / self._link.upload_bps if self._link else 0.0
        return [(trained_s, committed), (trained_s + upload_s, checked)]

    def _train(self, lease: fx.GrantLease, worker: VirtualWorker) -> LeaseResult:
        theta = self._state.theta
        return worker.trainer.run_lease(
            worker.feedback.start(theta, out=np.empty_like(theta)),
            [self._data.shards[index] for _, index in lease.units],
            tokens_before=lease.tokens_before,
            round_tokens=lease.round_tokens,
            lease_tokens=len(lease.units) * self._spec.shard_tokens,
            should_stop=lambda: False,
            on_step=lambda _: self._on_step(),
        )

    def _sign_header(self, lease: fx.GrantLease, worker: VirtualWorker, result: LeaseResult, payload: bytes) -> Signed:
        header = Contribution(
            run_id=RUN_ID,
            peer=lease.peer,
            round=lease.round,
            lease_id=lease.lease_id,
            base_digest=lease.base_digest,
            shards=_refs(lease.units),
            inner_steps=result.inner_steps,
            tokens=result.tokens,
            mean_loss=result.mean_loss,
            compute_s=result.compute_s,
            codec=lease.codec,
            payload_hash=sha256_hex(payload),
            payload_bytes=len(payload),
        )
        return sign(header, worker.identity)

    def _download(self, closed: fx.CloseRound) -> None:
        """Let the time pass in which every worker fetches the payloads of the others."""
        if self._link is None:
            return
        sizes = {credit.peer: credit.payload_bytes for credit in closed.credits}
        most = max(sum(sizes.values()) - sizes.get(peer, 0) for peer in self._workers)
        self._now_s += 8.0 * most / self._link.download_bps

    def _merge(self, closed: fx.CloseRound) -> None:
        entries = self._ledger.append_round(closed, self._headers, unix_s=self._now_s)
        manifest = open_signed(entries[0].signed, Manifest, signer=self._operator.public_key, run_id=RUN_ID)
        before, self._state = self._state, apply_manifest(self._state, manifest, self._payloads.__getitem__)
        moved = before.theta - self._state.theta
        rate_sum = sum_rates([entry.tokens for entry in manifest.contributions], manifest.tokens_after, self._spec)
        for entry in manifest.contributions:
            worker = self._workers[entry.peer]
            worker.trainer.optimizer.turn_momentum(moved, rate_sum)
            worker.feedback.settle(self._payloads[entry.payload_hash])
            worker.upload_bytes += entry.payload_bytes
        self._payloads.clear()
        self._headers.clear()


def _identity(name: str) -> Identity:
    """A key of that name: leases are given out in the order of peer ids, so random ones would change the result."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


def _refs(units: Sequence[Unit]) -> tuple[ShardRef, ...]:
    return tuple(ShardRef(pass_index=pass_index, index=index) for pass_index, index in units)
