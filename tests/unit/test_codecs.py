"""Codecs: error bounds, sizes, what is refused, golden payloads, and error feedback."""

import hashlib
import struct
import tracemalloc

import numpy as np
import pytest

from protocol.codecs import CODECS, codec_of, get_codec
from protocol.codecs.bits import Reader, pack_fields
from protocol.codecs.indices import pack_rice, read_plain, read_rice
from protocol.codecs.payload import HEADER_BYTES, PayloadHeader, Vector, measure_error
from protocol.codecs.selection import select_largest
from protocol.error_feedback import ErrorFeedback
from protocol.errors import ConfigError, PayloadError

NAMES = sorted(CODECS)
D = 10_000  # neither a multiple of 256 nor of 4096


def normal(size: int = D, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def fixed_vector(size: int) -> Vector:
    """Values that are the same on every machine: no library's random numbers, only exact arithmetic."""
    hashed = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(2_654_435_761) % np.uint64(1 << 20)
    values = (hashed.astype(np.float32) - np.float32(1 << 19)) / np.float32(1 << 19)
    cubes: Vector = values * values * values
    return cubes


def squared_error(vector: Vector, decoded: Vector) -> float:
    wide = vector.astype(np.float64)
    return float(np.sum((wide - decoded) ** 2) / np.sum(wide**2))


# ---- the registry


def test_nearest_codec_is_named_when_the_name_is_unknown() -> None:
    with pytest.raises(ConfigError, match="did you mean `sparse`"):
        get_codec("sprase")


def test_nearest_option_is_named_when_the_option_is_unknown() -> None:
    with pytest.raises(ConfigError, match="did you mean `chunk`"):
        get_codec("sparse", {"chunks": 4096})
    with pytest.raises(ConfigError, match="it has none"):
        get_codec("float16", {"block": 256})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8", {"block": 12}),
        ("int8", {"block": 0}),
        ("sign", {"block": 1 << 17}),
        ("sign", {"block": 256.5}),
        ("sign", {"block": float("nan")}),
        ("sign", {"block": float("inf")}),
        ("sparse", {"k": 0}),
        ("sparse", {"k": 5000}),
        ("sparse", {"chunk": 3000}),
        ("sparse", {"packing": 2}),
    ],
)
def test_options_are_refused_when_out_of_range(name: str, options: dict[str, int | float]) -> None:
    with pytest.raises(ConfigError):
        get_codec(name, options)


def test_payload_names_its_codec_and_options_when_read_by_anybody() -> None:
    codec = get_codec("sparse", {"k": 8, "chunk": 1024, "packing": 0})
    assert codec_of(codec.encode(normal())) == codec


# ---- what comes back


def test_values_are_exact_when_sent_as_float32() -> None:
    codec = get_codec("float32")
    np.testing.assert_array_equal(codec.decode(codec.encode(normal()), D), normal())


def test_values_saturate_when_beyond_float16() -> None:
    codec = get_codec("float16")
    vector = np.array([1e9, -1e9, 1.0, 65_504.0], np.float32)
    np.testing.assert_array_equal(codec.decode(codec.encode(vector), 4), [65_504, -65_504, 1, 65_504])


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e30])
def test_error_is_half_a_step_at_most_when_integers_are_sent(name: str, largest: int, magnitude: float) -> None:
    codec = get_codec(name, {"block": 64})
    vector = normal(64 * 50) * np.float32(magnitude)
    blocks = vector.reshape(-1, 64).astype(np.float64)
    error = np.abs(codec.decode(codec.encode(vector), vector.size).reshape(-1, 64) - blocks)
    step = np.abs(blocks).max(axis=1, keepdims=True) / largest
    assert np.all(error <= step / 2 * (1 + 1e-3) + np.abs(blocks) * 2.0**-11)


@pytest.mark.parametrize(("name", "bound"), [("int8", 1e-4), ("int4", 0.017), ("int2", 0.122), ("sign", 0.3640)])
def test_squared_error_keeps_its_bound_when_values_are_gaussian(name: str, bound: float) -> None:
    codec = get_codec(name)
    vector = normal(1 << 16)
    assert squared_error(vector, codec.decode(codec.encode(vector), vector.size)) < bound


