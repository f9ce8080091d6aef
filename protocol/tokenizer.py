"""Text to token ids and back.

`bytes` is the built-in tokenizer: a token is a byte of the UTF-8 text, and 256 ends a document. Any other one is a
tokenizer.json, the format of the `tokenizers` library, which also travels to workers as a blob. Text is data: a literal
"<|endoftext|>" in it is encoded as the letters that it is, never as the token that ends a document.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from protocol.errors import ConfigError, VerificationError
from protocol.shard_format import token_dtype

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")

TokenIds = NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    """What training needs of a tokenizer. Ids are 0 … vocabulary_size - 1."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def end_of_text_id(self) -> int: ...

    def encode_to_array(self, text: str) -> TokenIds:
        """Ids of the text, shape (tokens,), uint16 where the vocabulary allows it, else uint32; nothing is added."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text, with U+FFFD where the bytes are not UTF-8. Raises ValueError for an id outside the vocabulary."""

    def to_json(self) -> bytes:
        """A tokenizer.json that gives the same ids."""


class ByteTokenizer:
    """One token a byte, and 256 at a document's end."""

    vocabulary_size = 257
    end_of_text_id = 256

    def encode_to_array(self, text: str) -> NDArray[np.uint16]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        array = _checked(ids, self.vocabulary_size)
        stretches = np.split(array, np.flatnonzero(array == self.end_of_text_id))
        texts = (stretch[stretch != self.end_of_text_id].astype(np.uint8).tobytes() for stretch in stretches)
        return END_OF_TEXT.encode().join(texts).decode(errors="replace")

    def to_json(self) -> bytes:
        alphabet = {character: byte for byte, character in enumerate(_byte_alphabet())}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return str(tokenizer.to_str()).encode()


class JsonTokenizer:
    """A tokenizer.json. Raises ValueError when `data` is none, or when it has no token that ends a text."""

    def __init__(self, data: bytes) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()  # some files ask for both, for a model's sake
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as the letters that they are
        self._json = data
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = (vocabulary[name] for name in _END_NAMES if name in vocabulary)
        end_of_text_id = next(ends, None)
        if end_of_text_id is None:
            raise ValueError(f"none of its tokens ends a text ({', '.join(_END_NAMES)}); add one as a special token")
        self.end_of_text_id: int = end_of_text_id
        self.vocabulary_size: int = max(vocabulary.values()) + 1  # ids may have holes
        self._dtype = token_dtype(self.vocabulary_size)

    def encode_to_array(self, text: str) -> TokenIds:
        # the call for a batch, as it alone leaves out the offsets: a third faster
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=self._dtype)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        array = _checked(ids, self.vocabulary_size)
        return str(self._tokenizer.decode(array.tolist(), skip_special_tokens=False))

    def to_json(self) -> bytes:
        return self._json


def load_tokenizer(spec_value: str) -> Tokenizer:
    """The tokenizer that run.toml's `data.tokenizer` names: `bytes`, a tokenizer.json or a folder that holds one.

    Raises ConfigError when there is none, or when it cannot be used.
    """
    if spec_value == "bytes":
        return ByteTokenizer()
    path = Path(spec_value).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return JsonTokenizer(path.read_bytes())
    except FileNotFoundError as error:
        remedy = "give `bytes` or a folder with a tokenizer.json, as a fast tokenizer's save_pretrained writes it"
        raise ConfigError(f"data.tokenizer: there is no {path}; {remedy}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer: {path}: {error}") from error


def tokenizer_from_json(data: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json that came as a blob. Raises VerificationError when it is not one."""
    try:
        return JsonTokenizer(data)
    except ValueError as error:
        raise VerificationError(f"the run's tokenizer: {error}") from error


def _checked(ids: Sequence[int] | NDArray[Any], vocabulary_size: int) -> NDArray[np.int64]:
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and (array.min() < 0 or array.max() >= vocabulary_size):
        raise ValueError(f"a token id is outside the vocabulary of {vocabulary_size}")
    return array


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: its own where it has one, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
