"""Where a worker keeps its things, and the file that says what it is doing.

identity.key            this machine's key, for all runs
runs/RUN_ID/blobs/      shards, states, payloads
runs/RUN_ID/receipts*       what the coordinator signed for accepted work: worker.receipts
runs/RUN_ID/{work,optimizer,lease}.safetensors  what is done and not yet credited: worker.saved_work, worker.saved_lease
runs/RUN_ID/status.json what it is doing now       runs/RUN_ID/lock    held while it runs
"""

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from protocol.errors import ManyhandsError
from protocol.exchange.store import BlobStore, naming_full_disks
from protocol.identity import Identity
from worker.receipts import Receipts


def default_home() -> Path:
    """The platform's place for a user's data."""
    return Path(platformdirs.user_data_dir("manyhands"))


@dataclass(frozen=True, slots=True)
class RunHome:
    """A worker's folder for one run."""

    home: Path
    run_id: str

    @property
    def folder(self) -> Path:
        return self.home / "runs" / self.run_id

    @property
    def identity_path(self) -> Path:
        return self.home / "identity.key"

    @property
    def status_path(self) -> Path:
        return self.folder / "status.json"

    @property
    def receipts(self) -> Receipts:
        return Receipts(self.folder)

    @property
    def store(self) -> BlobStore:
        return BlobStore(self.folder / "blobs")

    def identity(self) -> Identity:
        return Identity.load_or_create(self.identity_path)

    def lock(self) -> int:
        """Hold the run's lock until the process ends. Raises ManyhandsError when another worker has it."""
        with naming_full_disks(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            pid = self.read_status().get("pid", "?")
            raise ManyhandsError(
                f"a worker of this run is running already (process {pid}); `manyhands worker stop` ends it, "
                "another --home starts a second one"
            ) from error
        return descriptor

    def write_status(self, status: dict[str, object]) -> None:
        """Replace status.json. A full disk is not a reason to stop computing: the file is for display."""
        temporary = Path(f"{self.status_path}.tmp")
        try:
            temporary.write_text(json.dumps({"pid": os.getpid(), "unix_s": time.time(), **status}))
            temporary.replace(self.status_path)
        except OSError:
            temporary.unlink(missing_ok=True)

    def read_status(self) -> dict[str, object]:
        try:
            status: dict[str, object] = json.loads(self.status_path.read_text())
        except (OSError, ValueError):
            return {}
        return status


def list_runs(home: Path) -> list[RunHome]:
    """Every run that this machine has worked for."""
    folder = home / "runs"
    return [RunHome(home, path.name) for path in sorted(folder.iterdir())] if folder.is_dir() else []


def is_running(pid: object) -> bool:
    """Whether a process with this id is there."""
    try:
        os.kill(int(str(pid)), 0)
    except (OSError, ValueError):
        return False
    return True
