"""Replicas: canonical bytes and digests, what a manifest changes, and what is refused."""

import hashlib
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from protocol.codecs import get_codec
from protocol.codecs.payload import Vector
from protocol.documents import Accepted, Manifest
from protocol.errors import PayloadError, VerificationError
from protocol.replica import State, apply_manifest
from protocol.signing import sha256_hex

D = 5000
PEER = "12D3KooW" + "A" * 44


def fixed_vector(shift: int = 0) -> Vector:
    """The same on every machine: exact arithmetic only."""
    return (np.roll(np.arange(D, dtype=np.float32), shift) % 97 - 48) / np.float32(31)


def no_payload(payload_hash: str) -> bytes:
    raise AssertionError("nothing is to be read")


def round_of(state: State, payloads: list[bytes], **changes: object) -> Manifest:
    accepted = tuple(
        Accepted(
            peer=PEER,
            name="a worker",
            contribution_hash="0" * 64,
            payload_hash=sha256_hex(payload),
            payload_bytes=len(payload),
            codec="int8",
            tokens=10,
            norm=1.0,
            weight=1.0,
            clip=1.0,
        )
        for payload in sorted(payloads, key=sha256_hex)
    )
    manifest = Manifest(
        run_id="0" * 16,
        seq=1,
        previous="0" * 64,
        round=state.round,
        base_digest=state.digest,
        rule="mean",
        outer_optimizer="average",
        outer_learning_rate=1.0,
        outer_momentum=0.0,
        divisor=float(len(payloads)),
        contributions=accepted,
        leased_peers=len(payloads),
        closed_because="all committed",
        inner_steps=20,
        plan="as run.toml says",
        tokens_after=10,
    )
    return manifest.model_copy(update=changes)


def payloads_of(*shifts: int, codec: str = "int8") -> dict[str, bytes]:
    payloads = [get_codec(codec).encode(fixed_vector(shift)) for shift in shifts]
    return {sha256_hex(payload): payload for payload in payloads}


# ---- bytes and digest


@pytest.mark.parametrize("num_parameters", [1, 3, 1000, 12_345])
def test_bytes_are_a_safetensors_file_and_the_digest_is_its_hash(num_parameters: int) -> None:
    theta = np.arange(num_parameters, dtype=np.float32)
    for momentum in (None, theta * 2):
        state = State(7, theta, momentum)
        tensors = {"theta": theta} if momentum is None else {"theta": theta, "momentum": momentum}
        assert state.to_bytes() == safetensors.numpy.save(tensors)
        assert state.digest == sha256_hex(state.to_bytes())
        assert State(8, theta, momentum).digest == state.digest  # the round is not part of it
        read = State.from_bytes(state.to_bytes(), 7, num_parameters, momentum is not None)
        assert (read.digest, read.round) == (state.digest, 7)


def test_digest_differs_when_theta_and_momentum_are_exchanged() -> None:
    one, two = fixed_vector(), fixed_vector(1)
    assert len({State(0, one, two).digest, State(0, two, one).digest, State(0, one).digest}) == 3


def test_digest_needs_no_second_copy_of_the_parameters() -> None:
    state = State(0, np.zeros(1 << 20, np.float32))
    tracemalloc.start()
    try:
        assert len(state.digest) == 64
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_state_cannot_be_written_to() -> None:
    state = State(0, fixed_vector(), fixed_vector())
    for array in (state.theta, state.momentum):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_state_is_refused_when_its_bytes_are_not_canonical() -> None:
    data = State(0, fixed_vector()).to_bytes()
    not_finite = fixed_vector()
    not_finite[3] = np.nan
    other_files = [
        b"",
        data[:-1],
        data + b"\0",
        b"\xff" * 8 + data[8:],
        data.replace(b"F32", b"I32"),
        safetensors.numpy.save({"theta": fixed_vector()}, {"note": "metadata"}),
        safetensors.numpy.save({"other": fixed_vector()}),
        State(0, not_finite).to_bytes(),
    ]
    for other in other_files:
        with pytest.raises(VerificationError):
            State.from_bytes(other, 0, D, has_momentum=False)
    with pytest.raises(VerificationError):
        State.from_bytes(data, 0, D, has_momentum=True)
    with pytest.raises(VerificationError):
        State.from_bytes(data, 0, D + 1, has_momentum=False)


# ---- the merge


def test_theta_moves_by_the_mean_when_a_manifest_is_applied() -> None:
    payloads = payloads_of(0, 10)
    state = State(4, fixed_vector(3))
    after = apply_manifest(state, round_of(state, list(payloads.values())), payloads.__getitem__)
    assert after.round == 5
    np.testing.assert_allclose(after.theta, fixed_vector(3) - (fixed_vector(0) + fixed_vector(10)) / 2, atol=0.02)
    assert after.momentum is None
    np.testing.assert_array_equal(state.theta, fixed_vector(3))


def test_two_replicas_agree_when_one_came_from_bytes() -> None:
    payloads = payloads_of(0, 10, 20)
    first = State(0, fixed_vector(3))
    for _ in range(3):
        second = State.from_bytes(first.to_bytes(), first.round, D, first.momentum is not None)
        manifest = round_of(
            first, list(payloads.values()), outer_optimizer="nesterov", outer_learning_rate=0.7, outer_momentum=0.5
        )
        first = apply_manifest(first, manifest, payloads.__getitem__)
        assert apply_manifest(second, manifest, payloads.__getitem__).digest == first.digest
    assert first.round == 3


