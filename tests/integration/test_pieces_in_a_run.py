"""A whole run with real processes whose payloads have several pieces: workers pass them to each other."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from coordinator.run_folder import RunFolder
from protocol.exchange.fetch import fetch_blob
from protocol.exchange.piece_index import PIECE_BYTES, PieceIndex, make_piece_index
from protocol.exchange.piece_writer import PieceWriter
from protocol.exchange.store import BlobStore
from protocol.identity import Identity
from protocol.invite import decode_invite
from protocol.signing import sha256_hex
from tests.processes import TINY_MODEL, RunningCoordinator, read_manifests, start_coordinator, start_worker
from worker.link import CoordinatorLink, Introduction


def test_workers_pass_payloads_on_in_pieces_when_one_is_a_seed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = {
        "model": {"config": {**TINY_MODEL, "hidden_size": 128}},  # with float32 0.6 MB a payload
        "train": {"tokens": 3_000},
        "round": {"min_peers": 3},
        "exchange": {"codec": "float32"},
    }
    with start_coordinator(folder, options=["--no-validator", "--exit-when-finished"], **overrides) as coordinator:
        asyncio.run(fetch_rest_of_state(coordinator, tmp_path))
        with (
            start_worker(coordinator.invite, tmp_path / "ada", options=["--seed"]) as ada,
            start_worker(coordinator.invite, tmp_path / "ben") as ben,
            start_worker(coordinator.invite, tmp_path / "cleo") as cleo,
        ):
            for worker in (ada, ben, cleo):
                assert worker.process.wait(90) == 0, worker.last_lines()
        assert coordinator.process.wait(30) == 0, coordinator.last_lines()

    entries = [entry for manifest in read_manifests(folder) for entry in manifest.contributions]
    store = RunFolder(folder).store
    assert {entry.peer for entry in entries} == {status(tmp_path / name)["peer"] for name in ("ada", "ben", "cleo")}
    for entry in entries:
        assert entry.pieces_hash == sha256_hex(make_piece_index(store.path(entry.payload_hash)))
        assert entry.pieces_hash is not None
        assert store.has(entry.pieces_hash)
    payload_bytes = sum(entry.payload_bytes for entry in entries)
    received_bytes = sum(int(str(status(tmp_path / name)["bytes_received"])) for name in ("ada", "ben", "cleo"))
    assert received_bytes > 1.5 * payload_bytes  # each payload to two others, from workers as a rule
    verified = [sys.executable, "-m", "manyhands", "verify", str(folder)]
    assert subprocess.run(verified, capture_output=True, check=False, timeout=60).returncode == 0


def status(home: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(next(home.glob("runs/*/status.json")).read_text())
    return found


async def fetch_rest_of_state(coordinator: RunningCoordinator, folder: Path) -> None:
    """The initial state from the coordinator, in pieces, of which the second is here already."""
    store, theirs = BlobStore(folder / "stranger"), RunFolder(coordinator.folder).store
    invite, coordinator_key = decode_invite(coordinator.invite)
    async with CoordinatorLink(coordinator.invite, invite, coordinator_key, Identity.generate()) as link:
        welcome = await link.join(Introduction(name="stranger", device="none", software="test"))
        digest, state = welcome.checkpoint_digest, theirs.read(welcome.checkpoint_digest)
        index = make_piece_index(state)
        with PieceWriter(store, digest, PieceIndex.parse(index, len(state))) as writer:
            assert writer.write(1, state[PIECE_BYTES : 2 * PIECE_BYTES])
            assert len(writer.missing) == 2
        await fetch_blob(store, digest, len(state), [link], pieces_hash=store.put(index))
        await link.drain()
    assert store.read(digest) == state
