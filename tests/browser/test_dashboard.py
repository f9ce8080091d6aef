"""What the page says, without a browser: curves of bounded size, words, and what happens to a taken port."""

import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from coordinator.dashboard.history import MAX_POINTS, Curve, RoundHistory
from coordinator.dashboard.page import serve_page
from coordinator.dashboard.peer_table import describe_row, select
from coordinator.dashboard.snapshot import describe, describe_age
from coordinator.dashboard.waterfall import cut, select_bars
from coordinator.metrics import create_registry
from coordinator.records.reader import make_waterfall
from coordinator.records.views import Bar
from coordinator.storage.database import Batch, Database, RoundRow, sqlite_url
from protocol.errors import ConfigError


@pytest.fixture
def database(tmp_path: Path) -> Any:
    database = Database(sqlite_url(tmp_path))
    yield database
    database.close()


def close_rounds(database: Database, first: int, count: int, every_s: float = 1.0) -> None:
    """`count` rounds of 100 tokens and 10 payload bytes each, one every `every_s`."""
    rounds = range(first, first + count)
    rows = [
        RoundRow(
            round=index,
            unix_s=1000 + index * every_s,
            seconds=every_s,
            tokens_after=100 * (index + 1),
            contributions=1,
            payload_bytes=10,
            mean_loss=5.0,
        )
        for index in rounds
    ]
    database.commit(Batch(rounds=rows))


def make_status(**changes: Any) -> dict[str, Any]:
    status = {
        "name": "tiny",
        "run_id": "00",
        "phase": "train",
        "reason": "",
        "round": 3,
        "tokens": 300,
        "tokens_target": 1200,
        "num_parameters": 10,
        "train_loss": 5.0,
        "held_out_loss": None,
        "round_seconds": 1.0,
        "ledger_head": "ab",
        "peers": [],
        "verdict": {"level": "healthy", "cause": "", "since_unix_s": None, "also": ()},
        "round_opened_unix_s": None,
        "round_expected_unix_s": None,
        "last_merge_unix_s": None,
        "eta_s": None,
        "disk_free_bytes": 1 << 40,
        "validator_expected": True,
        "commit_p99_s": None,
        "started_unix_s": 0.0,
    }
    return {**status, **changes}


def make_peer(name: str, status: str) -> dict[str, Any]:
    counts = {"steps_per_s": 1.0, "credited_tokens": 0, "accepted": 0, "refused": 0}
    return {
        "peer": name,
        "name": name,
        "role": "worker",
        "device": "",
        "status": status,
        "pause_reason": "",
        "activity": "",
        "connected": status != "gone",
        "lost": None,
        "lease": "",
        "software": "manyhands 0.1.0",
        "reachable": True,
        "lag_rounds": 0,
        "banned": False,
        "waiting_for_approval": False,
        **counts,
    }


@given(st.integers(0, 5000))
def test_curve_keeps_shape_and_size_when_it_grows(count: int) -> None:
    curve = Curve()
    for x in range(count):
        curve.add(x, 2.0 * x)
    xs = [x for x, _ in curve.points]
    assert len(xs) <= MAX_POINTS
    assert len(xs) > MAX_POINTS // 2 or len(xs) == count
    assert xs == sorted(set(xs))
    assert not count or xs[-1] == count - 1
    spacing = math.ceil(count / MAX_POINTS) * 2
    assert all(abs(y - 2.0 * x) <= spacing for x, y in curve.points)


async def test_history_takes_each_round_once_when_it_is_refreshed_again(database: Database) -> None:
    history = RoundHistory(database.engine)
    await history.refresh()
    assert (history.tokens_per_s(), history.last_merge_unix_s) == (None, None)
    close_rounds(database, 0, 3)
    await history.refresh()
    await history.refresh()
    close_rounds(database, 3, 2)
    database.commit(Batch(held_out={1: 4.5, 3: 4.0}))
    await history.refresh()
    assert [x for x, _ in history.train.points] == [100, 200, 300, 400, 500]
    assert history.held_out.points == [(200, 4.5), (400, 4.0)]
    assert (history.last_held_out_loss, history.payload_bytes) == (4.0, 50)
    assert history.last_merge_unix_s == 1004


@pytest.mark.parametrize(("every_s", "tokens_per_s"), [(0.5, 200.0), (1.0, 100.0), (400.0, 0.25)])
async def test_speed_is_that_of_all_peers_when_rounds_are_short_or_long(
    database: Database, every_s: float, tokens_per_s: float
) -> None:
    close_rounds(database, 0, 300, every_s)
    history = RoundHistory(database.engine)
    await history.refresh()
    assert history.tokens_per_s() == pytest.approx(tokens_per_s)


def test_who_has_left_is_hidden_until_asked_for_when_peers_are_listed() -> None:
    peers = [make_peer("gone", "gone"), make_peer("ada", "ready"), {**make_peer("bob", "ready"), "credited_tokens": 5}]

    def choose(words: str, *, everybody: bool) -> list[str]:
        chosen, _ = select(peers, words=words, everybody=everybody, sorted_by="tokens", descending=True)
        return [peer["name"] for peer in chosen]

    assert choose("", everybody=False) == ["bob", "ada"]
    assert choose(" GONE", everybody=True) == ["gone"]


