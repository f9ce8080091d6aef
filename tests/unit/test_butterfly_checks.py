"""What a butterfly round refuses before it uses it, and whom it blames when results differ. No peers are needed."""

from typing import Any

import numpy as np
import pytest
import torch
from hivemind.proto import averaging_pb2

from protocol.errors import PayloadError
from protocol.exchange.butterfly import ButterflyGroup, ButterflyTimeouts
from protocol.exchange.butterfly.parts import (
    PART_CODECS,
    PART_VALUES_MAX,
    find_disagreement,
    get_part_codec,
    part_values,
    segment_digests,
)

# hivemind hands numpy arrays to torch, and a torch number to another
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:hivemind.compression.*")

GOOD_GROUP: dict[str, Any] = {"group_id": "g", "peers": ("a", "b"), "weights": (1.0, 2.0)}
BAD_GROUPS: list[dict[str, Any]] = [
    {"group_id": ""},
    {"group_id": "a/b"},
    {"peers": ("a", "a")},
    {"peers": ("a",), "weights": (1.0,)},
    {"weights": (1.0,)},
    {"weights": (1.0, 0.0)},
    {"weights": (1.0, np.nan)},
    {"weights": (1.0, np.inf)},
]


@pytest.mark.parametrize("change", BAD_GROUPS)
def test_group_is_refused_when_it_is_unusable(change: dict[str, Any]) -> None:
    ButterflyGroup(**GOOD_GROUP)
    with pytest.raises(ValueError, match="a group"):
        ButterflyGroup(**{**GOOD_GROUP, **change})


@pytest.mark.parametrize("name", PART_CODECS)
@pytest.mark.parametrize("values", [[0.0] * 5, [7.0], [1e-30, -1e-30], [3.0, 3.0, 3.0]])
def test_part_survives_when_it_has_no_spread(name: str, values: list[float]) -> None:
    codec = get_part_codec(name)
    part = torch.tensor(values)
    torch.testing.assert_close(codec.decode(codec.encode(part), len(values)), part, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", PART_CODECS)
@pytest.mark.parametrize(
    "change",
    [
        {"buffer": b""},
        {"buffer": b"\xff" * 100_000},
        {"dtype": "float64"},
        {"dtype": "x" * 300},
        {"compression": 3},
        {"requires_grad": True},
        {"size": [6]},
        {"size": [5, 1]},
        {"size": []},
    ],
)
def test_part_is_refused_when_one_field_is_wrong(name: str, change: dict[str, Any]) -> None:
    codec = get_part_codec(name)
    part = codec.encode(torch.arange(5.0))
    for field, value in change.items():
        if field == "size":
            del part.size[:]
            part.size.extend(value)
        else:
            setattr(part, field, value)
    with pytest.raises(PayloadError):
        codec.decode(part, 5)


def test_table_is_refused_when_it_claims_another_size() -> None:
    codec = get_part_codec("uniform8")
    part = codec.encode(torch.arange(5.0))
    part.buffer = (255).to_bytes(8, "little") + part.buffer[8:]
    with pytest.raises(PayloadError, match="table"):
        codec.decode(part, 5)


def test_messages_fit_their_limit_when_they_are_as_long_as_can_be() -> None:
    values = torch.randn(PART_VALUES_MAX)
    for codec in PART_CODECS.values():
        message = averaging_pb2.AveragingData(
            code=averaging_pb2.PART_FOR_AVERAGING, group_id=b"g" * 64, tensor_part=codec.encode(values), weight=0.1
        )
        assert message.ByteSize() <= codec.message_bytes_max(PART_VALUES_MAX)


@pytest.mark.parametrize("num_peers", [2, 3, 8, 64])
@pytest.mark.parametrize("num_parameters", [1, 63, PART_VALUES_MAX, PART_VALUES_MAX * 8 + 1, 50_000_000])
def test_parts_are_few_and_within_the_limit_when_they_are_planned(num_peers: int, num_parameters: int) -> None:
    values = part_values(num_parameters, num_peers)
    assert 1 <= values <= PART_VALUES_MAX
    assert num_parameters <= num_peers * values * -(-num_parameters // (num_peers * PART_VALUES_MAX))


def test_reducer_is_blamed_when_its_segment_differs() -> None:
    honest, sizes = np.arange(12, dtype=np.float32), [4, 4, 4]
    cheated = honest.copy()
    cheated[9] += 1  # in the segment of peer 2
    same, other = segment_digests(honest, sizes), segment_digests(cheated, sizes)
    peers = ("a", "b", "c")
    assert find_disagreement("a", peers, [same, same, same]) is None
    for own, culprit in [("a", "c"), ("b", "c"), ("c", "b")]:
        found = find_disagreement(own, peers, [same, other, same])
        assert found is not None
        assert found.peer == culprit


def test_timeouts_are_refused_when_reducers_get_no_more_time_than_senders() -> None:
    with pytest.raises(ValueError, match="sender_s under reducer_s"):
        ButterflyTimeouts(sender_s=45.0, reducer_s=45.0)
