"""The cost model of docs/scaling.md: at points that can be worked out by hand, and beside the product's own choice of
who serves whom."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import pytest

from benchmarks.scaling_model import (
    Coder,
    Links,
    Setting,
    Signals,
    allgather,
    best_group_size,
    butterfly,
    coordinator_copies,
    paced_copies,
    spread,
    two_level,
)
from coordinator.sessions import MAX_PAYLOAD_PEERS
from protocol.exchange.order import order_sources

MB = 1e6
SILENT = Signals(base=0, per_named=0, per_contribution=0, per_source=0, per_group=0, per_member=0)


def coder(bytes_per_parameter: float) -> Coder:
    """1 M parameters a second to encode, 10 M to decode, 100 M to check."""
    return Coder(bytes_per_parameter=bytes_per_parameter, encode=1e6, decode=1e7, check=1e8)


def setting(workers: int) -> Setting:
    """10 M parameters: payloads of 2.5 MB, merged groups of 10 MB, dense vectors of 20 MB. Eight MB take 8 s up."""
    return Setting(
        workers=workers,
        parameters=10_000_000,
        coder=coder(0.25),
        group_coder=coder(1.0),
        dense_coder=coder(2.0),
        finish=2e7,
        signals=SILENT,
        links=Links(up_bps=8e6, down_bps=40e6, seed_bps=80e6, coordinator_bps=80e6),
    )


def test_allgather_of_four_costs_what_one_counts_by_hand() -> None:
    cost = allgather(setting(4), 4)
    assert cost.worker_up == pytest.approx(2.5 * MB + 3 * 2.5 * MB)  # pushed, and three copies of one payload each
    assert cost.worker_down == pytest.approx(3 * 2.5 * MB)
    assert cost.coordinator_in == pytest.approx(4 * 2.5 * MB)
    assert cost.coordinator_out == 0
    assert cost.phases_s == pytest.approx({"encode": 10, "push": 2.5, "fetch": 7.5, "merge": 4 + 0.5})


def test_two_groups_of_three_cost_what_one_counts_by_hand() -> None:
    cost = two_level(setting(6), 6, 3)
    gathered, merged = (
        2 * 2 * 2 * 2.5 * MB,
        2 * 4 * 10 * MB,
    )  # two mergers fetch two each; four lack each group's payload
    assert 6 * cost.worker_down == pytest.approx(gathered + merged)
    assert 6 * cost.worker_up == pytest.approx(6 * 2.5 * MB + gathered + 2 * 10 * MB + merged)
    assert cost.coordinator_in == pytest.approx(6 * 2.5 * MB + 2 * 10 * MB)
    assert cost.phases_s["gather"] == pytest.approx(2 * 2.5)  # each payload goes up twice
    assert cost.phases_s["merge groups"] == pytest.approx(3 + 10)
    assert cost.phases_s["push groups"] == pytest.approx(10)


def test_butterfly_of_four_with_two_followers_costs_what_one_counts_by_hand() -> None:
    cost = butterfly(setting(6), 4)
    exchanged = 2 * 3 / 4 * 20 * MB
    assert 6 * cost.worker_down == pytest.approx(4 * exchanged + 2 * 20 * MB)
    assert 6 * cost.worker_up == pytest.approx(4 * exchanged + 20 * MB + 2 * 20 * MB)
    assert cost.coordinator_in == pytest.approx(20 * MB)
    assert cost.phases_s["all-reduce"] == pytest.approx(30 + 20 + 2)


def test_coordinator_is_the_slowest_link_when_it_serves_everybody() -> None:
    cost = allgather(replace(setting(10), unreachable=1.0), 10)
    assert cost.coordinator_out == pytest.approx(10 * 9 * 2.5 * MB)
    assert cost.worker_up == pytest.approx(2.5 * MB)  # to the coordinator, and nobody can ask for more
    assert cost.phases_s["fetch"] == pytest.approx(10 * 9 * 2.5 / 10)


def test_best_group_size_is_not_beaten_by_its_neighbours() -> None:
    base = replace(setting(300), seeds=32)
    best = best_group_size(base, 300)
    assert 2 < best < 150
    assert all(
        two_level(base, 300, best).seconds <= two_level(base, 300, size).seconds for size in (best - 1, best + 1)
    )


# ---- who serves whom, as the product decides it


@dataclass(frozen=True, slots=True, kw_only=True)
class Lot:
    """One round's draw: for each payload who made it, and for each worker whom it asks for it."""

    makers: list[str]
    asked: list[dict[str, str]]


