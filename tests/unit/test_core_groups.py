"""Rounds that are merged in groups first: who merges, who must agree, and what happens to a group that fails."""

from typing import Any

import pytest

from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from protocol.signing import sha256_hex
from tests.core_run import CoreRun

WORKERS = ("ann", "bob", "cid", "dot", "eve", "fay")
RIGHT, WRONG = sha256_hex(b"right"), sha256_hex(b"wrong")


def start(**exchange: Any) -> tuple[CoreRun, list[fx.OrderMerge]]:
    """A run whose six workers have contributed to the first round, and whom it asked to merge."""
    run = CoreRun(num_shards=1000, exchange=exchange)
    run.start(*WORKERS)
    for name in WORKERS:
        run.contribute(name, after_s=1.0)
    return run, [effect for effects in run.trace for effect in effects if isinstance(effect, fx.OrderMerge)]


def answer(run: CoreRun, order: fx.OrderMerge, payload_hash: str = RIGHT, blamed: str = "") -> list[fx.OrderMerge]:
    """A merger's answer; returns whom the core asks now."""
    run.send(
        ev.GroupMerged(
            peer=order.peer,
            round=order.round,
            group=order.group,
            attempt=order.attempt,
            payload_hash=payload_hash,
            payload_bytes=10,
            blamed=blamed,
        )
    )
    return run.find(fx.OrderMerge)


def deliver(run: CoreRun) -> None:
    """Every group's payload that is awaited comes, and is right."""
    for check in machine.pending_checks(run.state):
        run.check(check.peer, check.payload_hash)


def of_group(orders: list[fx.OrderMerge], index: int) -> list[fx.OrderMerge]:
    return [order for order in orders if order.group == index]


def test_two_mergers_a_group_are_asked_when_contributions_are_more_than_a_group_takes() -> None:
    run, orders = start(group_size=2)
    assert len(of_group(orders, 0)) == len(of_group(orders, 1)) == len(of_group(orders, 2)) == 2
    dealt = [credit.peer for index in range(3) for credit in of_group(orders, index)[0].contributions]
    assert sorted(dealt) == sorted(WORKERS)
    for order in orders:
        answer(run, order, sha256_hex(f"group {order.group}".encode()))
    assert not run.closed, "the groups' payloads have not come"
    deliver(run)
    (closed,) = run.closed
    assert [group.payload_hash for group in closed.groups] == [sha256_hex(f"group {i}".encode()) for i in range(3)]
    assert sum(group.weight for group in closed.groups) == closed.divisor
    assert all(len(group.mergers) == 2 for group in closed.groups)


def test_no_groups_are_made_when_one_would_hold_everybody() -> None:
    run, orders = start(group_size=6)
    assert not orders
    assert run.closed[0].groups == ()


def test_third_merger_decides_when_two_disagree() -> None:
    run, orders = start(group_size=3)
    for other in of_group(orders, 1):
        answer(run, other, sha256_hex(b"other group"))
    first, second = of_group(orders, 0)
    assert answer(run, first, WRONG) == []
    (third,) = answer(run, second, RIGHT)
    assert third.peer not in (first.peer, second.peer)
    answer(run, third, RIGHT)
    deliver(run)
    group = run.closed[0].groups[0]
    assert group.payload_hash == RIGHT
    assert set(group.mergers) == {second.peer, third.peer}


def test_another_merger_is_asked_when_one_leaves() -> None:
    run, orders = start(group_size=3)
    gone, stays = of_group(orders, 0)
    run.send(ev.PeerLeft(peer=gone.peer, reason="gone"))
    (instead,) = run.find(fx.OrderMerge)
    assert instead.peer not in (gone.peer, stays.peer)


def test_other_merger_pushes_when_the_first_leaves_before_it_has() -> None:
    run, orders = start(group_size=3)
    first, second = of_group(orders, 0)
    answer(run, first)
    answer(run, second)
    (check,) = run.find(fx.CheckPayload)
    run.send(ev.PeerLeft(peer=check.peer, reason="gone"))
    (again,) = [check for check in machine.pending_checks(run.state) if check.payload_hash == RIGHT]
    assert {check.peer, again.peer} == {first.peer, second.peer}