def test_squared_error_keeps_its_bound_when_two_bit_values_are_laplacian() -> None:
    codec = get_codec("int2")
    vector = np.random.default_rng(0).laplace(size=1 << 16).astype(np.float32)
    assert squared_error(vector, codec.decode(codec.encode(vector), vector.size)) < 0.180


@pytest.mark.parametrize("packing", [0, 1])
def test_exactly_the_largest_values_are_sent_when_sparse(packing: int) -> None:
    codec = get_codec("sparse", {"packing": packing})
    vector = normal(3 * 4096 + 100)
    decoded = codec.decode(codec.encode(vector), vector.size)
    for start, stop, k in [(0, 4096, 64), (4096, 8192, 64), (8192, 12288, 64), (12288, 12388, 1)]:
        expected = np.sort(np.argsort(-np.abs(vector[start:stop]), kind="stable")[:k])
        np.testing.assert_array_equal(np.flatnonzero(decoded[start:stop]), expected)
        sent = vector[start:stop][expected]
        np.testing.assert_array_equal(np.sign(decoded[start:stop][expected]), np.sign(sent))
        assert squared_error(sent, decoded[start:stop][expected]) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_pieces_join_without_a_seam_when_the_vector_is_long(name: str) -> None:
    """Long vectors are handled in pieces: each part comes back as if it had been sent alone."""
    codec, size = get_codec(name), (1 << 20) + 3 * 4096
    vector = normal(size + 777)
    payload = codec.encode(vector)
    decoded = codec.decode(payload, vector.size)
    for start, stop in [(0, 4096), ((1 << 20) - 4096, (1 << 20) + 4096), (size - 4096, size)]:
        alone = codec.decode(codec.encode(vector[start:stop]), stop - start)
        np.testing.assert_array_equal(decoded[start:stop], alone)
    out = normal(vector.size, seed=1)
    expected = out + np.float32(0.3) * decoded
    codec.accumulate(payload, 0.3, out)
    assert out.tobytes() == expected.tobytes()


