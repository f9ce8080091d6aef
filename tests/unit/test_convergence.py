"""benchmarks.training and benchmarks.convergence: whole runs of the product's own pieces, in miniature."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import training
from benchmarks.convergence import Arm, Result, change, figures_of, plan_arms, train_arm
from benchmarks.training import Dataset, Link, load_dataset, train_single, train_together
from coordinator.core import machine
from coordinator.core.leases import take_units
from protocol.codecs import get_codec
from protocol.documents import Manifest
from protocol.replica import State, apply_manifest
from protocol.run_spec import RunSpec
from protocol.signing import sha256_hex

WORDS = ["worker", "trains", "lease", "and", "sends", "what", "learned", "the", "peers", "round"]
NUM_STEPS = 60


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """The project's defaults on a tiny model and a text of random known words."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 12_000)))
    model = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return RunSpec.model_validate(
        {
            "model": {"config": model},
            "data": {"source": str(text), "sequence_length": 32},
            "train": {"batch_sequences": 4},
            "round": {"inner_steps": 10},
        }
    )


@pytest.fixture(scope="module")
def data(base: RunSpec) -> Dataset:
    return load_dataset(base)


def of_length(base: RunSpec, num_batches: int, **sections: Any) -> RunSpec:
    return change(base, train={"tokens": num_batches * base.step_tokens}, **sections)


def record_manifests(monkeypatch: pytest.MonkeyPatch) -> list[Manifest]:
    manifests: list[Manifest] = []

    def apply(state: State, manifest: Manifest, read_payload: Callable[[str], bytes]) -> State:
        manifests.append(manifest)
        return apply_manifest(state, manifest, read_payload)

    monkeypatch.setattr(training, "apply_manifest", apply)
    return manifests


def test_three_workers_end_below_one_alone_when_each_makes_as_many_steps(base: RunSpec, data: Dataset) -> None:
    alone = train_single(of_length(base, NUM_STEPS), data, 1)
    together = train_together(of_length(base, 3 * NUM_STEPS), data, (1.0, 1.0, 1.0))
    assert alone.inner_steps == (NUM_STEPS,)
    assert together.inner_steps == (NUM_STEPS,) * 3
    assert together.tokens == 3 * alone.tokens
    assert together.loss < alone.loss - 0.05


