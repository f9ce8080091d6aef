"""Whom to ask first: nobody's uplink carries a payload more than a few times, and nobody waits in a circle."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.exchange.order import Order, order_sources
from protocol.signing import sha256_hex

PAYLOADS = [sha256_hex(bytes([number])) for number in range(50)]


def peers(count: int) -> list[str]:
    return [f"peer {number}" for number in range(count)]


def orders(
    payload: str, members: list[str], contributor: str, seeds: list[str] | None = None, dialable: bool = True
) -> dict[str, Order]:
    """What each member does to have a payload."""
    seeds = seeds or []
    others = [peer for peer in members if peer not in seeds]
    return {
        me: order_sources(
            payload,
            me=me,
            contributor=contributor,
            seeds=seeds,
            others=others,
            salt="round",
            contributor_dialable=dialable,
        )
        for me in members
        if me != contributor
    }


@given(count=st.integers(2, 40), payload=st.sampled_from(PAYLOADS))
def test_nobody_has_more_than_two_children_when_there_are_no_seeds(count: int, payload: str) -> None:
    members = peers(count)
    found = orders(payload, members, members[0])
    assert max(Counter(order.peers[0] for order in found.values()).values()) <= 2
    assert {order.parallel for order in found.values()} == {1}


@given(count=st.integers(1, 40), num_seeds=st.integers(0, 5), payload=st.sampled_from(PAYLOADS), dialable=st.booleans())
def test_nobody_waits_in_a_circle_when_everybody_asks_upwards(
    count: int, num_seeds: int, payload: str, dialable: bool
) -> None:
    """The relation "asks" has no cycle: again and again there is somebody who asks only those that are done."""
    members, contributor = peers(count), "the contributor"
    found = orders(payload, members, contributor, members[:num_seeds], dialable)
    done = {contributor}
    while waiting := {me for me in found if me not in done}:
        ready = {me for me in waiting if set(found[me].peers) <= done}
        assert ready
        done |= ready
    assert {order.peers[-1:] == (contributor,) for order in found.values()} == {dialable}


@pytest.mark.parametrize("count", [2, 7, 16, 33])
def test_all_send_equally_much_when_each_contributes(count: int) -> None:
    members, sent = peers(count), Counter[str]()
    for contributor, payload in zip(members, PAYLOADS, strict=False):
        sent.update(order.peers[0] for order in orders(payload, members, contributor).values())
    assert set(sent.values()) == {count - 1}


def test_unlisted_peers_spread_over_the_leaves_when_they_cannot_be_dialled() -> None:
    members = peers(15)
    payload = PAYLOADS[0]
    children = Counter(order.peers[0] for order in orders(payload, members, members[0]).values())
    for number in range(70):
        order = order_sources(
            payload, me=f"hidden {number}", contributor=members[0], seeds=[], others=members, salt="round"
        )
        children[order.peers[0]] += 1
        assert order.peers[-1] == members[0]
    assert set(children) == set(members)  # seven inner places with two children each, eight leaves that share 70
    assert max(children.values()) <= 20


def test_top_of_the_tree_asks_the_coordinator_when_the_contributor_cannot_be_dialled() -> None:
    found = orders(PAYLOADS[0], peers(10), "hidden", dialable=False)
    assert sorted(len(order.peers) for order in found.values()) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert "hidden" not in {peer for order in found.values() for peer in order.peers}


def test_seeds_are_asked_first_when_there_are_some() -> None:
    members = peers(40)
    seeds = members[:4]
    first: Counter[str] = Counter()
    for payload in PAYLOADS:
        for me, order in orders(payload, members, members[-1], seeds).items():
            if me in seeds:
                assert order.parallel == 1
                assert set(order.peers) <= {*seeds, members[-1]}
            else:
                assert set(order.peers[:4]) == set(seeds)
                assert order.parallel == 3
                first[order.peers[0]] += 1
    assert max(first.values()) < 1.3 * min(first.values())


@pytest.mark.parametrize("dialable", [True, False])
def test_order_is_short_when_nobody_else_can_be_dialled(dialable: bool) -> None:
    order = order_sources(PAYLOADS[0], me="me", contributor="peer", seeds=[], others=[], contributor_dialable=dialable)
    assert order.peers == (("peer",) if dialable else ())
