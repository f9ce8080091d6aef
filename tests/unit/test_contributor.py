"""One worker's work on one run, over the end of its process: what was trained is gone on with, or kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from protocol import parameters
from protocol.documents import PROTOCOL_VERSION, Genesis, Lease, ShardRef
from protocol.exchange.store import BlobStore
from protocol.identity import Identity
from protocol.replica import State
from protocol.run_spec import RunSpec
from protocol.shard_format import encode_shard
from worker.contributor import Contributor, Trained
from worker.optimizers import learning_rate_at
from worker.saved_lease import SavedLease
from worker.saved_work import SavedWork
from worker.trainer import StepReport, Trainer

SPEC = RunSpec.model_validate(
    {
        "name": "held",
        "model": {
            "config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            }
        },
        "data": {"source": "text", "sequence_length": 8, "shard_steps": 2},
        "train": {"tokens": 100_000, "batch_sequences": 2, "optimizer": "adamw"},
    }
)
VOCABULARY, NUM_SHARDS = 32, 4
IDENTITY = Identity.generate()
HASH, RUN_ID = "0" * 64, "0" * 16


class Process:
    """What one process of a worker has, in a folder that the next one finds."""

    def __init__(self, folder: Path, spec: RunSpec = SPEC) -> None:
        self.threads = 1
        store = BlobStore(folder / "blobs")
        shape = (SPEC.data.shard_steps * SPEC.train.batch_sequences, SPEC.data.sequence_length + 1)
        rng = np.random.default_rng(0)
        shards = [encode_shard(rng.integers(VOCABULARY, size=shape), VOCABULARY) for _ in range(NUM_SHARDS)]
        hashes = [store.put(shard) for shard in shards]
        trainer = self.trainer = Trainer(spec, VOCABULARY, torch.device("cpu"))
        self.state = State(7, parameters.flatten(trainer.model))
        self.contributor = Contributor(
            genesis=Genesis(
                run_id=RUN_ID,
                seq=0,
                previous=HASH,
                protocol_version=PROTOCOL_VERSION,
                spec=spec,
                created_unix_s=1_800_000_000,
                num_parameters=trainer.num_parameters,
                initial_digest=HASH,
                model_config_hash=HASH,
                tokenizer_hash=None,
                shard_index_hash=HASH,
                held_out_hash=HASH,
                num_shards=NUM_SHARDS,
                vocabulary_size=VOCABULARY,
            ),
            identity=IDENTITY,
            store=store,
            trainer=trainer,
            shard_hashes=hashes,
            threads=lambda: self.threads,
            saved=SavedWork(folder),
            saved_lease=SavedLease(folder, every_steps=3),
        )

    @property
    def lease(self) -> Lease:
        return Lease(
            run_id=RUN_ID,
            lease_id=5,
            peer=IDENTITY.peer_id,
            round=self.state.round,
            base_digest=self.state.digest,
            shards=tuple(ShardRef(pass_index=0, index=index) for index in range(NUM_SHARDS)),
            steps_per_shard=SPEC.data.shard_steps,
            deadline_in_s=60.0,
            tokens_before=0,
            round_tokens=1000,
            codec="float32",
            codec_options={},
        )

    async def train(
        self, lease: Lease | None = None, *, held: Any = None, die_after: int = 0, note: Any = lambda: None
    ) -> Trained:
        """The whole lease, or until the process dies."""
        lease = lease or self.lease

        def on_step(step: StepReport) -> None:
            note()
            if step.inner_step == die_after:
                raise KeyboardInterrupt

        link = cast(Any, SimpleNamespace(fetch_small_blobs=self._has_them))
        await self.contributor.fetch(lease, link)
        return await self.contributor.train(lease, self.state, held=held, should_stop=lambda: False, on_step=on_step)

    async def _has_them(self, *_: Any) -> None: ...


async def test_lease_goes_on_from_where_it_was_saved(tmp_path: Path) -> None:
    whole = await Process(tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        await Process(tmp_path).train(die_after=5)
    process = Process(tmp_path)
    assert process.contributor.restore() == 7
    held = process.contributor.take_held(process.state.digest)
    assert held is not None
    assert held.facts.steps_done == 3
    resumed = await process.train(held=held)
    assert resumed.shards == whole.shards
    assert resumed.inner_steps == whole.inner_steps == 8
    assert process.contributor.steps_trained == 5
    np.testing.assert_allclose(resumed.weights, whole.weights, atol=1e-6)


async def test_work_of_a_round_that_is_over_goes_into_the_error_feedback(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        await Process(tmp_path).train(die_after=5)
    process = Process(tmp_path)
    process.contributor.restore()
    displacement = process.contributor.held.displacement.copy() if process.contributor.held else None
    assert displacement is not None
    assert np.abs(displacement).max() > 0
    assert process.contributor.take_held("f" * 64) is None
    later = Process(tmp_path)
    await process.contributor.save(8, at_end=True)
    later.contributor.restore()
    assert later.contributor.held is None  # it is in the other file now, once
    np.testing.assert_array_equal(later.contributor._feedback.state(), displacement)


async def test_optimizer_comes_back_as_at_the_leases_end_when_training_went_on_ahead(tmp_path: Path) -> None:
    first = Process(tmp_path)
    lease = first.lease.model_copy(update={"shards": first.lease.shards[:2], "ahead": first.lease.shards[2:]})
    trained = await first.train(lease)
    at_the_end = first.trainer.optimizer.state(copy=True)
    await first.contributor.keep(lease, first.state, trained)
    await first.contributor.go_on(lease, first.state, should_stop=lambda: False, on_step=lambda _: None)
    await first.contributor.save(7, is_ahead=True)
    second = Process(tmp_path)  # the first was killed
    assert second.contributor.restore() == 7
    found, gone_on = second.trainer.optimizer.state(), first.trainer.optimizer.state()
    assert found.keys() == at_the_end.keys() != set()
    assert all(torch.equal(found[name], at_the_end[name]) for name in found)
    assert not any(torch.equal(found[name], gone_on[name]) for name in found)


async def test_optimizer_is_the_one_that_the_lease_names_and_comes_back_in_the_next_process(tmp_path: Path) -> None:
    train = SPEC.train.model_copy(update={"optimizer": "auto", "learning_rate": "auto"})
    spec = SPEC.model_copy(update={"train": train})
    first = Process(tmp_path, spec)
    assert first.trainer.optimizer_name == "muon"
    lease = first.lease.model_copy(update={"optimizer": "adamw", "learning_rate": 1e-3})
    plain = await Process(tmp_path / "plain").train(lease)
    np.testing.assert_array_equal((await first.train(lease)).weights, plain.weights)
    await first.contributor.save(8, at_end=True)
    second = Process(tmp_path, spec)
    assert second.contributor.restore() == 8
    assert second.trainer.optimizer_name == "adamw"
    found, kept = second.trainer.optimizer.state(), first.trainer.optimizer.state()
    assert found.keys() == kept.keys() != set()
    assert all(torch.equal(found[name], kept[name]) for name in kept)


async def test_lease_begins_where_part_of_what_was_not_sent_is_kept(tmp_path: Path) -> None:
    process = Process(tmp_path)
    contributor, lease, state = process.contributor, process.lease, process.state
    unsent = np.random.default_rng(1).standard_normal(state.theta.size).astype(np.float32)
    contributor._feedback.restore(unsent)
    await contributor.fetch(lease, cast(Any, SimpleNamespace(fetch_small_blobs=process._has_them)))
    trained = await contributor.train(lease, state, should_stop=lambda: True, on_step=lambda _: None)
    np.testing.assert_allclose(trained.weights, state.theta - 0.4 * unsent, atol=1e-6)
    residual = await contributor.keep(lease, state, trained)
    np.testing.assert_allclose(residual, unsent, atol=1e-6)  # no step was made: nothing is lost or counted twice


async def test_what_was_sent_before_the_crash_is_not_sent_again(tmp_path: Path) -> None:
    first = Process(tmp_path)
    trained = await first.train()
    residual = await first.contributor.keep(first.lease, first.state, trained)
    await first.contributor.save(6, at_end=True)
    header, _ = await first.contributor.encode(first.lease, trained, residual)
    process = Process(tmp_path)
    process.contributor.restore()
    assert process.contributor._feedback.state().any()
    manifest = SimpleNamespace(round=7, contributions=(header,))
    assert not process.contributor.settle(cast(Any, manifest))
    assert not process.contributor._feedback.state().any()


def test_damaged_file_is_told_and_not_used(tmp_path: Path) -> None:
    (tmp_path / "lease.safetensors").write_bytes(b"what is this")
    assert SavedLease(tmp_path).load() is None


async def test_number_of_threads_follows_the_settings_from_lease_to_lease(tmp_path: Path) -> None:
    process, seen = Process(tmp_path), []
    for wanted in (2, 1):
        process.threads = wanted
        await process.train(note=lambda: seen.append(torch.get_num_threads()))
    assert seen == [2] * 8 + [1] * 8


async def test_shard_that_was_refused_and_is_leased_again_is_named_once(tmp_path: Path) -> None:
    # It is carried here and in the lease: the coordinator would refuse a header that names it twice, for ever.
    process = Process(tmp_path)
    again, other = process.lease.shards[2], ShardRef(pass_index=1, index=0)
    process.contributor.carried = (again, other)
    trained = await process.train()
    assert trained.shards == (*process.lease.shards, other)


async def test_momentum_is_turned_towards_the_merge_of_what_was_trained_and_towards_no_other(tmp_path: Path) -> None:
    train = SPEC.train.model_copy(update={"optimizer": "muon"})
    process = Process(tmp_path, SPEC.model_copy(update={"train": train}))
    contributor, first = process.contributor, process.state
    turned: list[tuple[float, float]] = []

    def note(moved: Any, rate_sum: float) -> None:
        turned.append((float(moved.mean()), rate_sum))

    contributor._trainer.optimizer.turn_momentum = note  # type: ignore[method-assign]
    merge = SimpleNamespace(
        round=7,
        base_digest=first.digest,
        contributions=(SimpleNamespace(payload_hash=HASH, peer="another", tokens=800),),
        tokens_after=50_000,
        learning_rate=2 * SPEC.train.learning_rate,
    )
    await process.train()
    contributor.settle(cast(Any, merge))
    process.state = State(8, first.theta - np.float32(0.25))
    await process.train()
    rate = learning_rate_at(50_000 - 400, SPEC, merge.learning_rate)
    assert turned == [(pytest.approx(0.25, rel=1e-5), pytest.approx(800 / SPEC.step_tokens * rate))]
    process.state = State(9, first.theta)  # of a merge that this worker was not told of
    await process.train()
    contributor.settle(cast(Any, SimpleNamespace(**vars(merge) | {"base_digest": process.state.digest})))
    process.state = State(11, first.theta)  # two merges later
    await process.train()
    assert len(turned) == 1
