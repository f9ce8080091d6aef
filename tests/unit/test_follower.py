"""Catching up: missed payloads or the checkpoint, whichever is lighter and to be had; the digest is right."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from protocol.codecs import get_codec
from protocol.documents import Accepted, Manifest
from protocol.errors import MissingBlobError, UnavailableError
from protocol.exchange.source import BlobSink
from protocol.exchange.store import BlobStore
from protocol.replica import State, apply_manifest
from protocol.run_spec import parse_run_spec
from protocol.signing import sha256_hex
from protocol.wire import coordinator_pb2 as pb
from worker.follower import Follower

NUM_PARAMETERS = 1000
PEER = "12D3KooW" + "A" * 44
ROUNDS = 6


class Run:
    """A run of ROUNDS rounds whose last checkpoint is of round 5, and its coordinator as a follower sees it."""

    name = "the coordinator"
    peer_id = PEER

    def __init__(self, codec: str) -> None:
        rng = np.random.default_rng(0)
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.manifests: list[Manifest] = []
        self.states = [State(0, rng.standard_normal(NUM_PARAMETERS, dtype=np.float32))]
        for round_ in range(ROUNDS):
            payload = get_codec(codec).encode(rng.standard_normal(NUM_PARAMETERS, dtype=np.float32))
            self.blobs[sha256_hex(payload)] = payload
            self.manifests.append(self._manifest(round_, payload, codec))
            self.states.append(apply_manifest(self.states[-1], self.manifests[-1], self.blobs.__getitem__))
        checkpoint = self.states[5]
        self.blobs[checkpoint.digest] = checkpoint.to_bytes()
        self.welcome = pb.Welcome(checkpoint_round=5, checkpoint_digest=checkpoint.digest, round=ROUNDS)
        spec = parse_run_spec({"outer": {"optimizer": "average"}})
        self.genesis = SimpleNamespace(num_parameters=NUM_PARAMETERS, spec=spec)

    def _manifest(self, round_: int, payload: bytes, codec: str) -> Manifest:
        entry = Accepted(
            peer=PEER,
            name="ada",
            contribution_hash="0" * 64,
            payload_hash=sha256_hex(payload),
            payload_bytes=len(payload),
            codec=codec,
            tokens=10,
            norm=1.0,
            weight=1.0,
            clip=1.0,
        )
        return Manifest(
            run_id="0" * 16,
            seq=round_ + 1,
            previous="0" * 64,
            round=round_,
            base_digest=self.states[-1].digest,
            rule="mean",
            outer_optimizer="average",
            outer_learning_rate=1.0,
            outer_momentum=0.0,
            divisor=1.0,
            contributions=(entry,),
            leased_peers=1,
            closed_because="all committed",
            inner_steps=20,
            plan="as run.toml says",
            tokens_after=10 * (round_ + 1),
        )

    async def manifests_from(self, round_: int) -> AsyncIterator[Manifest]:
        for manifest in self.manifests[max(0, round_) :]:
            yield manifest

    async def fetch(self, blob_hash: str, size_bytes: int, sink: BlobSink) -> None:
        self.asked.append(blob_hash)
        if blob_hash not in self.blobs:
            raise MissingBlobError(blob_hash)
        await sink.write(self.blobs[blob_hash][sink.offset : sink.end])

    def lose_payloads(self) -> None:
        for manifest in self.manifests[:5]:
            del self.blobs[manifest.contributions[0].payload_hash]

    def lose_checkpoint(self) -> None:
        del self.blobs[self.states[5].digest]


async def catch_up(run: Run, folder: Path, *, from_round: int = 1) -> list[int]:
    """A follower that stands at `from_round` catches up; the rounds that it noted on the way."""
    noted: list[int] = []
    link: Any = run
    follower = Follower(BlobStore(folder), on_manifest=lambda manifest: noted.append(manifest.round))
    follower.state, follower._noted = run.states[from_round], from_round
    state = await follower.catch_up(link)
    assert state.round == ROUNDS
    assert state.digest == run.states[-1].digest
    return noted


async def test_missed_rounds_are_replayed_when_their_payloads_are_lighter_than_the_state(tmp_path: Path) -> None:
    run = Run("int2")
    assert await catch_up(run, tmp_path) == [1, 2, 3, 4, 5]
    assert run.states[5].digest not in run.asked


async def test_checkpoint_is_taken_and_every_manifest_noted_when_it_is_lighter(tmp_path: Path) -> None:
    run = Run("float32")
    assert await catch_up(run, tmp_path) == [1, 2, 3, 4, 5]
    assert run.asked == [run.states[5].digest, run.manifests[5].contributions[0].payload_hash]


@pytest.mark.parametrize("codec", ["int2", "float32"])
async def test_other_way_is_taken_when_one_is_closed(tmp_path: Path, codec: str) -> None:
    run = Run(codec)
    if codec == "int2":
        run.lose_payloads()
    else:
        run.lose_checkpoint()
    assert await catch_up(run, tmp_path) == [1, 2, 3, 4, 5]


async def test_error_says_what_is_missing_when_both_ways_are_closed(tmp_path: Path) -> None:
    run = Run("int2")
    run.lose_payloads()
    run.lose_checkpoint()
    with pytest.raises(UnavailableError, match=run.states[5].digest[:12]):
        await catch_up(run, tmp_path)
