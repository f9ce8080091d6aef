"""A run folder: what is in it, and how a new one is made.

run.toml          the run's description, as it was given
coordinator.key   Ed25519 identity (0600)         tls.key, tls.crt    what invites pin
run.db            journal, ledger, rounds          blobs/              shards, states, payloads, by hash
checkpoints/      Hugging Face layout              running.json        address and pid while it runs
operator-token    what signs in on the page (0600)
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex, token_urlsafe

from coordinator import tls
from coordinator.ledger import LedgerWriter
from coordinator.shards import cut_shards
from coordinator.storage.database import Batch, Database, sqlite_url
from protocol.documents import PROTOCOL_VERSION, Genesis
from protocol.errors import ConfigError, DiskFullError
from protocol.exchange.store import BlobStore, naming_full_disks
from protocol.identity import Identity
from protocol.run_spec import CoordinatorSpec, InviteSpec, RunSpec, load_run_spec
from protocol.signing import Signed
from protocol.tokenizer import load_tokenizer

MIN_FREE_BYTES = 50 << 20
MIN_TOKEN_CHARS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialModel:
    """What the model process reports: the blobs that it wrote into the store."""

    num_parameters: int
    digest: str
    config_hash: str


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths and keys of one run. Opening it makes what is missing."""

    path: Path

    @property
    def spec_path(self) -> Path:
        return self.path / "run.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def running_path(self) -> Path:
        return self.path / "running.json"

    @property
    def store(self) -> BlobStore:
        return BlobStore(self.path / "blobs")

    def spec(self) -> RunSpec:
        """Raises ConfigError where there is no run, or its run.toml is not usable."""
        if not self.spec_path.is_file():
            raise ConfigError(f"{self.path} is not a run folder: it has no run.toml")
        return load_run_spec(self.spec_path)

    def identity(self) -> Identity:
        return Identity.load_or_create(self.path / "coordinator.key")

    def operator_token(self) -> str:
        """What the operator signs in with on the page; made at the first start, with mode 0600."""
        path = self.path / "operator-token"
        with suppress(FileNotFoundError):
            token = path.read_text(encoding="utf-8").strip()
            if len(token) < MIN_TOKEN_CHARS:
                raise ConfigError(f"{path} is no operator's token; remove it to have a new one made")
            return token
        token = token_urlsafe(24)
        with naming_full_disks(self.path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(token + "\n")
                file.flush()
                os.fsync(file.fileno())
        return token

    def tls(self) -> tuple[bytes, bytes]:
        return tls.load_or_create(self.path / "tls.key", self.path / "tls.crt")

    def open_database(self, spec: RunSpec) -> Database:
        return Database(spec.coordinator.database or sqlite_url(self.path))

    def create(self, run_toml: Path) -> RunSpec:
        """Make the folder from a run.toml. Nothing is left behind when the file is not usable."""
        spec = load_run_spec(run_toml)
        with naming_full_disks(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
            if free < MIN_FREE_BYTES:
                raise DiskFullError(
                    f"the disk of {self.path} is full: {free >> 20} MB free, {MIN_FREE_BYTES >> 20} MB are needed"
                    " to begin; free some space or give another --folder"
                )
            if run_toml.resolve() != self.spec_path.resolve():
                shutil.copyfile(run_toml, self.spec_path)
        return spec

    def read_running(self) -> dict[str, object] | None:
        """Where the coordinator of this folder listens, when one runs."""
        try:
            running: dict[str, object] = json.loads(self.running_path.read_text())
            os.kill(int(str(running["pid"])), 0)
        except (OSError, ValueError, KeyError):
            return None
        return running


def find_genesis(database: Database) -> Signed | None:
    """The run's first ledger entry, or None for a run that was never prepared."""
    row = next(database.read_ledger(0), None)
    return row.signed if row else None


def prepare(
    folder: RunFolder,
    spec: RunSpec,
    database: Database,
    initialize_model: Callable[[int], Callable[[], InitialModel]],
    progress: Callable[[int], None] | None = None,
) -> Signed:
    """Cut the shards, have the model made, and write the genesis. Returns the genesis.

    `initialize_model(vocabulary_size)` starts making the model and returns what waits for it: the coordinator itself
    never loads torch.
    """
    store = folder.store
    tokenizer = load_tokenizer(spec.data.tokenizer)
    finish_model = initialize_model(tokenizer.vocabulary_size)
    plan = cut_shards(spec, tokenizer, store, progress)
    tokenizer_hash = None if spec.data.tokenizer == "bytes" else store.put(tokenizer.to_json())
    model = finish_model()
    if not store.has(model.digest):
        raise ConfigError("the initial state was not written into the run folder")
    writer = LedgerWriter(folder.identity(), token_hex(8), spec, None)
    row = writer.append_genesis(
        lambda seq, previous: Genesis(
            run_id=writer.run_id,
            seq=seq,
            previous=previous,
            protocol_version=PROTOCOL_VERSION,
            # Where it listens, and whom it lets in, is nobody's business, and may change.
            spec=spec.model_copy(update={"coordinator": CoordinatorSpec(), "invite": InviteSpec()}),
            created_unix_s=int(time.time()),
            num_parameters=model.num_parameters,
            initial_digest=model.digest,
            model_config_hash=model.config_hash,
            tokenizer_hash=tokenizer_hash,
            shard_index_hash=plan.shard_index_hash,
            held_out_hash=plan.held_out_hash,
            num_shards=len(plan.shard_hashes),
            vocabulary_size=tokenizer.vocabulary_size,
        ),
        time.time(),
    )
    signed = row.signed
    database.commit(Batch(ledger=[row]))
    return signed