def draw(workers: int, contributors: int, *, seeds: int = 0, unreachable: float = 0.0, lot: int = 0) -> Lot:
    """Everybody asks the first that can be reached, else the coordinator."""
    chance = random.Random(lot)  # noqa: S311 # lots for a test
    names, seed_names = [f"worker{i}" for i in range(workers)], [f"seed{i}" for i in range(seeds)]
    reached = {name for name in names if chance.random() >= unreachable} | set(seed_names)
    named = [] if seeds else chance.sample(names, min(workers, MAX_PAYLOAD_PEERS))
    makers = chance.sample(names, contributors)

    def ask(me: str, maker: str) -> str:
        order = order_sources(f"{lot} {maker}", me=me, contributor=maker, seeds=seed_names, others=named, salt=str(lot))
        return next((peer for peer in order.peers if peer in reached), "coordinator")

    asked = [{me: ask(me, maker) for me in (*names, *seed_names) if me != maker} for maker in makers]
    return Lot(makers=makers, asked=asked)


def count_copies(lot: Lot) -> Counter[str]:
    """How many each sends, and the coordinator."""
    return Counter(source for asked in lot.asked for source in asked.values())


def fetch_copies(lot: Lot, window: int) -> float:
    """The time of a whole fetch, as a flow: that of how many copies over one uplink; a seed's is 50 times as wide.

    Whoever fetches takes its first `window` missing payloads at once, each as far as the one that it asks has it; an
    uplink and a downlink, five times as wide, are shared evenly.
    """
    names = [*lot.asked[0], lot.makers[0]]
    place = {name: index for index, name in enumerate(names)}
    width = np.array([50.0 if name.startswith("seed") else 1.0 for name in names])
    source = np.array([[place[asked.get(name, name)] for asked in lot.asked] for name in names])
    have = np.array([[float(name == maker) for maker in lot.makers] for name in names])
    steps, step = 0, 0.05
    while (missing := have < 1.0 - 1e-9).any():
        there = np.take_along_axis(have, source, axis=0)
        active = missing & (missing.cumsum(axis=1) <= window) & (there > have + 1e-9)
        sent = np.bincount(source[active], minlength=len(names))
        rate = np.minimum(
            (width / np.maximum(sent, 1))[source], (5 * width / np.maximum(active.sum(axis=1), 1))[:, None]
        )
        have = np.where(active, np.minimum(there, have + step * rate), have)
        steps += 1
    return steps * step


@pytest.mark.parametrize(("workers", "contributors"), [(6, 6), (6, 2), (32, 32), (40, 32), (100, 32), (100, 8)])
def test_busiest_worker_sends_as_many_copies_as_predicted(workers: int, contributors: int) -> None:
    counted = fmean(max(count_copies(draw(workers, contributors, lot=lot)).values()) for lot in range(4))
    assert spread(setting(workers), contributors).by_busiest == pytest.approx(counted, rel=0.2)


@pytest.mark.parametrize(("workers", "unreachable"), [(6, 0.3), (32, 0.4), (100, 0.7), (100, 1.0)])
def test_coordinator_sends_as_many_copies_as_predicted(workers: int, unreachable: float) -> None:
    rounds = [count_copies(draw(workers, 2, unreachable=unreachable, lot=lot)) for lot in range(60)]
    counted = fmean(copies["coordinator"] for copies in rounds) / 2
    assert coordinator_copies(workers, min(workers, MAX_PAYLOAD_PEERS), unreachable) == pytest.approx(counted, rel=0.2)


def test_seeds_send_as_many_copies_as_predicted() -> None:
    base = replace(setting(100), seeds=8)
    counted = count_copies(draw(100, 16, seeds=8))
    by_seeds = sum(count for name, count in counted.items() if name.startswith("seed"))
    predicted = spread(replace(base, workers=108), 16)
    assert 16 * 8 * predicted.by_seed == pytest.approx(by_seeds)
    assert 16 * predicted.by_workers == pytest.approx(counted.total() - by_seeds)


@pytest.mark.parametrize(
    ("workers", "contributors", "seeds", "window"),
    [(6, 6, 0, 4), (6, 6, 0, 6), (30, 30, 0, 4), (30, 8, 0, 4), (100, 32, 0, 4), (30, 30, 8, 4), (30, 30, 8, 30)],
)
def test_fetch_takes_as_long_as_predicted(workers: int, contributors: int, seeds: int, window: int) -> None:
    simulated = fmean(fetch_copies(draw(workers, contributors, seeds=seeds, lot=lot), window) for lot in range(2))
    base = replace(setting(workers), seeds=seeds, window=window)
    uplink = paced_copies(base, contributors, spread(base, contributors).by_busiest)
    downlink = (contributors - (contributors == workers)) / 5
    assert max(uplink, downlink) == pytest.approx(simulated, rel=0.2)