def test_round_closes_without_a_group_when_it_is_not_merged_by_the_deadline() -> None:
    run, orders = start(group_size=3)
    for order in of_group(orders, 1):
        answer(run, order)
    deliver(run)
    assert not run.closed
    left_out = [credit.peer for credit in of_group(orders, 0)[0].contributions]
    run.wait_for_deadline()
    (closed,) = run.closed
    assert {credit.peer for credit in closed.credits} == set(WORKERS) - set(left_out)
    assert all(len(run.peer(name).carried) == 10 for name in left_out), "their work is lost"


def test_round_is_void_when_no_group_is_merged() -> None:
    run, _ = start(group_size=3)
    run.wait_for_deadline()
    assert run.find(fx.VoidRound)
    assert all(len(run.peer(name).carried) == 10 for name in WORKERS)


def test_order_is_given_again_when_its_merger_joins_again() -> None:
    run, orders = start(group_size=3)
    run.send(ev.CoordinatorRestarted())
    first = of_group(orders, 0)[0]
    run.join(first.peer, lease_id=run.granted[first.peer].lease_id)
    (again,) = run.find(fx.OrderMerge)
    assert (again.group, again.attempt) == (first.group, first.attempt)


def test_all_must_agree_when_the_butterfly_merges() -> None:
    run, orders = start(method="butterfly")
    assert [order.peer for order in orders] == list(WORKERS)
    assert all(order.butterfly and order.attempt == 1 for order in orders)
    for order in orders[:-1]:
        answer(run, order)
    assert not machine.pending_checks(run.state)
    answer(run, orders[-1])
    deliver(run)
    (closed,) = run.closed
    assert closed.groups[0].mergers == WORKERS
    assert all(credit.clip == 1.0 and credit.codec == "float16" for credit in closed.credits)


def test_butterfly_goes_on_without_the_peer_that_most_blame() -> None:
    run, orders = start(method="butterfly")
    for order in orders:
        again = answer(run, order, payload_hash="", blamed="eve")
    assert [order.peer for order in again] == [name for name in WORKERS if name != "eve"]
    assert {order.attempt for order in again} == {2}
    for order in again:
        answer(run, order)
    deliver(run)
    assert {credit.peer for credit in run.closed[0].credits} == set(WORKERS) - {"eve"}
    assert len(run.peer("eve").carried) == 10


def test_butterfly_is_given_up_when_it_fails_again_and_again() -> None:
    run, orders = start(method="butterfly")
    attempts = 0
    while orders:
        attempts += 1
        for order in orders:
            asked = answer(run, order, payload_hash="")
        orders = asked
    assert attempts == 3
    assert run.find(fx.VoidRound)


@pytest.mark.parametrize(
    "change",
    [{"round": 7}, {"group": 9}, {"attempt": 5}, {"peer": "nobody"}],
    ids=["round", "group", "attempt", "peer"],
)
def test_answer_changes_nothing_when_nobody_asked_for_it(change: dict[str, Any]) -> None:
    run, orders = start(group_size=3)
    first = orders[0]
    facts = {"peer": first.peer, "round": first.round, "group": first.group, "attempt": first.attempt} | change
    run.send(ev.GroupMerged(**facts, payload_hash=RIGHT, payload_bytes=10))
    assert run.state.round is not None
    assert all(not group.results for group in run.state.round.groups)


def test_round_is_void_at_once_when_nobody_is_there_to_merge() -> None:
    run = CoreRun(num_shards=1000, exchange={"method": "butterfly"})
    run.start("ann", "bob")
    run.contribute("ann")
    for name in ("ann", "bob"):
        run.send(ev.PeerLeft(peer=name, reason="gone"))
    (void,) = run.find(fx.VoidRound)
    assert void.reason == "no group could be merged"
    assert run.state.round is None