def test_lower_indices_are_selected_when_magnitudes_tie() -> None:
    chunk = np.array([[1, -2, 2, 0, 2, 1, 1, -2, 0, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    assert select_largest(chunk, 3)[0].tolist() == [[1, 2, 4]]
    assert select_largest(chunk, 10)[0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert select_largest(np.zeros((2, 16), np.float32), 3)[0].tolist() == [[0, 1, 2], [16, 17, 18]]


def test_wire_size_is_below_a_210th_of_float32_when_64_of_4096_are_sent() -> None:
    vector = normal(1 << 22)
    num_bytes = len(get_codec("sparse").encode(vector))
    assert num_bytes / vector.size <= 0.0190
    assert 4 * vector.size / num_bytes >= 210


@pytest.mark.parametrize("name", NAMES)
def test_zeros_come_back_when_zeros_are_sent(name: str) -> None:
    codec = get_codec(name)
    payload = codec.encode(np.zeros(D, np.float32))
    assert not codec.decode(payload, D).any()
    assert codec.inspect(payload, D).norm == 0.0


# ---- what is refused


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_encoding_is_refused_when_the_vector_diverged(name: str, bad: float) -> None:
    vector = normal()
    vector[D - 1] = bad
    with pytest.raises(PayloadError, match="diverged"):
        get_codec(name).encode(vector)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_refused_when_the_array_is_not_a_float32_vector(name: str) -> None:
    for vector in (np.zeros(0, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.float64)):
        with pytest.raises(PayloadError):
            get_codec(name).encode(vector)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_large_is_allocated_when_a_small_payload_claims_many_parameters(name: str) -> None:
    codec = get_codec(name)
    genuine = codec.encode(normal(8))
    header = PayloadHeader.from_bytes(genuine)
    claim = 1 << 40
    forged = PayloadHeader(
        codec_id=header.codec_id, exponent=0, num_parameters=claim, options=header.options
    ).to_bytes() + bytes(12)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            codec.inspect(forged, 8)
        with pytest.raises(PayloadError):
            codec.inspect(forged, claim)  # even by a receiver that has a model of that size
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", NAMES)
def test_payload_is_refused_when_header_or_length_is_wrong(name: str) -> None:
    codec = get_codec(name)
    payload = codec.encode(normal())
    wrong = {
        "empty": b"",
        "magic": b"X" + payload[1:],
        "version": payload[:4] + b"\x63" + payload[5:],
        "codec": payload[:5] + b"\x63" + payload[6:],
        "spare option": payload[:24] + struct.pack("<I", 9) + payload[28:],
        "header alone": payload[:HEADER_BYTES],
        "truncated": payload[:-1],
        "extended": payload + b"\0",
    }
    for forged in wrong.values():
        with pytest.raises(PayloadError):
            codec.inspect(forged, D)
        with pytest.raises(PayloadError):
            codec.decode(forged, D)
        with pytest.raises(PayloadError):
            codec.accumulate(forged, 1.0, np.zeros(D, np.float32))
    for num_parameters in (0, D - 1, D + 1):
        with pytest.raises(PayloadError):
            codec.inspect(payload, num_parameters)


def test_payload_is_refused_when_it_was_written_with_other_options() -> None:
    payload = get_codec("sparse", {"k": 128}).encode(normal())
    with pytest.raises(PayloadError, match="options of this run"):
        get_codec("sparse", {"k": 64}).inspect(payload, D)


def test_payload_is_refused_when_its_header_holds_impossible_options() -> None:
    payload = get_codec("sparse").encode(normal())
    for forged in (
        payload[:16] + struct.pack("<3I", 5000, 4096, 1) + payload[28:],
        payload[:16] + struct.pack("<3I", 64, 1 << 31, 1) + payload[28:],
        payload[:5] + b"\x01" + payload[6:],
    ):
        with pytest.raises(PayloadError):
            codec_of(forged)


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "sign"])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_payload_is_refused_when_a_scale_is_not_a_finite_magnitude(name: str, scale: float) -> None:
    payload = bytearray(get_codec(name).encode(normal()))
    payload[HEADER_BYTES : HEADER_BYTES + 2] = np.float16(scale).tobytes()
    with pytest.raises(PayloadError, match="scale"):
        get_codec(name).inspect(bytes(payload), D)


@pytest.mark.parametrize("exponent", [-32768, -127, 110, 32767])
def test_payload_is_refused_when_its_exponent_makes_scales_too_large(exponent: int) -> None:
    payload = bytearray(get_codec("int8").encode(normal()))
    payload[6:8] = struct.pack("<h", exponent)
    with pytest.raises(PayloadError, match="scale"):
        get_codec("int8").decode(bytes(payload), D)


@pytest.mark.parametrize(("name", "dtype"), [("float32", np.float32), ("float16", np.float16)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_payload_is_refused_when_a_value_is_not_finite(name: str, dtype: type, value: float) -> None:
    payload = get_codec(name).encode(normal(100))
    forged = payload[: -np.dtype(dtype).itemsize] + dtype(value).tobytes()
    for read in (get_codec(name).inspect, get_codec(name).decode):
        with pytest.raises(PayloadError, match="NaN"):
            read(forged, 100)


@pytest.mark.parametrize("indices", [[3, 2], [2, 2], [1, 12]])
def test_plain_indices_are_refused_when_unordered_or_out_of_range(indices: list[int]) -> None:
    packed = pack_fields(np.array(indices, np.uint32), 4)
    with pytest.raises(PayloadError):
        read_plain(Reader(memoryview(packed)), 1, 2, 12)


def test_rice_indices_are_refused_when_forged() -> None:
    genuine = pack_rice(np.array([[3, 11]]), 12)
    assert read_rice(Reader(memoryview(genuine)), 1, 2, 12).tolist() == [[3, 11]]
    forged = {
        "an index beyond the chunk": pack_rice(np.array([[3, 12]]), 13),
        "a width that nobody uses": b"\xff" + genuine[1:],
        "a unary stream longer than any": genuine[:1] + struct.pack("<I", 1 << 31) + genuine[5:],
        "a remainder above the divisor": struct.pack("<BI", 1, 1) + b"\x01" + b"\x03",
        "too few numbers": genuine[:-1] + b"\0",
        "too many numbers": genuine[:-1] + b"\xff",
    }
    for packed in forged.values():
        with pytest.raises(PayloadError):
            read_rice(Reader(memoryview(packed)), 1, 2, 12)


# ---- golden payloads: these hashes change only with VERSION, and with the reason in the same commit

GOLDEN = {
    "float16": "c086ceef9ef24757fef72af337ffeb58",
    "float32": "9e7780e3c482be35a81d7adf62a36051",
    "int2": "6308cd01ffdea2f0c4e0cf63c7f87a6b",
    "int4": "989a867903203a7a6fbf93f7aed56bdb",
    "int8": "683e193201b7919ecbc1cdaffdf3bb48",
    "sign": "e8be20efdfd5b737f9359027b05e5152",
    "sparse": "b29424845adffd4ba58c20fd52bdf26d",
}


@pytest.mark.parametrize("name", NAMES)
def test_payload_is_the_golden_one_when_the_vector_is_fixed(name: str) -> None:
    codec = get_codec(name)
    payload = codec.encode(fixed_vector(D))
    decoded = codec.decode(payload, D)
    assert hashlib.sha256(payload + decoded.tobytes()).hexdigest()[:32] == GOLDEN[name]


# ---- error feedback


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_sent_in_the_end_when_errors_are_fed_back(name: str) -> None:
    num_parameters, num_rounds = 512, 150
    codec = get_codec(name, {"k": 64, "chunk": 512} if name == "sparse" else None)
    feedback = ErrorFeedback(num_parameters)
    wanted, sent = np.zeros(num_parameters), np.zeros(num_parameters)
    for seed in range(num_rounds):
        delta = normal(num_parameters, seed) + 1
        payload = codec.encode(feedback.compensate(delta, 1.0))
        feedback.settle(payload)
        wanted += delta
        sent += codec.decode(payload, num_parameters)
    np.testing.assert_allclose(wanted - sent, feedback.state(), atol=2e-3)
    assert np.linalg.norm(wanted - sent) < 0.1 * np.linalg.norm(wanted)


def test_residual_keeps_everything_when_the_payload_was_not_accepted() -> None:
    feedback = ErrorFeedback(D)
    feedback.compensate(normal(), 1.0)
    np.testing.assert_array_equal(feedback.compensate(normal(seed=1), 0.5), np.float32(0.5) * normal() + normal(seed=1))


def test_residual_is_unharmed_when_a_delta_diverged() -> None:
    feedback = ErrorFeedback(3)
    feedback.compensate(np.ones(3, np.float32), 1.0)
    with pytest.raises(PayloadError):
        feedback.compensate(np.array([1, np.nan, 1], np.float32), 1.0)
    np.testing.assert_array_equal(feedback.state(), np.ones(3))


def test_residual_goes_on_where_it_was_when_restored() -> None:
    first, second = ErrorFeedback(D), ErrorFeedback(D)
    first.compensate(normal(), 1.0)
    second.restore(first.state())
    np.testing.assert_array_equal(first.compensate(normal(), 0.9), second.compensate(normal(), 0.9))
    with pytest.raises(ValueError, match="shape"):
        second.restore(normal(D + 1))


@pytest.mark.parametrize("size", [1000, (1 << 20) + 5000])
@pytest.mark.parametrize("name", ["int4", "sparse"])
def test_compression_error_is_what_the_payload_leaves_out(name: str, size: int) -> None:
    vector = np.random.default_rng(3).standard_normal(size).astype(np.float32)
    codec = get_codec(name)
    payload = codec.encode(vector)
    part, decoded = vector[: 1 << 20], codec.decode(payload, size)[: 1 << 20]
    expected = np.linalg.norm(part - decoded) / np.linalg.norm(part)
    assert measure_error(codec, payload, vector) == pytest.approx(expected, rel=1e-4)
    assert measure_error(codec, codec.encode(np.zeros_like(vector)), np.zeros_like(vector)) == 0.0
