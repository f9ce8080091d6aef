"""The batched backend on the machines of a Ray cluster: one actor a core, or a GPU, and every peer has its actor.

`ray.init` finds the cluster of RAY_ADDRESS, or starts one on this machine. A peer's optimizer state stays with its
actor. The same number of actors gives the same bits; another number makes other chunks, equal to rounding.
"""

import importlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from protocol.errors import ConfigError
from simulations.learning.backend import Job, Merge, Trained, Vector
from simulations.learning.batched import BatchedBackend
from simulations.learning.problem import Problem


class RayBackend:
    """See simulations.learning.backend.Backend. chunk: peers that one actor computes at a time; 0: as memory allows.

    num_actors 0: as many as the cluster has cores (GPUs, if device is one). Raises ConfigError without Ray.
    """

    def __init__(self, problem: Problem, *, chunk: int = 0, device: torch.device, num_actors: int = 0) -> None:
        ray = _import_ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        resource = "GPU" if device.type == "cuda" else "CPU"
        num_actors = num_actors or max(1, int(ray.cluster_resources().get(resource, 1)))
        backend = ray.put(BatchedBackend(problem, chunk=chunk, device=device))
        self._start(resource, [backend] * num_actors)

    def _start(self, resource: str, backends: Sequence[Any]) -> None:
        ray = _import_ray()
        actor = ray.remote(**({"num_gpus": 1} if resource == "GPU" else {"num_cpus": 1}))(_Actor)
        self._resource = resource
        self._actors = [actor.remote(backend) for backend in backends]
        self._actor_chunk = ray.get(self._actors[0].chunk.remote())
        self.chunk = self._actor_chunk * len(backends)

    def train(self, starts: Vector, jobs: Sequence[Job], merge: Merge | None = None) -> Trained:
        """See Backend."""
        ray = _import_ray()
        places: list[list[int]] = [[] for _ in self._actors]
        for place, job in enumerate(jobs):
            places[self._actor_of(job.peer)].append(place)
        parts, pending = [], []
        common, common_merge = ray.put(starts) if starts.ndim == 1 else None, ray.put(merge)
        for actor, own in zip(self._actors, places, strict=True):
            for first in range(0, len(own), self._actor_chunk):
                part = own[first : first + self._actor_chunk]
                parts.append(part)
                own_starts = starts[part] if common is None else common
                pending.append(actor.train.remote(own_starts, [jobs[place] for place in part], common_merge))
        results: list[Trained] = ray.get(pending)
        back = np.argsort(np.concatenate(parts))
        return Trained(
            pseudo_gradients=np.concatenate([result.pseudo_gradients for result in results])[back],
            mean_losses=np.concatenate([result.mean_losses for result in results])[back],
        )

    def forget(self, peer: str) -> None:
        """See Backend."""
        self._actors[self._actor_of(peer)].forget.remote(peer)

    def _actor_of(self, peer: str) -> int:
        return zlib.crc32(peer.encode()) % len(self._actors)

    def __getstate__(self) -> dict[str, Any]:
        backends = _import_ray().get([actor.backend.remote() for actor in self._actors])
        return {"backends": backends, "resource": self._resource}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ray = _import_ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        self._start(state["resource"], state["backends"])


class _Actor:
    """A batched backend in a process of its own, with one thread if it computes on the CPU."""

    def __init__(self, backend: BatchedBackend) -> None:
        torch.set_num_threads(1)
        self._backend = backend

    def chunk(self) -> int:
        return self._backend.chunk

    def train(self, starts: Vector, jobs: Sequence[Job], merge: Merge | None = None) -> Trained:
        return self._backend.train(starts, jobs, merge)

    def forget(self, peer: str) -> None:
        self._backend.forget(peer)

    def backend(self) -> BatchedBackend:
        return self._backend


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("the backend `ray` needs Ray: pip install 'manyhands[ray]'") from error
