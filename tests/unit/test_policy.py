"""The choice of codec and inner steps: fits the link, prefers what learns, and says why."""

from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codecs import get_codec
from protocol.policy import CHOICES, ExchangePlan, Links, choose_learning_rate, choose_optimizer, plan_exchange


def plan(
    *,
    num_parameters: int = 100_000_000,
    contributors: int = 8,
    up_mbps: float | None = 20.0,
    down_mbps: float | None = 100.0,
    step_s: float = 0.5,
    codec: str = "auto",
    inner_steps: int | None = None,
    progress: float = 0.5,
    run_steps: float = 1e6,
    share: float = 0.05,
    round_s: float | None = None,
    held_steps: int | None = None,
    overlap: bool = False,
) -> ExchangePlan:
    links = Links(
        step_s=step_s,
        upload_bps=up_mbps * 1e6 if up_mbps else None,
        download_bps=down_mbps * 1e6 if down_mbps else None,
    )
    return plan_exchange(
        num_parameters=num_parameters,
        contributors=contributors,
        links=links,
        share=share,
        codec=codec,
        options={},
        inner_steps=inner_steps,
        progress=progress,
        run_steps=run_steps,
        round_s=round_s,
        held_steps=held_steps,
        overlap=overlap,
    )


def bytes_of(chosen: ExchangePlan) -> float:
    return (
        next(c.bytes_per_parameter for c in CHOICES if (c.codec, c.options) == (chosen.codec, chosen.options))
        / chosen.inner_steps
    )


def test_bytes_a_step_shrink_when_the_link_is_thinner() -> None:
    per_step = [bytes_of(plan(up_mbps=mbps, down_mbps=mbps * 5)) for mbps in (1000, 100, 20, 5, 1)]
    assert per_step == sorted(per_step, reverse=True)
    assert per_step[-1] < per_step[0] / 10


def test_rounds_are_short_and_dense_when_the_link_is_no_limit() -> None:
    chosen = plan(num_parameters=400_000, up_mbps=1000.0, down_mbps=1000.0)
    assert chosen.inner_steps == 5
    assert chosen.codec in ("int8", "int4", "int2")


def test_rounds_are_as_short_as_the_link_bears_when_it_is_of_middling_speed() -> None:
    chosen = {mbps: plan(num_parameters=127_424, contributors=4, up_mbps=mbps, step_s=0.02) for mbps in (5.0, 20.0)}
    assert (chosen[20.0].codec, chosen[20.0].inner_steps) == ("sign", 7)
    assert (chosen[5.0].codec, chosen[5.0].inner_steps) == ("sign", 26)


def test_steps_are_no_coarser_than_the_link_asks_for() -> None:
    links = [plan(num_parameters=127_424, contributors=4, up_mbps=mbps, step_s=0.01) for mbps in range(2, 21)]
    steps = [each.inner_steps for each in links if each.codec == "sign"]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 10
    assert all(before <= 1.6 * after for before, after in pairwise(steps))


def test_given_codec_is_kept_when_only_the_steps_are_auto() -> None:
    assert plan(codec="float16").codec == "float16"
    assert plan(codec="sign", inner_steps=7).reason == "as run.toml says"


def test_first_round_is_short_when_nothing_was_measured() -> None:
    chosen = plan(up_mbps=None, down_mbps=None)
    assert (chosen.codec, chosen.inner_steps) == ("int2", 5)


def test_short_run_has_rounds_enough_while_they_are_not_mostly_exchange() -> None:
    long, short, hopeless = (
        plan(num_parameters=127_424, contributors=4, up_mbps=mbps, step_s=0.01, run_steps=run_steps)
        for mbps, run_steps in ((5.0, 1e6), (5.0, 300.0), (0.05, 300.0))
    )
    assert long.inner_steps > 40
    assert (short.codec, short.inner_steps) == ("sign", 15)
    assert short.reason.startswith("a short run: exchange may take 25%: sign, 15 inner steps")
    assert (hopeless.codec, hopeless.inner_steps) == ("sign", 29), "ten rounds at least"
    assert "more than the 25% wanted" in hopeless.reason


