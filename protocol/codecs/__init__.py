"""Codecs: a float32 pseudo-gradient to bytes and back, one module a codec, and the registry of them.

    codec = get_codec("sparse", {"k": 64})
    payload = codec.encode(delta)                    # self-describing: magic, version, codec, options, D
    summary = codec.inspect(payload, D)              # every check on hostile bytes, and the norm
    codec_of(payload).accumulate(payload, c, total)  # total += c * decoded, bitwise the same on every machine

| codec | bytes a parameter | options (default) |
|---|---|---|
| float32, float16 | 4, 2 | |
| int8, int4, int2 | 1.008, 0.508, 0.258 | block (256): values a scale |
| sign | 0.133 | block (256) |
| sparse | 0.0190 | k (64) of every chunk (4096); packing (1): indices plain 0, Rice 1 |

The interface is `Codec` in protocol.codecs.payload. Nothing here imports torch, signs, or does I/O.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache

from protocol.codecs.float16 import Float16Codec
from protocol.codecs.float32 import Float32Codec
from protocol.codecs.int2 import Int2Codec
from protocol.codecs.integer import Int4Codec, Int8Codec
from protocol.codecs.payload import HEADER_BYTES, Codec, PayloadHeader, PayloadSummary, PiecewiseCodec
from protocol.codecs.sign import SignCodec
from protocol.codecs.sparse import SparseCodec
from protocol.errors import ConfigError, PayloadError

__all__ = ["CODECS", "Codec", "PayloadSummary", "codec_of", "get_codec"]

CODECS: dict[str, type[PiecewiseCodec]] = {
    codec.name: codec for codec in (Float32Codec, Float16Codec, Int8Codec, Int4Codec, Int2Codec, SignCodec, SparseCodec)
}
_BY_ID = {codec.codec_id: codec for codec in CODECS.values()}


def get_codec(name: str, options: Mapping[str, int | float] | None = None) -> Codec:
    """The codec of that name with these options. Raises ConfigError for an unknown name, option or value."""
    codec = CODECS.get(name)
    if codec is None:
        raise ConfigError(f"unknown codec `{name}`; did you mean `{_nearest(name, CODECS)}`?")
    known = _option_names(codec)
    for option, value in (options or {}).items():
        if option not in known:
            hint = f"did you mean `{_nearest(option, known)}`?" if known else "it has none"
            raise ConfigError(f"unknown option `{option}` of the codec {name}; {hint}")
        if not float(value).is_integer():
            raise ConfigError(f"codec {name}: {option} = {value} is not a whole number")
    return codec(**{option: int(value) for option, value in (options or {}).items()})


def codec_of(payload: bytes) -> Codec:
    """The codec, with its options, that a payload's header names. Raises PayloadError when there is no such codec."""
    return _codec_named(payload[:HEADER_BYTES])


@lru_cache(maxsize=64)
def _codec_named(start: bytes) -> Codec:
    header = PayloadHeader.from_bytes(start)
    codec, options = _BY_ID.get(header.codec_id), header.options
    if codec is None:
        raise PayloadError(f"the payload names codec {header.codec_id}, which this program does not know")
    names = _option_names(codec)
    if any(options[len(names) :]):
        raise PayloadError(f"the payload holds options that the codec {codec.name} does not have")
    try:
        return codec(**dict(zip(names, options, strict=False)))
    except ConfigError as error:
        raise PayloadError(f"the payload's options: {error}") from error


def _option_names(codec: type[PiecewiseCodec]) -> list[str]:
    return [field.name for field in fields(codec)]  # type: ignore[arg-type]  # every codec is a dataclass


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
