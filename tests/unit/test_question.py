"""The formula behind docs/every-phone-and-computer.md, and its pictures."""

import xml.etree.ElementTree as ET

import pytest

from simulations.estimate import Assumptions, Means, critical_batch, draw_assumptions, estimate, share_with_memory
from simulations.question_charts import Line, log_lines, show_days, stacked_bars, tornado


@pytest.mark.parametrize("parameters", [1e7, 1e8, 1e9])
def test_limits_add_up_and_more_peers_never_take_much_longer(parameters: float) -> None:
    found = [estimate(peers, parameters) for peers in (1e3, 1e5, 1e7)]
    for one in found:
        assert sum(one.limits) == pytest.approx(one.days)
        assert min(one.limits) >= 0.0
        assert one.penalty <= Means().bearable_nats
    assert found[1].days <= 1.05 * found[0].days
    assert found[2].days <= 1.05 * found[1].days  # sizes of crowds are tried in steps


def test_one_slow_peer_is_bound_by_computing() -> None:
    """Without anybody to exchange with, what is left is 6 operations a parameter and token."""
    means = Means(kinds=1, contributors=16, inner_steps=20)
    one = estimate(120.0, 1e8, means=means)  # about one gaming card online
    assert one.online == pytest.approx(1.0, abs=0.1)
    assert one.limits[0] * 86400 == pytest.approx(6 * 1e8 * 2e9 / 7e12, rel=0.35)


def test_nobody_can_hold_a_model_that_is_too_large() -> None:
    assert estimate(1e4, 1e11).days == float("inf")
    assert share_with_memory("phone", 3e9) == pytest.approx(0.5)
    assert estimate(1e6, 1e9, means=Means(memory_bytes=6.0)).fits > estimate(1e6, 1e9).fits


def test_a_larger_critical_batch_and_faster_links_help() -> None:
    plain = estimate(1e5, 1e8).days
    assert estimate(1e5, 1e8, Assumptions(critical_batch=4.0)).days < plain
    assert estimate(1e5, 1e8, Assumptions(links=3.0)).days < plain
    assert critical_batch(3.07e9) == pytest.approx(6.6e5, rel=0.05)
    assert draw_assumptions(5, {"links": 3.0}, seed=1) == draw_assumptions(5, {"links": 3.0}, seed=1)


def test_pictures_are_svg_with_labelled_axes() -> None:
    never = float("inf")
    pictures = [
        log_lines("a < b", [1e3, 1e4], [Line(name="x & y", values=[2.0, never])], x_label="peers", y_label="days"),
        stacked_bars("parts", ["one"], [[1.0, 3.0]], ["left", "right"], x_label="peers"),
        tornado("ends", ["links"], [(1.0, never)], 2.0, x_label="peers"),
    ]
    for picture in pictures:
        texts = "".join(ET.fromstring(picture).itertext())  # noqa: S314 - our own
        assert "peers" in texts
        assert "prefers-color-scheme: dark" in picture


def test_days_are_shown_as_people_say_them() -> None:
    shown = [show_days(days) for days in (0.01, 0.2, 1.5, 3.0, 2000.0, float("inf"))]
    assert shown == ["14 min", "4.8 h", "36 h", "3.0 d", "2,000 d", "never"]
