"""A lease in the middle, on the disk: what `worker start --checkpoint-steps` keeps, so that a crash loses less than it.

lease.safetensors    where the worker has come to in its lease, and which lease that is

The worker that comes back in the round of the lease goes on from there (`resume`). When the round is over by then, what
was trained goes into the error feedback: it is in the next contribution, only without credit. The file goes when what
it holds is in worker.saved_work's.
"""

from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from protocol.codecs.payload import Vector
from protocol.documents import Lease, ShardRef
from worker.disk import write_tensors

log = structlog.get_logger()


class LeaseFacts(BaseModel):
    """Which lease, and how far it is done."""

    model_config = ConfigDict(frozen=True)

    lease: Lease
    received_unix_s: float
    steps_done: int
    lead_shards: tuple[ShardRef, ...]  # trained before the lease came, to be named with its own


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease in the middle. displacement, float32 (D,): the state that it is from, minus where the worker was."""

    facts: LeaseFacts
    displacement: Vector

    @property
    def lease(self) -> Lease:
        return self.facts.lease


class SavedLease:
    """The file, in one run's folder. every_steps: inner steps between two writes; 0: it is never written."""

    def __init__(self, folder: Path, every_steps: int = 0) -> None:
        self._path = folder / "lease.safetensors"
        self._every_steps = every_steps

    def is_due(self, inner_step: int, num_inner_steps: int) -> bool:
        """Whether to save after this step; after the last one the work itself is saved."""
        return self._every_steps > 0 and inner_step % self._every_steps == 0 and inner_step < num_inner_steps

    def save(self, held: HeldLease) -> None:
        """Replace the file. Raises DiskFullError."""
        facts = torch.frombuffer(bytearray(held.facts.model_dump_json().encode()), dtype=torch.uint8)
        write_tensors(self._path, {"displacement": torch.from_numpy(held.displacement), "facts": facts})

    def load(self) -> HeldLease | None:
        """What `save` kept; None when there is nothing, or nothing of use, which is told."""
        if not self._path.exists():
            return None
        try:
            tensors = load_file(self._path)
            facts = LeaseFacts.model_validate_json(bytes(tensors["facts"].numpy()))
            return HeldLease(facts, tensors["displacement"].numpy())
        except (SafetensorError, KeyError, ValidationError, TypeError) as error:
            log.warning("the lease in hand of the last time is not taken up", error=str(error))
            return None

    def drop(self) -> None:
        self._path.unlink(missing_ok=True)
