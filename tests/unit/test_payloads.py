"""What the coordinator finds out about a payload before it counts."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from coordinator.core.effects import CheckPayload
from coordinator.core.events import PayloadChecked
from coordinator.payloads import PayloadChecker
from protocol.codecs import get_codec
from protocol.exchange.piece_index import make_piece_index
from protocol.exchange.store import BlobStore
from protocol.signing import sha256_hex

NUM_PARAMETERS = 200_000
CODEC = get_codec("float32", {})
PAYLOAD = CODEC.encode(np.linspace(-1.0, 1.0, NUM_PARAMETERS, dtype=np.float32))
INDEX = make_piece_index(PAYLOAD)


async def check(store: BlobStore, **changes: object) -> PayloadChecked:
    """What the core is told of PAYLOAD, announced with these changes."""
    told: asyncio.Queue[PayloadChecked] = asyncio.Queue()
    checker = PayloadChecker(store, NUM_PARAMETERS, told.put_nowait)
    facts = {"payload_bytes": len(PAYLOAD), "pieces_hash": sha256_hex(INDEX), **changes}
    checker.expect(
        CheckPayload(peer="ann", payload_hash=store.put(PAYLOAD), codec="float32", codec_options=(), **facts)
    )  # type: ignore[arg-type]
    return await told.get()


async def test_piece_index_is_kept_for_others_when_a_payload_is_right(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    checked = await check(store)
    assert checked.refused_because == ""
    assert checked.norm > 0
    assert store.read(sha256_hex(INDEX)) == INDEX


@pytest.mark.parametrize("pieces_hash", ["ab" * 32, None])
async def test_payload_is_refused_when_its_piece_index_is_another(tmp_path: Path, pieces_hash: str | None) -> None:
    assert "piece index" in (await check(BlobStore(tmp_path), pieces_hash=pieces_hash)).refused_because


async def test_payload_is_refused_when_its_size_is_not_the_announced(tmp_path: Path) -> None:
    assert "its header says 7" in (await check(BlobStore(tmp_path), payload_bytes=7)).refused_because
