"""Tokenizers: the same ids on every path, and a text is never mistaken for a control token."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigError, VerificationError
from protocol.tokenizer import END_OF_TEXT, ByteTokenizer, JsonTokenizer, load_tokenizer, tokenizer_from_json

BYTES = ByteTokenizer()
BYTES_AS_JSON = tokenizer_from_json(BYTES.to_json())
TEXT = st.text() | st.lists(st.sampled_from([END_OF_TEXT, " ", "\r\n", "é", "日本", "\0", "👩‍🚀", "don't"])).map(
    "".join
)


def word_level(*words: str) -> bytes:
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return str(tokenizer.to_str()).encode()


@settings(deadline=None)
@given(text=TEXT)
def test_json_gives_the_same_ids_when_text_is_any(text: str) -> None:
    ids = BYTES.encode_to_array(text)
    assert ids.dtype == BYTES_AS_JSON.encode_to_array(text).dtype == np.uint16
    assert ids.tolist() == BYTES_AS_JSON.encode_to_array(text).tolist() == list(text.encode())
    assert BYTES.decode(ids) == BYTES_AS_JSON.decode(ids) == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 256)))
def test_json_gives_the_same_text_when_ids_are_any(ids: list[int]) -> None:
    assert BYTES.decode(ids) == BYTES_AS_JSON.decode(np.array(ids, dtype=np.uint16))


def test_end_of_text_is_the_last_id_when_tokens_are_bytes() -> None:
    assert (BYTES.vocabulary_size, BYTES.end_of_text_id) == (257, 256)
    assert (BYTES_AS_JSON.vocabulary_size, BYTES_AS_JSON.end_of_text_id) == (257, 256)
    assert BYTES.decode([104, 105, 256, 104]) == f"hi{END_OF_TEXT}h"
    assert BYTES.to_json() == BYTES.to_json()


def test_transformers_reads_it_when_saved(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    path.write_bytes(BYTES.to_json())
    fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = " Grüße,\n\t日本 👩‍🚀 \0  don't"
    ids = fast(text)["input_ids"]
    assert ids == BYTES.encode_to_array(text).tolist()
    assert fast.decode(ids) == text
    assert fast.convert_tokens_to_ids(END_OF_TEXT) == 256
    assert len(fast) == 257


@pytest.mark.parametrize("ids", [[257], [-1], [0, 1 << 40]])
def test_decode_refuses_when_an_id_is_unknown(ids: list[int]) -> None:
    for tokenizer in (BYTES, BYTES_AS_JSON):
        with pytest.raises(ValueError, match="outside the vocabulary of 257"):
            tokenizer.decode(ids)


def test_folder_is_read_when_it_holds_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_buffer(word_level("[UNK]", "</s>", "hello", "world"))
    tokenizer.enable_truncation(1)  # a file may ask for both; data must be neither cut nor filled up
    tokenizer.enable_padding(length=8, pad_token="[UNK]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(place))
        assert loaded.encode_to_array("hello world hello").tolist() == [2, 3, 2]
        assert loaded.decode([2, 1]) == "hello </s>"
        assert (loaded.vocabulary_size, loaded.end_of_text_id) == (4, 1)
    again = tokenizer_from_json(loaded.to_json())
    assert again.encode_to_array("world hello").tolist() == [3, 2]


def test_ids_are_wide_when_the_vocabulary_is_large() -> None:
    tokenizer = JsonTokenizer(word_level("<eos>", *(f"w{index}" for index in range(1 << 16))))
    assert tokenizer.vocabulary_size == (1 << 16) + 1
    ids = tokenizer.encode_to_array("w0 w65535")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [1, 1 << 16]


def test_byte_tokenizer_is_meant_when_the_spec_says_bytes() -> None:
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        (b"", "not a tokenizer.json"),
        (b"\xff{}", "not a tokenizer.json"),
        (word_level("a", "b"), "none of its tokens ends a text"),
    ],
)
def test_one_line_names_the_file_when_it_is_of_no_use(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    if content is not None:
        with pytest.raises(VerificationError, match=message):
            tokenizer_from_json(content)