def test_state_is_the_golden_one_when_the_payloads_are_fixed() -> None:
    payloads = payloads_of(0, 10, 20)
    state = State(0, fixed_vector(3))
    for _ in range(2):
        manifest = round_of(
            state, list(payloads.values()), outer_optimizer="nesterov", outer_learning_rate=0.7, outer_momentum=0.5
        )
        state = apply_manifest(state, manifest, payloads.__getitem__)
    assert state.digest == GOLDEN_STATE


GOLDEN_STATE = "b50eef1cd16c33bec2d3c97bd7a217d6bca6a430b1fed2f26bc77d69885949de"


def test_states_and_views_of_them_stay_as_they_are_when_memory_is_used_again() -> None:
    payloads = payloads_of(0, 10, 20)
    state = State(0, fixed_vector(3))
    kept: list[tuple[Vector, bytes]] = []
    for _ in range(6):
        manifest = round_of(
            state, list(payloads.values()), outer_optimizer="nesterov", outer_learning_rate=0.7, outer_momentum=0.5
        )
        state = apply_manifest(state, manifest, payloads.__getitem__)
        assert state.momentum is not None
        kept += [(view, view.tobytes()) for view in (state.theta[100:200], state.momentum[:7])]
    assert all(view.tobytes() == before for view, before in kept)


def test_memory_is_used_again_when_nobody_sees_it_any_more() -> None:
    payloads = payloads_of(0)
    state = State(0, fixed_vector(3))
    places = []
    for _ in range(6):
        state = apply_manifest(state, round_of(state, list(payloads.values())), payloads.__getitem__)
        places.append(state.theta.ctypes.data)
    assert len(set(places)) == 2


def test_momentum_starts_from_zeros_when_the_state_has_none() -> None:
    payloads = payloads_of(0)
    options = {"outer_optimizer": "sgd", "outer_learning_rate": 0.5, "outer_momentum": 0.9}
    without, zeros = State(0, fixed_vector()), State(0, fixed_vector(), np.zeros(D, np.float32))
    first = apply_manifest(without, round_of(without, list(payloads.values()), **options), payloads.__getitem__)
    second = apply_manifest(zeros, round_of(zeros, list(payloads.values()), **options), payloads.__getitem__)
    assert first.momentum is not None
    assert first.digest == second.digest


def test_only_the_round_changes_when_nobody_contributed() -> None:
    state = State(2, fixed_vector(), fixed_vector(1))
    manifest = round_of(state, [], outer_optimizer="sgd", outer_learning_rate=0.5, outer_momentum=0.9)
    after = apply_manifest(state, manifest, no_payload)
    assert (after.round, after.digest) == (3, state.digest)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"round": 1}, "round 1.*round 0"),
        ({"base_digest": "f" * 64}, "f" * 64),
        ({"slices": ("embedding",)}, "embedding"),
        ({"outer_optimizer": "adam"}, "adam"),
        ({"outer_momentum": 1.5}, "momentum"),
        ({"divisor": 0.0}, "coefficient"),
        ({"divisor": 1e-40}, "coefficient"),
    ],
)
def test_manifest_is_refused_when_it_does_not_follow_from_the_state(change: dict[str, object], match: str) -> None:
    payloads = payloads_of(0, 10)
    state = State(0, fixed_vector())
    with pytest.raises(VerificationError, match=match):
        apply_manifest(state, round_of(state, list(payloads.values()), **change), payloads.__getitem__)


def test_both_digests_are_named_when_states_diverged() -> None:
    state = State(0, fixed_vector())
    with pytest.raises(VerificationError, match=f"{'f' * 64}.*{state.digest}"):
        apply_manifest(state, round_of(state, [], base_digest="f" * 64), no_payload)


def test_payload_is_refused_when_it_is_not_the_one_that_the_manifest_names() -> None:
    payloads = payloads_of(0, 10)
    state = State(0, fixed_vector())
    manifest = round_of(state, list(payloads.values()))
    other = get_codec("int8").encode(fixed_vector(99))
    with pytest.raises(VerificationError, match=sha256_hex(other)):
        apply_manifest(state, manifest, lambda payload_hash: other)


def test_payload_is_refused_when_it_is_of_another_codec_or_size() -> None:
    state = State(0, fixed_vector())
    payloads = payloads_of(0, codec="sign")
    with pytest.raises(VerificationError, match="sign"):
        apply_manifest(state, round_of(state, list(payloads.values())), payloads.__getitem__)
    short = get_codec("int8").encode(fixed_vector()[:-1])
    with pytest.raises(PayloadError):
        apply_manifest(state, round_of(state, [short]), lambda payload_hash: short)


def test_merge_is_refused_when_it_would_leave_no_finite_state() -> None:
    payload = get_codec("int8").encode(fixed_vector() * np.float32(1e30))
    state = State(0, fixed_vector())
    with pytest.raises(VerificationError, match="infinity"):
        apply_manifest(state, round_of(state, [payload], divisor=1e-20), lambda payload_hash: payload)


def test_digest_is_unchanged_by_this_library_when_computed_by_hand() -> None:
    header = b'{"theta":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    by_hand = len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f\0\0\0\x40"
    assert State(0, np.array([1, 2], np.float32)).digest == hashlib.sha256(by_hand).hexdigest()
