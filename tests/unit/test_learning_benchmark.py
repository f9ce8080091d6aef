"""benchmarks.learning: whole runs in virtual time, in miniature, and the figures that are made of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import learning_arms
from benchmarks.learning import draw, figures_of
from benchmarks.learning_arms import (
    RATES,
    SIZES,
    UPLOADS_MBPS,
    Arm,
    Result,
    Trial,
    list_arms,
    make_base,
    run_trial,
    train,
    train_arms,
)
from benchmarks.learning_runs import (
    Fleet,
    KindsApart,
    Outcome,
    Point,
    change,
    join_texts,
    load_problem,
    train_rounds,
    train_single,
    with_spec,
)
from protocol.parameters import count_parameters
from protocol.run_spec import RunSpec
from simulations.learning.backend import make_backend
from simulations.learning.problem import Problem
from tests.unit.test_learning_learner import PEERS, make_work

WORDS = ["worker", "trains", "lease", "and", "sends", "what", "learned", "the", "peers", "round"]
NUM_STEPS = 60
AUTO = {"exchange": {"codec": "auto"}, "round": {"inner_steps": "auto"}}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """The project's defaults on a tiny model and a text of random known words."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 12_000)))
    model = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return load_problem(
        RunSpec.model_validate(
            {
                "model": {"config": model},
                "data": {"source": str(text), "sequence_length": 32, "held_out_max_tokens": 4096},
                "train": {"batch_sequences": 4},
                "round": {"inner_steps": 10},
                "outer": {"optimizer": "average"},
                "checkpoint": {"every_rounds": 1},
            }
        )
    )


def of_length(problem: Problem, num_batches: int, **sections: Any) -> Problem:
    tokens = {"train": {"tokens": num_batches * problem.spec.step_tokens}}
    return with_spec(problem, change(change(problem.spec, **tokens), **sections))


def fleet(*steps_per_s: float, mbps: float = 20.0) -> Fleet:
    return Fleet(steps_per_s=steps_per_s, upload_bps=mbps * 1e6, download_bps=5e6 * mbps)


def test_three_workers_end_below_one_alone_when_each_makes_as_many_steps(problem: Problem) -> None:
    alone = train_single(of_length(problem, NUM_STEPS), 1, 10.0, 1e6)
    nesterov = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.5}
    together = train_rounds(of_length(problem, 3 * NUM_STEPS, outer=nesterov), fleet(10.0, 10.0, 10.0))
    assert together.tokens == 3 * alone.tokens
    assert together.loss < alone.loss - 0.05
    assert together.rounds == NUM_STEPS // 10
    assert alone.sent_bytes == 0
    assert alone.seconds == pytest.approx(NUM_STEPS / 10.0)


def test_synchronous_training_sends_a_ring_of_float32_at_every_step(problem: Problem) -> None:
    num_parameters = sum(parameter.numel() for parameter in problem.build_model().parameters())
    outcome = train_single(of_length(problem, 4 * 10), 4, 10.0, 8e6)
    assert outcome.sent_bytes == 10 * 6 * num_parameters
    assert outcome.seconds == pytest.approx(10 / 10.0 + outcome.sent_bytes / 1e6)