@pytest.mark.parametrize("codec", ["int2", "sparse"])
def test_upload_is_the_length_of_the_payloads_when_a_codec_encodes_them(
    base: RunSpec, data: Dataset, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: dict[str, int] = {}

    class Recording:
        """The codec itself, with a note of what it writes."""

        name = codec

        def encode(self, vector: Any) -> bytes:
            payload = get_codec(codec).encode(vector)
            lengths[sha256_hex(payload)] = len(payload)
            return payload

    manifests = record_manifests(monkeypatch)
    monkeypatch.setattr(training, "get_codec", lambda name, options: Recording())
    outcome = train_together(of_length(base, 40, exchange={"codec": codec}), data, (1.0, 1.0))
    accepted = [entry for manifest in manifests for entry in manifest.contributions]
    assert [entry.payload_bytes for entry in accepted] == [lengths[entry.payload_hash] for entry in accepted]
    assert sum(outcome.upload_bytes) == sum(lengths.values()) > 0
    assert {entry.codec for entry in accepted} == {codec}


def test_weights_are_the_tokens_of_each_when_workers_differ_in_speed(
    base: RunSpec, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = record_manifests(monkeypatch)
    outcome = train_together(of_length(base, 96), data, (10.0, 6.0, 3.0))
    first = manifests[0]
    steps = sorted(entry.tokens // base.step_tokens for entry in first.contributions)
    assert steps == [5, 10, 17]  # H = 10 of the median worker
    assert all(entry.weight == entry.tokens for entry in first.contributions)
    assert first.divisor == sum(entry.tokens for entry in first.contributions)
    assert sum(outcome.inner_steps) == 96
    assert outcome.inner_steps[0] > outcome.inner_steps[1] > outcome.inner_steps[2] > 0


def test_one_worker_is_one_optimizer_when_nothing_is_lost_between_rounds(base: RunSpec, data: Dataset) -> None:
    """Rounds, float32 payloads and a merge of one contribution change nothing but the last bits."""
    spec = change(
        base,
        train={"tokens": 20 * base.step_tokens, "optimizer": "adamw"},  # muon's bfloat16 enlarges the last bits
        exchange={"codec": "float32"},
        outer={"optimizer": "average", "learning_rate": 1.0, "momentum": 0.0},
    )
    rounds = train_together(spec, data, (1.0,))
    single = train_single(spec, reordered(data, base), 1)
    assert (rounds.state.round, single.state.round) == (2, 0)
    np.testing.assert_allclose(rounds.state.theta, single.state.theta, atol=1e-4)


def reordered(data: Dataset, spec: RunSpec) -> Dataset:
    """The shards in the order in which the coordinator leases them."""
    pool = machine.create(spec, num_shards=len(data.shards), num_parameters=1, initial_digest="").pool
    order = [index for _, index in take_units(pool, len(data.shards))]
    return Dataset(
        vocabulary_size=data.vocabulary_size,
        shards=tuple(data.shards[index] for index in order),
        held_out=data.held_out,
    )


def test_run_gives_the_same_bits_when_it_is_repeated(base: RunSpec, data: Dataset) -> None:
    digests = {train_together(of_length(base, 40), data, (1.0, 0.5)).state.digest for _ in range(2)}
    assert len(digests) == 1


def test_bytes_shrink_when_the_link_is_thinner_and_the_exchange_is_automatic(base: RunSpec, data: Dataset) -> None:
    spec = of_length(base, 120, exchange={"codec": "auto"}, round={"inner_steps": "auto"})
    links = [Link(upload_bps=bps, download_bps=5 * bps) for bps in (100e6, 5e6, 5e5)]
    outcomes = [train_together(spec, data, (50.0, 50.0), link) for link in links]
    sent = [max(outcome.upload_bytes) for outcome in outcomes]
    assert sent == sorted(sent, reverse=True)
    assert all(outcome.plans[0] == "no link was measured yet" for outcome in outcomes)
    assert "100/500 Mbit/s" in outcomes[0].plans[-1]
    assert "0.5/2.5 Mbit/s" in outcomes[2].plans[-1]


def test_arm_keeps_its_best_setting_when_it_has_a_grid(base: RunSpec, data: Dataset) -> None:
    batches: list[int] = []
    grid = {f"{rate:g}": {"train": {"optimizer": "adamw", "learning_rate": rate}} for rate in (1e-5, 5e-3)}
    arm = Arm(title="synchronous", grid=grid, num_workers=2)
    result = train_arm(arm, base, [data], 20, batches.append)
    assert result.setting == "0.005"
    assert sum(batches) == arm.count_batches(20, 1) == 2 * 20 * 2
    ring = 4 * train_single(of_length(base, 1), data, 1).state.theta.size * 20  # 2 (N - 1) / N = 1 of them, each step
    assert result.upload_bytes == ring


def test_every_setting_of_every_arm_is_a_valid_run(base: RunSpec) -> None:
    for arm in plan_arms(quick=False).values():
        for setting in arm.grid.values():
            change(base, **setting)


def test_gap_is_one_when_together_is_as_good_as_synchronous() -> None:
    losses = dict.fromkeys(plan_arms(quick=True), 2.0) | {"alone": 3.0, "alone_muon": 2.5, "diloco_published": 2.5}
    results = {name: Result(losses=(loss,), setting="", upload_bytes=1.0) for name, loss in losses.items()}
    figures = figures_of(results)
    assert figures["gap_recovered"] == figures["gap_recovered_muon_20"] == 1.0
    assert figures["loss_vs_diloco_fp32"] == 1.0
    assert figures["loss_vs_diloco_fp32_published"] == 0.8
    assert (figures["loss_alone"], figures["loss_auto_20"], figures["loss_synchronous"]) == (3.0, 2.0, 2.0)
