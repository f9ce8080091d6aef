"""worker.trainer, worker.optimizers and worker.tasks: inner steps that do what a lease says."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protocol import parameters
from protocol.errors import ConfigError, DeviceMemoryError, DivergedError, VerificationError
from protocol.run_spec import RunSpec
from worker.optimizers import OPTIMIZERS, InnerOptimizer, learning_rate_at
from worker.preparation import measure_speed
from worker.tasks.causal_lm import CausalLM
from worker.trainer import LeaseResult, StepReport, Trainer

VOCABULARY = 17
CPU = torch.device("cpu")
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2}
Rows = NDArray[np.int64]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_spec(*, shard_steps: int = 2, architecture: str = "llama", model: Any = None, **train: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": {"architecture": architecture, "config": LLAMA if model is None else model},
            "data": {"sequence_length": 16, "shard_steps": shard_steps},
            "train": {"tokens": 10_000, "batch_sequences": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0} | train,
        }
    )


def make_trainer(spec: RunSpec | None = None, **options: Any) -> Trainer:
    return Trainer(spec or make_spec(), VOCABULARY, CPU, **options)


def make_shards(spec: RunSpec, count: int, seed: int = 0) -> list[Rows]:
    """Rows that count upwards from a random token: easy to learn."""
    shape = (count, spec.data.shard_steps * spec.train.batch_sequences, 1)
    starts = np.random.default_rng(seed).integers(VOCABULARY, size=shape)
    return list((starts + np.arange(spec.data.sequence_length + 1)) % VOCABULARY)


def run(
    trainer: Trainer,
    theta: NDArray[np.float32],
    shards: list[Rows],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepReport], None] = lambda report: None,
    throttle: float = 1.0,
) -> LeaseResult:
    tokens = trainer.spec.shard_tokens * len(shards)
    return trainer.run_lease(
        theta,
        shards,
        tokens_before=0,
        round_tokens=tokens,
        lease_tokens=tokens,
        should_stop=should_stop,
        on_step=on_step,
        throttle=throttle,
    )


class Faulty(CausalLM):
    """A task whose loss can be made to fail, as a small device or a bad batch makes it fail."""

    def __init__(self, fits: int = 1 << 30, factor: float = 1.0, error: str = "CUDA out of memory") -> None:
        self.fits, self.factor, self.error = fits, factor, error

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        if len(rows) > self.fits:
            raise torch.OutOfMemoryError(self.error)
        return super().loss(model, rows) * self.factor


def test_loss_falls_when_the_tokens_repeat() -> None:
    trainer = make_trainer()
    theta = parameters.flatten(trainer.model)
    held_out = make_shards(trainer.spec, 1, seed=9)[0]
    before = trainer.evaluate(theta, held_out, batch=3)
    assert before == pytest.approx(math.log(VOCABULARY), abs=0.3)
    reports: list[StepReport] = []
    result = run(trainer, theta, make_shards(trainer.spec, 20), on_step=reports.append)
    assert (result.shards_done, result.inner_steps, result.tokens) == (20, 40, 20 * trainer.spec.shard_tokens)
    assert [report.inner_step for report in reports] == list(range(1, 41))
    assert result.last_loss == reports[-1].loss < result.mean_loss < before
    assert result.pseudo_gradient.dtype == np.float32
    assert trainer.evaluate(theta - result.pseudo_gradient, held_out, batch=3) < 0.5 * before


@pytest.mark.parametrize(("architecture", "model"), [("llama", LLAMA), ("gpt2", GPT2)])  # gpt2 has dropout
def test_pseudo_gradient_is_bitwise_the_same_when_the_lease_is_the_same(architecture: str, model: Any) -> None:
    spec = make_spec(architecture=architecture, model=model)
    shards = make_shards(spec, 2)
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        trainer = make_trainer(spec)
        results.append(run(trainer, parameters.flatten(trainer.model), shards).pseudo_gradient.tobytes())
    assert results[0] == results[1]


def test_gradient_is_that_of_one_batch_when_it_is_accumulated() -> None:
    spec = make_spec()
    shards = make_shards(spec, 1)
    whole, parts = make_trainer(spec), make_trainer(spec, micro_batch=3)
    theta = parameters.flatten(whole.model)
    one, other = run(whole, theta, shards), run(parts, theta, shards)
    assert other.mean_loss == pytest.approx(one.mean_loss, abs=1e-5)
    np.testing.assert_allclose(other.pseudo_gradient, one.pseudo_gradient, atol=1e-5)


def test_micro_batch_is_halved_until_it_fits_when_memory_runs_out() -> None:
    spec = make_spec()
    shards = make_shards(spec, 1)
    small, large = make_trainer(spec, task=Faulty(fits=1)), make_trainer(spec)
    theta = parameters.flatten(large.model)
    assert run(small, theta, shards).mean_loss == pytest.approx(run(large, theta, shards).mean_loss, abs=1e-5)
    assert small.micro_batch == 1
    with pytest.raises(DeviceMemoryError, match="16 tokens"):
        run(make_trainer(spec, task=Faulty(fits=0)), theta, shards)


def test_only_whole_shards_count_when_it_is_stopped_inside_one() -> None:
    trainer = make_trainer(make_spec(shard_steps=3))
    made: list[StepReport] = []
    result = run(
        trainer,
        parameters.flatten(trainer.model),
        make_shards(trainer.spec, 4),
        should_stop=lambda: len(made) == 5,
        on_step=made.append,
    )
    assert (result.shards_done, result.inner_steps, result.tokens) == (1, 5, trainer.spec.shard_tokens)
    assert np.any(result.pseudo_gradient)


def test_nothing_has_changed_when_it_is_stopped_before_the_first_step() -> None:
    trainer = make_trainer()
    theta = parameters.flatten(trainer.model)
    result = run(trainer, theta, make_shards(trainer.spec, 1), should_stop=lambda: True)
    assert (result.shards_done, result.inner_steps, result.tokens, result.steps_per_s) == (0, 0, 0, 0.0)
    assert math.isnan(result.mean_loss)
    assert not np.any(result.pseudo_gradient)


def test_only_the_share_of_the_time_is_computed_when_throttled() -> None:
    trainer = make_trainer()
    result = run(trainer, parameters.flatten(trainer.model), make_shards(trainer.spec, 2), throttle=0.25)
    wall_s = result.inner_steps / result.steps_per_s
    assert result.compute_s <= 0.26 * wall_s


def test_lease_is_given_up_when_no_step_is_finite() -> None:
    trainer = make_trainer(task=Faulty(factor=math.nan))
    theta = parameters.flatten(trainer.model)
    reports: list[StepReport] = []
    with pytest.raises(DivergedError, match="3 steps in a row"):
        run(trainer, theta, make_shards(trainer.spec, 5), on_step=reports.append)
    assert [report.skipped for report in reports] == [True, True]
    assert parameters.flatten(trainer.model).tobytes() == theta.tobytes()
    with pytest.raises(DivergedError):
        run(trainer, theta, make_shards(trainer.spec, 1))


def test_lease_goes_on_when_bad_steps_are_not_in_a_row() -> None:
    task = Faulty()
    trainer = make_trainer(task=task)
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        task.factor = math.inf if report.inner_step % 3 else 1.0  # the first of each three steps is sound

    result = run(trainer, parameters.flatten(trainer.model), make_shards(trainer.spec, 4), on_step=on_step)
    assert [report.skipped for report in reports] == [False, True, True, False, True, True, False, True]
    assert (result.inner_steps, result.shards_done) == (8, 4)
    assert np.isfinite(result.mean_loss)


def test_shard_is_refused_when_it_has_another_shape() -> None:
    trainer = make_trainer()
    with pytest.raises(VerificationError, match="shape"):
        run(trainer, parameters.flatten(trainer.model), [np.zeros((8, 16), np.int64)])


def test_training_goes_on_bitwise_when_the_optimizer_was_saved_and_loaded(tmp_path: Path) -> None:
    spec = make_spec()
    first = make_trainer(spec)
    theta = parameters.flatten(first.model)
    run(first, theta, make_shards(spec, 2))
    first.optimizer.save(tmp_path / "state" / "optimizer.safetensors")
    second = make_trainer(spec)
    fresh = run(second, theta, make_shards(spec, 1, seed=5)).pseudo_gradient
    second.optimizer.load(tmp_path / "state" / "optimizer.safetensors")
    on = [run(trainer, theta, make_shards(spec, 1, seed=5)).pseudo_gradient.tobytes() for trainer in (first, second)]
    assert on[0] == on[1] != fresh.tobytes()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["optimizer.safetensors"]


def test_saved_optimizer_is_refused_when_it_is_of_another_model_or_damaged(tmp_path: Path) -> None:
    other = make_trainer(make_spec(model=LLAMA | {"intermediate_size": 32}))
    run(other, parameters.flatten(other.model), make_shards(other.spec, 1))
    other.optimizer.save(tmp_path / "other")
    trainer = make_trainer()
    with pytest.raises(VerificationError, match="another model"):
        trainer.optimizer.load(tmp_path / "other")
    (tmp_path / "damaged").write_bytes(b"\x80\x04pickle?")
    with pytest.raises(VerificationError, match="not a safetensors file"):
        trainer.optimizer.load(tmp_path / "damaged")


def test_benchmark_leaves_parameters_and_optimizer_as_they_were(tmp_path: Path) -> None:
    spec = make_spec()
    trainer = make_trainer(spec)
    run(trainer, parameters.flatten(trainer.model), make_shards(spec, 1))
    before = parameters.flatten(trainer.model).tobytes()
    trainer.optimizer.save(tmp_path / "before")
    speed = measure_speed(trainer, 0.0)
    assert speed.steps_per_s > 0.0
    assert 0.0 < speed.optimizer_share < 1.0
    trainer.optimizer.save(tmp_path / "after")
    assert parameters.flatten(trainer.model).tobytes() == before
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_muon_learns_and_survives_a_restart(tmp_path: Path) -> None:
    spec, adamw = make_spec(optimizer="muon"), make_spec(optimizer="adamw")
    trainer = make_trainer(spec)
    theta = parameters.flatten(trainer.model)
    result = run(trainer, theta, make_shards(spec, 10))
    assert result.last_loss < result.mean_loss
    trainer.optimizer.save(tmp_path / "muon")
    with pytest.raises(VerificationError, match="another optimizer"):
        make_trainer(adamw).optimizer.load(tmp_path / "muon")
    again = make_trainer(spec)
    again.optimizer.load(tmp_path / "muon")
    one, other = (run(each, theta, make_shards(spec, 1, seed=3)) for each in (trainer, again))
    assert one.pseudo_gradient.tobytes() == other.pseudo_gradient.tobytes()


def test_norms_are_not_decayed_and_matrices_are() -> None:
    spec = make_spec(weight_decay=0.5)
    model = CausalLM().build_model(spec, VOCABULARY, seed=0)
    optimizer: InnerOptimizer = OPTIMIZERS["adamw"](model, spec.train)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if parameter.ndim > 1 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_learning_rate_rises_falls_and_stays() -> None:
    spec = make_spec(tokens=1000, learning_rate=1.0, warmup_fraction=0.1, final_learning_rate_fraction=0.2)
    rates = [learning_rate_at(tokens, spec) for tokens in (0, 50, 100, 550, 1000, 9999)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2, 0.2])
    assert learning_rate_at(0, make_spec(warmup_fraction=0.0, learning_rate=1.0)) == 1.0
    assert learning_rate_at(10_000, make_spec(warmup_fraction=1.0, learning_rate=1.0)) == pytest.approx(0.1)


def test_learning_rate_is_the_leases_when_it_names_one() -> None:
    spec = make_spec(tokens=1000, learning_rate=1.0, warmup_fraction=0.1)
    auto = make_spec(tokens=1000, learning_rate="auto", warmup_fraction=0.1)
    assert learning_rate_at(100, auto, 0.5) == learning_rate_at(100, spec, 0.5) == 0.5
    assert learning_rate_at(50, spec, None) == 0.5
    with pytest.raises(VerificationError, match="names none"):
        learning_rate_at(100, auto)


def test_learning_rate_follows_the_whole_runs_tokens_when_the_lease_is_a_part() -> None:
    spec = make_spec(shard_steps=1, tokens=10_000)
    trainer = make_trainer(spec)
    rates: list[float] = []
    trainer.run_lease(
        parameters.flatten(trainer.model),
        make_shards(spec, 2),
        tokens_before=5_000,
        round_tokens=2_000,
        lease_tokens=2 * spec.shard_tokens,
        should_stop=lambda: False,
        on_step=lambda report: rates.append(report.learning_rate),
    )
    assert rates == [learning_rate_at(5_500, spec), learning_rate_at(6_500, spec)]


def test_evaluation_does_not_depend_on_the_batch_and_has_no_dropout() -> None:
    trainer = make_trainer(make_spec(architecture="gpt2", model=GPT2))
    rows = make_shards(trainer.spec, 1)[0]
    losses = [trainer.evaluate(None, rows, batch) for batch in (1, 3, 8)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert trainer.evaluate(None, rows, 3) == losses[1]


def test_weights_depend_on_the_seed_alone() -> None:
    task, spec = CausalLM(), make_spec()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, same, other = (parameters.flatten(task.build_model(spec, VOCABULARY, seed)) for seed in (1, 1, 2))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert torch.equal(torch.rand(2), expected)


def test_model_is_the_same_when_another_machine_builds_it_from_the_config() -> None:
    task, spec = CausalLM(), make_spec(model=LLAMA | {"tie_word_embeddings": True})
    model = task.build_model(spec, VOCABULARY, seed=1)
    again = task.build_from_config(task.config_json(model), seed=1)
    assert parameters.parameter_layout(again) == parameters.parameter_layout(model)
    assert parameters.flatten(again).tobytes() == parameters.flatten(model).tobytes()
    assert task.config_json(again) == task.config_json(model)
    for bad in (b"{", b"[]", b"{}", b'{"model_type": "llama", "auto_map": {}}', b'{"model_type": "nothing"}'):
        with pytest.raises(VerificationError, match="model config"):
            task.build_from_config(bad, seed=0)


@pytest.mark.parametrize(
    ("architecture", "model", "message"),
    [
        ("lama", LLAMA, r"model\.architecture: `lama` .*`llama`"),
        ("bert_of_mine", LLAMA, r"model\.architecture"),
        ("gemma3", LLAMA, "`gemma3_text`"),
        ("llama", LLAMA | {"hiden_size": 32}, r"model\.config\.hiden_size .*`hidden_size`"),
        ("llama", LLAMA | {"zzz": 1}, r"model\.config\.zzz is not a field of llama; remove it"),
        ("llama", LLAMA | {"vocab_size": 5}, "vocab_size is set by the run"),
        ("llama", LLAMA | {"hidden_size": 31}, "multiple"),
        ("llama", LLAMA | {"hidden_size": "wide"}, "expected int"),
        ("llama", LLAMA | {"hidden_act": "swish_of_mine"}, "swish_of_mine"),
    ],
)
def test_error_is_one_line_that_names_the_place_when_the_model_is_wrong(
    architecture: str, model: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_trainer(make_spec(architecture=architecture, model=model))
    assert "\n" not in str(caught.value)


def test_positions_reach_the_sequence_length_when_the_config_has_too_few() -> None:
    spec = make_spec(architecture="gpt2", model=GPT2 | {"n_positions": 8})
    model: Any = CausalLM().build_model(spec, VOCABULARY, seed=0)
    assert model.config.n_positions == 16


@pytest.mark.parametrize(("architecture", "model"), [("llama", LLAMA), ("bert", LLAMA)])
def test_model_does_not_look_ahead(architecture: str, model: Any) -> None:
    built = CausalLM().build_model(make_spec(architecture=architecture, model=model), VOCABULARY, seed=0).eval()
    rows = torch.arange(16)[None] % VOCABULARY
    changed = rows.clone()
    changed[0, -1] = 3
    with torch.no_grad():
        assert torch.equal(built(rows).logits[0, :-1], built(changed).logits[0, :-1])