def test_run_over_slow_links_makes_fewer_rounds_rather_than_rounds_that_leave_most_out() -> None:
    slow, longer = (
        plan(num_parameters=127_424, contributors=2, up_mbps=1.0, step_s=0.01, run_steps=run_steps)
        for run_steps in (300.0, 100_000.0)
    )
    assert (slow.codec, slow.inner_steps) == ("sign", 29)
    assert longer.codec == "sparse", "with rounds enough it sends every value in time"


def test_more_is_exchanged_at_the_beginning_of_a_run() -> None:
    early, later, end = (plan(progress=progress) for progress in (0.01, 0.1, 0.9))
    assert later == end
    assert 1.8 < bytes_of(early) / bytes_of(later) < 2.5


def test_wide_share_is_not_narrowed_at_the_beginning() -> None:
    early, later = (plan(progress=progress, share=0.9) for progress in (0.01, 0.5))
    assert bytes_of(early) >= bytes_of(later)


def test_overlap_leaves_to_the_exchange_the_steps_that_fit_beside_it() -> None:
    for mbps, run_steps in ((20.0, 1e6), (5.0, 300.0)):
        apart, beside = (
            plan(
                num_parameters=127_424, contributors=4, up_mbps=mbps, step_s=0.01, run_steps=run_steps, overlap=overlap
            )
            for overlap in (False, True)
        )
        fitting = round(127_424 * 0.133 * 8 / (mbps * 1e6) / 0.01)
        assert fitting >= 1
        assert apart.codec == beside.codec
        assert beside.inner_steps + fitting == apart.inner_steps
        assert f"with {fitting} of the steps beside it" in beside.reason
    assert plan(codec="sign", inner_steps=20, overlap=True).inner_steps == 20


def test_overlap_keeps_half_of_the_steps_when_the_exchange_takes_longer_than_they() -> None:
    apart, beside = (
        plan(num_parameters=127_424, contributors=4, up_mbps=0.05, step_s=0.01, run_steps=300.0, overlap=overlap)
        for overlap in (False, True)
    )
    assert beside.inner_steps == apart.inner_steps - apart.inner_steps // 2


@pytest.mark.parametrize("round_s", [None, 123.456])
def test_reason_leaves_room_in_a_manifest_whatever_the_run(round_s: float | None) -> None:
    for num_parameters, contributors, up_mbps in product((10**5, 7 * 10**10), (2, 99_999), (1e-3, 7.77, 1e5)):
        for step_s, run_steps, overlap in product((0.001, 1234.5), (5.0, 300.0, 1e9), (True, False)):
            chosen = plan(
                num_parameters=num_parameters,
                contributors=contributors,
                up_mbps=up_mbps,
                down_mbps=4.7 * up_mbps,
                step_s=step_s,
                run_steps=run_steps,
                round_s=round_s,
                overlap=overlap,
            )
            assert len(f"{chosen.reason}; adamw (muon: 100% of a step), rate 0.0123, 99999 workers") < 300


def test_reason_names_share_and_link() -> None:
    reason = plan().reason
    assert "%" in reason
    assert "20/100 Mbit/s" in reason


@given(
    num_parameters=st.integers(10_000, 10**11),
    contributors=st.integers(1, 32),
    up_mbps=st.floats(0.1, 10_000),
    down_mbps=st.floats(0.1, 10_000),
    step_s=st.floats(0.001, 100),
)
def test_share_is_kept_when_any_setting_can_keep_it(
    num_parameters: int, contributors: int, up_mbps: float, down_mbps: float, step_s: float
) -> None:
    chosen = plan(
        num_parameters=num_parameters,
        contributors=contributors,
        up_mbps=up_mbps,
        down_mbps=down_mbps,
        step_s=step_s,
    )
    get_codec(chosen.codec, dict(chosen.options))  # a codec that exists, with options that it takes
    smallest = min(c.bytes_per_parameter for c in CHOICES) / 500
    assert bytes_of(chosen) == pytest.approx(smallest) or "more than" not in chosen.reason


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: f"{c.codec}{dict(c.options)}")
def test_stated_size_is_the_real_one(choice: object) -> None:
    import numpy as np

    from protocol.policy import Choice

    assert isinstance(choice, Choice)
    vector = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    size = len(get_codec(choice.codec, dict(choice.options)).encode(vector)) / vector.size
    assert size == pytest.approx(choice.bytes_per_parameter, rel=0.03)


