"""torch.compile is taken where it works and pays, and is never a reason to fail."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from protocol import parameters
from protocol.run_spec import RunSpec
from worker import compiling
from worker.compiling import Trial, choose_loss, find_obstacle, try_compiling
from worker.governor.preferences import CompileMode
from worker.trainer import Trainer

CPU = torch.device("cpu")
MODEL, BATCH = nn.Linear(8, 4), torch.ones(3, 8)


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    value: Tensor = torch.nn.functional.gelu(model(rows)).square().mean()
    return value


def choose(mode: CompileMode, lease_passes: int) -> Any:
    return choose_loss(mode, loss, MODEL, BATCH, CPU, None, lease_passes)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiling works, takes 10 s and saves 0.1 s a pass; no lease is too short to try."""
    monkeypatch.setattr(compiling, "find_obstacle", lambda _: "")
    monkeypatch.setattr(compiling, "TRIED_FROM_S", 0.0)
    found = Trial(compiled=loss, compile_s=10.0, plain_s=0.3, compiled_s=0.2)
    monkeypatch.setattr(compiling, "try_compiling", lambda *_: found)


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize(
    ("mode", "lease_passes", "taken"),
    [("auto", 101, True), ("auto", 99, False), ("on", 1, True), ("off", 1000, False)],
)
def test_compiled_loss_is_taken_when_a_lease_pays_for_it(mode: CompileMode, lease_passes: int, taken: bool) -> None:
    assert (choose(mode, lease_passes) is not None) == taken


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_plain_loss_is_kept_when_compiling_fails(mode: CompileMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "try_compiling", lambda *_: Trial(problem="InductorError: no"))
    assert choose(mode, 1000) is None


def test_short_lease_is_not_tried_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_obstacle", lambda _: "")
    monkeypatch.setattr(compiling, "try_compiling", lambda *_: pytest.fail("it was tried"))
    assert choose("auto", 3) is None


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.sys, "platform", "linux")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert find_obstacle(CPU) == "there is no C++ compiler (no-such-compiler)"
    monkeypatch.setattr(compiling, "try_compiling", lambda *_: pytest.fail("it was tried"))
    assert choose("on", 1000) is None


def test_failing_compiler_is_a_problem_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("the compiler is gone\nand more")

    monkeypatch.setattr(compiling.torch, "compile", fail)
    trial = try_compiling(loss, MODEL, BATCH, CPU, None)
    assert (trial.compiled, trial.problem) == (None, "OSError: the compiler is gone")


@pytest.mark.timeout(300)
def test_compiled_loss_gives_the_same_gradient() -> None:
    obstacle = find_obstacle(CPU)
    if obstacle:
        pytest.skip(obstacle)
    trial = try_compiling(loss, MODEL, BATCH, CPU, None)
    assert trial.problem == ""
    assert trial.compiled is not None
    assert trial.compile_s > trial.compiled_s
    gradients = []
    for each in (loss, trial.compiled):
        each(MODEL, BATCH).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        assert MODEL.weight.grad is not None
        gradients.append(MODEL.weight.grad.clone())
        MODEL.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_trainer_goes_on_without_a_compiled_loss_that_fails() -> None:
    spec = RunSpec.model_validate(
        {
            "model": {
                "config": {
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                }
            },
            "data": {"sequence_length": 8, "shard_steps": 2},
            "train": {"tokens": 1000, "batch_sequences": 2},
        }
    )
    shard = np.random.default_rng(0).integers(32, size=(4, 9))

    def fail_later(model: nn.Module, rows: Tensor) -> Tensor:
        raise TypeError("the compiled code is gone")

    vectors = []
    for compiled in (None, fail_later):
        trainer = Trainer(spec, 32, CPU)
        trainer.compiled_loss = compiled
        trainer.train(
            [shard],
            tokens_before=0,
            round_tokens=100,
            lease_tokens=100,
            should_stop=lambda: False,
            on_step=lambda _: None,
        )
        assert trainer.compiled_loss is None
        vectors.append(parameters.flatten(trainer.model))
    np.testing.assert_array_equal(vectors[0], vectors[1])