def test_one_optimizer_is_the_same_whether_it_is_evaluated_on_the_way_or_not(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = train_single(of_length(problem, 24), 1, 10.0, 1e6)
    monkeypatch.setattr("benchmarks.learning_runs.CURVE_POINTS", 1)
    once = train_single(of_length(problem, 24), 1, 10.0, 1e6)
    assert (len(often.curve), len(once.curve)) == (12, 1)
    assert once.loss == pytest.approx(often.loss, abs=2e-3)


def test_workers_away_in_turn_train_the_same_tokens(problem: Problem) -> None:
    arm = Arm(title="ours", optimizer="adamw", rounds=AUTO)
    steady, breaks = (train(arm, problem, 5e-3, NUM_STEPS, breaks=breaks) for breaks in (False, True))
    assert steady.tokens == breaks.tokens == 4 * NUM_STEPS * problem.spec.step_tokens
    assert breaks.loss != steady.loss


def test_who_is_away_trains_nothing(problem: Problem) -> None:
    away = replace(fleet(1.0, 1.0), away_s=((0.0, 1e6), (1e6, 2e6)))
    with_absent, alone = (train_rounds(of_length(problem, 40), each) for each in (away, fleet(1.0)))
    assert with_absent.rounds == alone.rounds
    assert with_absent.loss == pytest.approx(alone.loss, abs=1e-6)
    assert with_absent.sent_bytes == alone.sent_bytes / 2


def test_texts_are_joined_and_each_worker_has_shards_of_its_own_kind_once(problem: Problem) -> None:
    other = replace(problem, data=replace(problem.data, shards=problem.data.shards[:9] + 1))
    both = join_texts([problem, other])
    assert len(both.data.shards) == 18
    np.testing.assert_array_equal(both.data.shards[6], problem.data.shards[3])
    np.testing.assert_array_equal(both.data.shards[7], other.data.shards[3])
    learner = KindsApart(both, make_backend("batched", both, device=torch.device("cpu")), 2)
    taken: dict[str, list[int]] = {peer: [] for peer in PEERS}
    for _ in range(2):
        learner.open_round([make_work(learner, peer) for peer in PEERS])
        for peer in PEERS:
            taken[peer] += [index for _, index in learner._works[peer].grant.units]
    assert taken == {"peer-0": [0, 2, 8, 10], "peer-1": [1, 3, 5, 7], "peer-2": [4, 6, 12, 14]}


def test_run_gives_the_same_bits_when_it_is_repeated(problem: Problem) -> None:
    first, second = (train_rounds(of_length(problem, 40), fleet(1.0, 0.5)) for _ in range(2))
    assert first == second


def test_bytes_shrink_when_the_link_is_thinner_and_the_exchange_is_automatic(problem: Problem) -> None:
    outcomes = [train_rounds(of_length(problem, 400, **AUTO), fleet(50.0, 50.0, mbps=mbps)) for mbps in (100, 5, 0.05)]
    sent = [outcome.sent_bytes for outcome in outcomes]
    assert sent == sorted(sent, reverse=True)
    assert sent[-1] < sent[0]
    assert all(outcome.plans[0] == "no link was measured yet" for outcome in outcomes)


def test_steps_take_longer_with_a_larger_model_on_the_same_computer(problem: Problem) -> None:
    wide = change(problem.spec, model={"config": problem.spec.model.config | {"hidden_size": 64}})
    problems = [problem, with_spec(problem, wide)]
    sizes = [count_parameters(each.build_model()) for each in problems]
    arm = Arm(title="alone", optimizer="adamw", num_workers=1)
    seconds = [train(arm, each, 1e-3, 2).seconds for each in problems]
    assert sizes[1] > 1.5 * sizes[0]
    assert seconds[1] / seconds[0] == pytest.approx(sizes[1] / sizes[0])


def test_arm_keeps_its_best_rate(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RATES, "adamw", (1e-5, 5e-3))
    arms = {"alone": Arm(title="alone", optimizer="adamw", num_workers=1)}
    other = change(problem.spec, seed=problem.spec.seed + 1)
    results = train_arms(arms, [problem.spec, other], 20, lambda trials: map(run_trial, trials))
    assert results["alone"].rate == 5e-3
    assert len(set(results["alone"].losses)) == 2


def test_kept_run_is_not_done_again_and_another_rate_is_another_run(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(learning_arms, "_load", lambda _: problem)
    trial = Trial(arm=list_arms(4)["alone_muon"], base=problem.spec, rate=0.01, num_steps=4)
    first = run_trial(trial, tmp_path)
    assert first == run_trial(trial)
    monkeypatch.setattr(learning_arms, "_load", lambda _: pytest.fail("it was trained again"))
    assert run_trial(replace(trial, arm=replace(trial.arm, title="by another name")), tmp_path) == first
    with pytest.raises(pytest.fail.Exception):
        run_trial(replace(trial, rate=0.02), tmp_path)


def test_every_arm_is_a_valid_run() -> None:
    base = make_base(SIZES["0.1M"], "stdlib", 0)
    arms = list_arms(1000)
    assert "diloco_500" in arms
    for arm in arms.values():
        change(base, **(arm.rounds or {}))


def make_results() -> dict[str, Result]:
    more = ("uneven", "breaks", "kinds_mixed", "kinds_apart", "overlap")
    names = [*list_arms(100), *more, *(f"alone_muon_in_time_{mbps}" for mbps in UPLOADS_MBPS)]
    losses = dict.fromkeys(names, 2.0) | {"alone_muon": 3.0, "sync_adamw": 2.5, "diloco": 4.0, "overlap": 2.1}
    return {
        name: Result(
            outcomes=(Outcome(curve=(Point(seconds=1.0, sent_bytes=1e6, loss=loss),), tokens=1),),
            rate=1e-2,
        )
        for name, loss in losses.items()
    }


def test_figures_compare_with_the_references_of_the_same_run() -> None:
    figures = figures_of(make_results())
    assert figures["gap_recovered_muon"] == 1.0
    assert figures["loss_vs_sync_adamw"] == 0.8
    assert figures["loss_vs_diloco"] == 0.5
    assert figures["overlap_cost"] == pytest.approx(0.05)
    assert figures["uneven_cost"] == figures["breaks_cost"] == figures["kinds_cost"] == 0.0


def test_pictures_name_every_arm(tmp_path: Path) -> None:
    arms = list_arms(100)
    draw(tmp_path, arms, make_results())
    for name in ("learning-bytes.svg", "learning-time.svg"):
        picture = (tmp_path / name).read_text()
        assert all(arm.title in picture for arm in arms.values())
