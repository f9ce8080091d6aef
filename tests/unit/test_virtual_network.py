"""Transfers that share links, and a round's payloads on their way to everybody."""

import numpy as np
import pytest

from simulations.network import Network
from simulations.virtual.broadcast import Fetch, Fetched, plan_fetch
from simulations.virtual.clock import Clock

MEGABIT = 1e6
MEGABYTE = 1e6


def make_network(*, up: list[float], down: list[float], stream: float = 1e12) -> tuple[Clock, Network]:
    clock = Clock()
    mbps = np.array([up, down]) * MEGABIT
    return clock, Network(clock, mbps[0], mbps[1], np.full(len(up), stream))


def run(clock: Clock) -> None:
    while clock.next_s < float("inf"):
        clock.pop()


def test_a_flow_takes_the_narrower_of_its_links() -> None:
    clock, network = make_network(up=[8, 8], down=[80, 4])
    done: list[float] = []
    network.start(0, 1, MEGABYTE, lambda: done.append(clock.now_s))
    run(clock)
    assert done[0] == pytest.approx(2.0, abs=0.02)


def test_flows_share_an_uplink_and_the_second_half_is_faster() -> None:
    clock, network = make_network(up=[8, 1, 1], down=[80, 80, 80])
    done: dict[str, float] = {}
    network.start(0, 1, MEGABYTE, lambda: done.setdefault("small", clock.now_s))
    network.start(0, 2, 2 * MEGABYTE, lambda: done.setdefault("large", clock.now_s))
    run(clock)
    assert done["small"] == pytest.approx(2.0, abs=0.03)  # half of the line each
    assert done["large"] == pytest.approx(3.0, abs=0.03)  # then all of it


def test_what_one_flow_cannot_use_goes_to_the_others() -> None:
    clock, network = make_network(up=[100, 100, 100], down=[10, 2, 100])
    done: dict[str, float] = {}
    network.start(0, 1, MEGABYTE, lambda: done.setdefault("narrow", clock.now_s))  # 2 Mbit/s
    network.start(0, 2, 12 * MEGABYTE, lambda: done.setdefault("wide", clock.now_s))
    run(clock)
    assert done["wide"] == pytest.approx(12 * 8 / 98, rel=0.02)


def test_one_stream_carries_no_more_than_its_loss_allows() -> None:
    clock, network = make_network(up=[100, 100], down=[100, 100], stream=4 * MEGABIT)
    done: list[float] = []
    network.start(0, 1, MEGABYTE, lambda: done.append(clock.now_s))
    run(clock)
    assert done[0] == pytest.approx(2.0, abs=0.02)


def test_a_cancelled_flow_calls_nobody_and_frees_the_line() -> None:
    clock, network = make_network(up=[8, 1, 1], down=[80, 80, 80])
    done: dict[str, float] = {}
    network.start(0, 1, MEGABYTE, lambda: done.setdefault("kept", clock.now_s))
    flow = network.start(0, 2, MEGABYTE, lambda: done.setdefault("cancelled", clock.now_s))
    clock.at(1.0, network.cancel, flow)
    run(clock)
    assert list(done) == ["kept"]
    assert done["kept"] == pytest.approx(1.5, abs=0.05)


def test_a_link_that_gets_slower_slows_its_flows() -> None:
    clock, network = make_network(up=[8, 1], down=[80, 80])
    done: list[float] = []
    network.start(0, 1, MEGABYTE, lambda: done.append(clock.now_s))
    clock.at(0.5, network.scale, 0, 0.1)
    run(clock)
    assert done[0] == pytest.approx(0.5 + 5.0, abs=0.1)


def fetch(
    *,
    makers: list[int],
    num_peers: int,
    servers: list[int],
    up_mbps: float = 10.0,
    dialable: bool = True,
    seeds: bool = False,
) -> Fetched:
    nodes = num_peers + 1
    up = np.full(nodes, up_mbps * MEGABIT)
    up[-1] = 1000 * MEGABIT
    can_be_dialled = np.full(nodes, dialable)
    can_be_dialled[servers] = True
    can_be_dialled[-1] = True
    return plan_fetch(
        Fetch(
            now_s=0.0,
            makers=makers,
            sizes=np.full(len(makers), MEGABYTE),
            receivers=np.arange(num_peers),
            starts_s=np.zeros(num_peers),
            servers=np.array(servers),
            servers_are_seeds=seeds,
            up_bps=up,
            down_bps=np.full(nodes, 1000 * MEGABIT),
            latency_s=np.full(nodes, 0.01),
            stream_bps=np.full(nodes, 1e12),
            dialable=can_be_dialled,
            coordinator=num_peers,
        ),
        np.random.default_rng(0),
    )


def test_every_byte_that_is_received_was_sent() -> None:
    for seeds in (False, True):
        fetched = fetch(makers=[0, 1, 2, 3], num_peers=40, servers=list(range(10)), seeds=seeds)
        assert fetched.sent_bytes.sum() == pytest.approx(fetched.received_bytes.sum())
        assert fetched.received_bytes.tolist() == [3 * MEGABYTE] * 4 + [4 * MEGABYTE] * 36


def test_when_all_contribute_and_serve_all_send_equally_much() -> None:
    fetched = fetch(makers=list(range(8)), num_peers=8, servers=list(range(8)))
    assert fetched.sent_bytes[:-1].tolist() == [7 * MEGABYTE] * 8
    assert fetched.sent_bytes[-1] == 0.0


def test_the_coordinator_stands_in_for_makers_that_cannot_be_dialled() -> None:
    fetched = fetch(makers=[10, 11], num_peers=12, servers=list(range(4)), dialable=False)
    assert fetched.sent_bytes[[10, 11]].tolist() == [0.0, 0.0]
    assert fetched.sent_bytes[-1] > 0.0


def test_nodes_with_too_many_streams_leave_the_rest_to_the_coordinator() -> None:
    few = fetch(makers=[0, 1, 2, 3], num_peers=30, servers=[0, 1, 2, 3])
    many = fetch(makers=[0, 1, 2, 3], num_peers=3000, servers=[0, 1, 2, 3])
    assert few.sent_bytes[-1] == 0.0
    assert many.sent_bytes[-1] > 0.9 * many.sent_bytes.sum()
    assert many.done_s.max() < 8 * 12000 / 1000 * 1.1  # about as fast as its line allows


def test_nobody_has_a_payload_before_its_parent_could_send_it() -> None:
    fetched = fetch(makers=[0], num_peers=16, servers=list(range(16)))
    assert fetched.done_s[0] == fetched.done_s.min()
    assert fetched.done_s[1:].min() > 8 * 1 / 10  # one megabyte at ten megabits a second