def test_who_waits_is_told_apart_when_the_list_is_filtered() -> None:
    waiting = {**make_peer("eve", "syncing"), "waiting_for_approval": True}
    banned = {**waiting, "banned": True}
    found = select([waiting, banned], words="ada", everybody=False, sorted_by="name", descending=False)
    assert found == ([], [waiting])


@pytest.mark.parametrize(
    ("changes", "verb"),
    [
        ({}, "ban"),
        ({"banned": True}, "unban"),
        ({"waiting_for_approval": True}, "approve"),
        ({"role": "validator"}, None),
    ],
)
def test_row_offers_the_action_that_fits_when_the_operator_looks(changes: dict[str, Any], verb: str | None) -> None:
    cell = describe_row({**make_peer("ada", "ready"), **changes}, 128, for_operator=True)["cells"][-1]
    assert (cell["act"] if verb else cell) == (verb or "")


def test_long_activity_is_cut_when_a_peer_sends_one() -> None:
    row = describe_row({**make_peer("eve", "ready"), "activity": "x" * 100_000}, 128, for_operator=False)
    assert len(str(row)) < 2000


def test_snapshot_has_dashes_when_nothing_is_merged_yet(database: Database) -> None:
    snapshot = describe(make_status(), RoundHistory(database.engine), 0.0)
    assert (snapshot.percent, snapshot.last_merge, snapshot.eta) == (25.0, "\N{EN DASH}", "\N{EN DASH}")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s ago"), (59.9, "59 s ago"), (61, "1 min ago"), (3720, "1 h 2 min ago"), (90_000, "1 d 1 h ago")],
)
def test_age_has_two_units_at_most_when_it_is_long(seconds: float, words: str) -> None:
    assert describe_age(seconds) == words


def test_unknown_losses_have_no_sample_when_metrics_are_read() -> None:
    status = make_status(train_loss=None, peers=[make_peer("ada", "ready"), make_peer("bob", "gone")])
    lines = generate_latest(create_registry(lambda: status, lambda: 7)).decode().splitlines()
    assert "manyhands_rounds_merged_total 3.0" in lines
    assert "manyhands_payload_bytes_total 7.0" in lines
    assert 'manyhands_phase{phase="train"} 1.0' in lines
    assert 'manyhands_phase{phase="merge"} 0.0' in lines
    assert 'manyhands_peers{role="worker",status="gone"} 1.0' in lines
    assert not [line for line in lines if line.startswith(("manyhands_train_loss", "manyhands_held_out_loss"))]


@pytest.mark.parametrize("address", ["127.0.0.1:{taken}", "203.0.113.1:7641", "localhost", "localhost:99999"])
async def test_page_names_the_key_to_change_when_its_address_cannot_be_used(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        http = address.format(taken=other.getsockname()[1])
        server: Any = SimpleNamespace(spec=SimpleNamespace(coordinator=SimpleNamespace(http=http)))
        with pytest.raises(ConfigError, match=rf"cannot serve the page on {http}.*coordinator\.http in run\.toml"):
            serve_page(server)


def make_bar(peer: str, **changes: Any) -> Bar:
    times: dict[str, Any] = {"leased_unix_s": 100.0, "committed_unix_s": 104.0, "checked_unix_s": 105.0}
    facts: dict[str, Any] = {"lease_id": 1, "round": 7, "device": "", "result": "accepted", "reason": "", "codec": ""}
    counts: dict[str, Any] = {"inner_steps": 5, "tokens": 10, "payload_bytes": 9, "receipt_seq": None}
    merged = {"merged_unix_s": 107.0, "compute_s": 3.0}
    return Bar(**{"peer": peer, "name": peer, **times, **facts, **counts, **merged, **changes})


def test_bar_is_cut_into_its_parts_when_the_round_is_closed_or_open() -> None:
    closed = make_waterfall((make_bar("ada"), make_bar("bob", leased_unix_s=101.0)), 106.0, 0, 7)
    assert [cut(bar, closed) for bar in closed.bars] == [(0.0, 3.0, 2.0, 1.0), (1.0, 3.0, 1.0, 1.0)]
    going = make_bar("ada", result="open", committed_unix_s=None, checked_unix_s=None, merged_unix_s=None)
    assert cut(going, make_waterfall((going,), None, 0, 7), 102.5) == (0.0, 2.5, 0.0, 0.0)


def test_straggler_and_failures_stand_first_when_a_round_is_drawn() -> None:
    slow = make_bar("slow", committed_unix_s=120.0, checked_unix_s=121.0)
    bars = (make_bar("ada"), make_bar("bad", result="refused"), make_bar("bob"), slow)
    assert [bar.peer for bar in select_bars(make_waterfall(bars, 122.0, 0, 7))][:2] == ["slow", "bad"]
