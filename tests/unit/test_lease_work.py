"""A lease that ends at an awkward moment."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from protocol.exchange.store import BlobStore
from protocol.signing import Signed
from worker.lease_work import LeaseWork


class EncodingContributor:
    """Trains in no time and encodes until told."""

    def __init__(self) -> None:
        self.encoding, self.may_end = asyncio.Event(), asyncio.Event()

    def compute_deadline_s(self, lease: Any, age_s: float) -> float:
        return float("inf")

    async def fetch(self, lease: Any, link: Any) -> None: ...

    async def train(self, lease: Any, state: Any, **callbacks: Any) -> Any:
        return SimpleNamespace(shards=(0,))

    async def keep(self, lease: Any, state: Any, trained: Any) -> Any:
        return np.zeros(1, np.float32)

    async def encode(self, lease: Any, trained: Any, residual: Any) -> Any:
        self.encoding.set()
        await self.may_end.wait()
        return SimpleNamespace(payload_hash="p"), Signed(body=b"", public_key=b"", signature=b"")


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_what_is_encoded_after_the_round_is_not_delivered(tmp_path: Any, how: str) -> None:
    # Its owner reads the coordinator's answers: waiting for one here would be waiting for itself.
    contributor = EncodingContributor()
    pace = SimpleNamespace(paused=False, throttle=1.0)
    work = LeaseWork(
        cast(Any, contributor), BlobStore(tmp_path), pace=pace, show=lambda _: None, on_step=lambda _: None
    )
    sent: list[Any] = []
    work.attach(cast(Any, SimpleNamespace(send=lambda **message: sent.append(message))))
    lease = SimpleNamespace(lease_id=1, round=3, base_digest="d", ahead=(), contribute=True, shards=(0,))
    await work.begin(cast(Any, lease), cast(Any, SimpleNamespace(digest="d")))
    await contributor.encoding.wait()
    ending = asyncio.create_task(work.end() if how == "stop" else work.close_round(3))
    await asyncio.sleep(0)
    contributor.may_end.set()
    await asyncio.wait_for(ending, 5.0)
    assert not sent