# ---- when the operator says how long a round takes


def test_steps_fill_the_time_when_a_round_time_is_given() -> None:
    chosen = plan(codec="int2", inner_steps=20, round_s=120.0, num_parameters=1_000_000)
    assert chosen.inner_steps == pytest.approx(240, abs=2), "half a second a step, and an exchange that takes little"
    assert chosen.round_s == 120.0
    assert chosen.reason.startswith("rounds of 120 s, as the operator wants: int2, ")


def test_exchange_is_part_of_the_time_when_a_round_time_is_given() -> None:
    slow = plan(codec="int8", inner_steps=20, round_s=600.0)  # 101 MB at 20 Mbit/s and seven of them at 100
    assert 600.0 - 0.5 * slow.inner_steps == pytest.approx(56.4, abs=1.0)


def test_smaller_codec_is_chosen_when_the_round_time_is_short() -> None:
    chosen = [plan(round_s=seconds) for seconds in (10.0, 60.0, 600.0, 3600.0)]
    sizes = [bytes_of(each) * each.inner_steps for each in chosen]
    assert sizes == sorted(sizes)
    assert [chosen[0].codec, chosen[-1].codec] == ["sparse", "int8"]


@pytest.mark.parametrize("up_mbps", [None, 20.0])
@pytest.mark.parametrize("codec", ["auto", "int8", "float32"])
@pytest.mark.parametrize("round_s", [1.0, 3600.0])
def test_there_is_at_least_one_step_when_a_round_time_is_given(
    round_s: float, codec: str, up_mbps: float | None
) -> None:
    chosen = plan(codec=codec, round_s=round_s, up_mbps=up_mbps, step_s=1e6)
    assert chosen.inner_steps == 1
    assert ("no link was measured yet" in chosen.reason) == (up_mbps is None)


def test_steps_are_held_when_the_time_gives_nearly_the_same() -> None:
    unmeasured: dict[str, Any] = {"codec": "int2", "up_mbps": None, "down_mbps": None}
    assert plan(**unmeasured, round_s=50.0, held_steps=95).inner_steps == 95
    assert plan(**unmeasured, round_s=50.0, held_steps=85).inner_steps == 100


def test_learning_rate_falls_with_size_and_length_and_rises_with_the_workers_for_some() -> None:
    def rate(optimizer: str = "muon", num_parameters: int = 10**7, run_steps: float = 300, workers: int = 1) -> float:
        return choose_learning_rate(optimizer, num_parameters=num_parameters, run_steps=run_steps, workers=workers)

    assert rate() > rate(run_steps=1_000) > rate(run_steps=10_000) == rate(run_steps=1e9) > 0.0
    assert rate(run_steps=1) == rate(), "a few steps do not make it high"
    assert rate(num_parameters=10**9) < rate() / 5
    assert rate() < rate(workers=2) < rate(workers=4) < rate(workers=8) == rate(workers=1000)
    assert rate("adamw") < rate()
    assert rate(num_parameters=1, workers=1000) < 0.1


@pytest.mark.parametrize(
    ("shares", "held", "name", "why"),
    [
        ([], None, "muon", "muon"),
        ([0.1, 0.2, 0.99], None, "muon", "muon (20% of a step)"),
        ([0.8, 0.9, 0.01], None, "adamw", "adamw (muon: 80% of a step)"),
        ([0.9], "muon", "muon", "muon (90% of a step)"),
        ([0.1], "adamw", "adamw", "adamw (muon: 10% of a step)"),
        ([], "adamw", "adamw", "adamw"),
    ],
)
def test_muon_is_taken_unless_its_update_is_most_of_a_step_at_most_workers(
    shares: list[float], held: str | None, name: str, why: str
) -> None:
    assert choose_optimizer(shares, held) == (name, why)
