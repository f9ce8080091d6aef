"""What holds for every codec, any size and any data; hostile bytes end in PayloadError or in a finite vector."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codecs import CODECS, Codec, codec_of, get_codec
from protocol.codecs.bits import Reader, pack_fields, pack_unary, unary_ends, unpack_fields
from protocol.codecs.indices import pack_plain, pack_rice, plain_bytes, read_plain, read_rice, rice_bytes_max
from protocol.codecs.payload import DECODED_MAX, PIECE_VALUES, SEGMENT_VALUES, PayloadHeader, Vector
from protocol.codecs.selection import select_largest
from protocol.errors import PayloadError

SIZES = st.integers(1, 20_000)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def codecs(draw: st.DrawFn) -> Codec:
    name = draw(st.sampled_from(sorted(CODECS)))
    options: dict[str, int | float] = {}
    if name in ("int8", "int4", "int2", "sign"):
        options = {"block": 8 * draw(st.integers(1, 512))}
    if name == "sparse":
        chunk = 1 << draw(st.integers(4, 13))
        options = {"k": draw(st.integers(1, chunk)), "chunk": chunk, "packing": draw(st.integers(0, 1))}
    return get_codec(name, options)


@st.composite
def vectors(draw: st.DrawFn) -> Vector:
    """Gaussian, heavy-tailed, constant, integer (many ties) or mostly zero, at any magnitude."""
    size, rng = draw(SIZES), np.random.default_rng(draw(SEEDS))
    kind = draw(st.sampled_from(["normal", "cauchy", "constant", "ties", "zeros"]))
    values = rng.standard_normal(size)
    if kind == "cauchy":
        values = rng.standard_cauchy(size)
    elif kind == "constant":
        values = np.full(size, -1.0)
    elif kind == "ties":
        values = rng.integers(-3, 4, size).astype(np.float64)
    elif kind == "zeros":
        values *= rng.random(size) < 0.01
    return (values * 2.0 ** draw(st.integers(-60, 60))).astype(np.float32)


@settings(deadline=None, max_examples=150)
@given(codec=codecs(), vector=vectors(), coefficient=st.floats(0, 2, width=32), seed=SEEDS)
def test_accumulating_is_bitwise_multiplying_and_adding(
    codec: Codec, vector: Vector, coefficient: float, seed: int
) -> None:
    payload = codec.encode(vector)
    assert len(payload) <= codec.payload_bytes_max(vector.size)
    assert codec_of(payload) == codec
    out = np.random.default_rng(seed).standard_normal(vector.size).astype(np.float32)
    expected = out + np.float32(coefficient) * codec.decode(payload, vector.size)
    codec.accumulate(payload, coefficient, out)
    assert out.tobytes() == expected.tobytes()


@settings(deadline=None)
@given(codec=codecs(), size=SIZES, count=st.integers(1, 5), seed=SEEDS)
def test_rows_are_encoded_and_decoded_as_they_are_one_by_one(codec: Codec, size: int, count: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    payloads = codec.encode_rows(rows)
    assert payloads == [codec.encode(row) for row in rows]
    expected = np.stack([codec.decode(payload, size) for payload in payloads])
    assert codec.decode_rows(payloads, size).tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=50)
@given(codec=codecs(), size=st.integers(SEGMENT_VALUES - 5000, SEGMENT_VALUES + 80_000))
def test_pieces_follow_one_another_and_never_cross_a_segment(codec: Codec, size: int) -> None:
    payload = codec.encode(np.ones(size, np.float32))
    place = 0
    for piece in codec.pieces(payload, size):
        assert piece.span.start == place < piece.span.stop
        assert piece.span.start // SEGMENT_VALUES == (piece.span.stop - 1) // SEGMENT_VALUES
        assert np.zeros(piece.span.stop - place)[piece.where].size == piece.values.size
        place = piece.span.stop
    assert place == size


@settings(deadline=None, max_examples=150)
@given(codec=codecs(), vector=vectors())
def test_measured_norm_is_that_of_the_decoded_vector(codec: Codec, vector: Vector) -> None:
    payload = codec.encode(vector)
    decoded = codec.decode(payload, vector.size)
    summary = codec.inspect(payload, vector.size)
    assert summary.codec == codec.name
    assert summary.norm == pytest.approx(float(np.linalg.norm(decoded.astype(np.float64))), rel=1e-9)
    assert np.count_nonzero(decoded) <= summary.num_values <= vector.size


@settings(deadline=None, max_examples=150)
@given(codec=codecs(), vector=vectors())
def test_what_is_left_after_sending_is_never_larger_than_what_was_to_be_sent(codec: Codec, vector: Vector) -> None:
    wide = vector.astype(np.float64)
    left = wide - codec.decode(codec.encode(vector), vector.size)
    assert np.linalg.norm(left) <= np.linalg.norm(wide) * (1 + 1e-6)


@settings(deadline=None)
@given(codec=codecs().filter(lambda codec: codec.name != "float16"), vector=vectors(), power=st.integers(-20, 20))
def test_decoded_values_scale_exactly_when_the_vector_is_scaled(codec: Codec, vector: Vector, power: int) -> None:
    """No magnitude is special: a pseudo-gradient of 1e-6 loses no more than one of 1."""
    factor = np.float32(2.0**power)
    decoded = codec.decode(codec.encode(vector), vector.size)
    scaled = codec.decode(codec.encode(vector * factor), vector.size)
    np.testing.assert_array_equal(scaled, decoded * factor)


@st.composite
def tiny_vectors(draw: st.DrawFn) -> Vector:
    """Zeros, subnormals and the smallest normal values."""
    rng = np.random.default_rng(draw(SEEDS))
    return rng.integers(0, 1 << draw(st.integers(0, 25)), draw(SIZES), dtype=np.uint32).view(np.float32)


@settings(deadline=None, max_examples=300)
@given(vector=vectors() | tiny_vectors(), chunk=st.sampled_from([64, 512]), k=st.integers(1, 64))
def test_selection_is_that_of_a_stable_sort(vector: Vector, chunk: int, k: int) -> None:
    chunks = np.resize(vector, (-(-vector.size // chunk), chunk))
    expected = np.sort(np.argsort(-np.abs(chunks), axis=1, kind="stable")[:, :k], axis=1)
    positions, values = select_largest(chunks, k)
    np.testing.assert_array_equal(positions, expected + chunk * np.arange(len(chunks))[:, None])
    np.testing.assert_array_equal(values, np.take_along_axis(chunks, expected, axis=1))


@settings(deadline=None)
@given(seed=SEEDS, num_chunks=st.integers(1, 20), chunk=st.integers(1, 5000), data=st.data())
def test_positions_come_back_and_keep_their_length_bound(
    seed: int, num_chunks: int, chunk: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(chunk, 300)))
    rng = np.random.default_rng(seed)
    indices = np.sort(np.stack([rng.choice(chunk, k, replace=False) for _ in range(num_chunks)]), axis=1)
    positions = indices + chunk * np.arange(num_chunks)[:, None]
    plain, rice = pack_plain(positions, chunk), pack_rice(positions, chunk)
    assert len(plain) == plain_bytes(num_chunks, k, chunk)
    assert len(rice) <= rice_bytes_max(num_chunks, k, chunk)
    for read, packed in ((read_plain, plain), (read_rice, rice)):
        reader = Reader(memoryview(packed))
        np.testing.assert_array_equal(read(reader, num_chunks, k, chunk), positions)
        reader.finish()


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 2**32 - 1), min_size=1), width=st.integers(0, 32))
def test_fields_and_unary_numbers_come_back(values: list[int], width: int) -> None:
    fields = np.array(values, np.uint32) & np.uint32((1 << width) - 1)
    np.testing.assert_array_equal(unpack_fields(memoryview(pack_fields(fields, width)), fields.size, width), fields)
    small = fields % 50
    ends = unary_ends(memoryview(pack_unary(small)), small.size)
    np.testing.assert_array_equal(np.diff(ends, prepend=-1) - 1, small)


# ---- hostile bytes


def check_hostile(codec: Codec, payload: bytes, num_parameters: int) -> None:
    """Refused by all readers with PayloadError, or read by all of them alike."""
    out = np.zeros(num_parameters, np.float32)
    try:
        summary = codec.inspect(payload, num_parameters)
    except PayloadError:
        with pytest.raises(PayloadError):
            codec.decode(payload, num_parameters)
        with pytest.raises(PayloadError):
            codec.accumulate(payload, 1.0, out)
        if num_parameters <= PIECE_VALUES:  # larger ones are never decoded together
            with pytest.raises(PayloadError):
                codec.decode_rows([codec.encode(np.ones_like(out)), payload], num_parameters)
        return
    decoded = codec.decode(payload, num_parameters)
    codec.accumulate(payload, 1.0, out)
    assert np.all(np.abs(decoded) <= DECODED_MAX)
    np.testing.assert_array_equal(out, decoded)
    if num_parameters <= PIECE_VALUES:
        np.testing.assert_array_equal(codec.decode_rows([payload], num_parameters)[0], decoded)
    assert np.isfinite(summary.norm)


@settings(deadline=None, max_examples=300)
@given(codec=codecs(), seed=SEEDS, size=st.integers(1, 3000), data=st.data())
def test_damaged_payload_is_refused_or_read_as_finite_values(
    codec: Codec, seed: int, size: int, data: st.DataObject
) -> None:
    payload = bytearray(codec.encode(np.random.default_rng(seed).standard_normal(size).astype(np.float32)))
    damage = data.draw(st.sampled_from(["truncate", "extend", "flip", "overwrite"]))
    place = data.draw(st.integers(0, len(payload) - 1))
    if damage == "truncate":
        del payload[place:]
    elif damage == "extend":
        payload += data.draw(st.binary(min_size=1, max_size=40))
    elif damage == "flip":
        payload[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        junk = data.draw(st.binary(min_size=1, max_size=16))
        payload[place : place + len(junk)] = junk
    check_hostile(codec, bytes(payload), size)
    if damage in ("truncate", "extend"):
        with pytest.raises(PayloadError):
            codec.inspect(bytes(payload), size)


@settings(deadline=None, max_examples=300)
@given(codec=codecs(), size=st.integers(1, 400), exponent=st.integers(-(1 << 15), (1 << 15) - 1), data=st.data())
def test_random_body_under_a_genuine_header_is_refused_or_read_as_finite_values(
    codec: Codec, size: int, exponent: int, data: st.DataObject
) -> None:
    genuine = codec.encode(np.ones(size, np.float32))
    header = PayloadHeader.from_bytes(genuine)
    forged = PayloadHeader(codec_id=header.codec_id, exponent=exponent, num_parameters=size, options=header.options)
    length = len(genuine) - len(forged.to_bytes()) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 5]))
    body = data.draw(st.binary(min_size=max(length, 0), max_size=max(length, 0)))
    check_hostile(codec, forged.to_bytes() + body, size)


@settings(deadline=None, max_examples=300)
@given(payload=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_by_everybody(payload: bytes) -> None:
    with pytest.raises(PayloadError):
        codec_of(payload)
    for name in CODECS:
        with pytest.raises(PayloadError):
            get_codec(name).inspect(payload, 10)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_memory_is_a_small_multiple_of_the_model_when_payloads_are_damaged(name: str) -> None:
    size = 1 << 21
    codec = get_codec(name)
    rng = np.random.default_rng(0)
    payload = codec.encode(rng.standard_normal(size).astype(np.float32))
    for _ in range(5):
        damaged = bytearray(payload)
        for place in rng.integers(28, len(payload), 20):
            damaged[place] = rng.integers(256)
        tracemalloc.start()
        try:
            check_hostile(codec, bytes(damaged), size)
            assert tracemalloc.get_traced_memory()[1] < 6 * 4 * size
        finally:
            tracemalloc.stop()
