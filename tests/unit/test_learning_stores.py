"""What is kept for every peer comes back as it was, from memory and from the file that it overflows into."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.signing import sha256_hex
from simulations.learning import stores
from simulations.learning.stores import PayloadSpool, PeerVectors

WIDTH = 5
PEERS = [f"peer-{number}" for number in range(12)]


@pytest.fixture(params=[0, 4 * WIDTH * 3, 1 << 20], ids=["all in the file", "some in the file", "all in memory"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_MEMORY_BYTES", request.param)


@pytest.mark.usefixtures("memory")
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(PEERS), st.one_of(st.none(), st.floats(width=32, allow_nan=False))), max_size=60
    )
)
def test_vectors_are_those_of_a_dictionary(steps: list[tuple[str, float | None]]) -> None:
    vectors, expected = PeerVectors(WIDTH), dict[str, float]()
    for peer, value in steps:
        if value is None:
            vectors.clear(peer)
            expected.pop(peer, None)
        else:
            vectors.write([peer], np.full((1, WIDTH), value, np.float32))
            expected[peer] = value
    for kept in (vectors, pickle.loads(pickle.dumps(vectors))):  # noqa: S301  # what was just pickled
        rows = kept.read(PEERS)
        assert rows.tolist() == [[expected.get(peer, 0.0)] * WIDTH for peer in PEERS]
        assert [kept.read_one(peer).tolist() for peer in PEERS] == rows.tolist()
        assert [peer in kept for peer in PEERS] == [peer in expected for peer in PEERS]


@pytest.mark.usefixtures("memory")
def test_payloads_come_back_until_they_are_cleared() -> None:
    payloads = {sha256_hex(text): text for text in (bytes([number]) * (20 + number) for number in range(8))}
    spool = PayloadSpool()
    for payload_hash, payload in (*payloads.items(), *payloads.items()):
        spool.add(payload_hash, payload)
    for kept in (spool, pickle.loads(pickle.dumps(spool))):  # noqa: S301  # what was just pickled
        assert {payload_hash: kept.read(payload_hash) for payload_hash in payloads} == payloads
    spool.clear()
    with pytest.raises(KeyError):
        spool.read(next(iter(payloads)))
