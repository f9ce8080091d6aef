"""What a worker has done and not yet been credited for, over a restart.

work.safetensors     the error feedback, what is pending, and which shards are carried: one file, so that they agree
optimizer.safetensors  the inner optimizer's state

Saved after a lease and at the end; a crash loses at most the lease in hand. Where saving takes long it is done less
often, so that it never takes more than a small share of the time.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from protocol.codecs.payload import Vector
from protocol.documents import ShardRef
from protocol.errors import VerificationError
from worker.disk import write_tensors
from worker.optimizers import InnerOptimizer, find_saved_kind

MOST_OF_THE_TIME = 0.05  # that saving takes


class Pending(BaseModel):
    """A contribution that no manifest has listed yet."""

    model_config = ConfigDict(frozen=True)

    round: int
    payload_hash: str
    shards: tuple[ShardRef, ...]


class Unlisted(BaseModel):
    """Work that no manifest has listed. `round`: manifests before it are taken into account."""

    model_config = ConfigDict(frozen=True)

    round: int
    pending: Pending | None
    carried: tuple[ShardRef, ...]


class SavedWork:
    """The files of one run's work in a folder."""

    def __init__(self, folder: Path) -> None:
        self._work_path = folder / "work.safetensors"
        self._optimizer_path = folder / "optimizer.safetensors"
        self._next_s = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._next_s

    @property
    def optimizer_name(self) -> str | None:
        """Of the optimizer whose state was saved; None: of none."""
        return find_saved_kind(self._optimizer_path)

    def save(self, unlisted: Unlisted, residual: Vector, optimizer_state: Mapping[str, Tensor]) -> None:
        """Replace both files. optimizer_state: InnerOptimizer.state(). Raises DiskFullError."""
        started_s = time.monotonic()
        facts = torch.frombuffer(bytearray(unlisted.model_dump_json().encode()), dtype=torch.uint8)
        write_tensors(self._work_path, {"residual": torch.from_numpy(residual), "unlisted": facts})
        write_tensors(self._optimizer_path, optimizer_state)
        now_s = time.monotonic()
        self._next_s = now_s + (now_s - started_s) / MOST_OF_THE_TIME

    def save_optimizer(self, optimizer: InnerOptimizer) -> None:
        """Replace the second file alone. Raises DiskFullError."""
        optimizer.save(self._optimizer_path)

    def load(self, optimizer: InnerOptimizer) -> tuple[Unlisted, Vector] | None:
        """What `save` kept, the optimizer's state being put into `optimizer`; None when there is nothing.

        Raises VerificationError when a file is damaged or another model's.
        """
        if not self._work_path.exists():
            if self._optimizer_path.exists():  # from the middle of the first lease
                optimizer.load(self._optimizer_path)
            return None
        try:
            tensors = load_file(self._work_path)
            unlisted = Unlisted.model_validate_json(bytes(tensors["unlisted"].numpy()))
            residual: Vector = tensors["residual"].numpy()
        except (SafetensorError, KeyError, ValidationError, TypeError) as error:
            raise VerificationError(f"{self._work_path} cannot be read ({error}); it is not used") from error
        if self._optimizer_path.exists():
            optimizer.load(self._optimizer_path)
        return unlisted, residual
