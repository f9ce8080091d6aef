"""Incidents that no event tells of: a disk that runs full, a peer that is connected and stands still.

Looks every few seconds at what costs nothing to see; what it finds is written with the engine's next transaction.
"""

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.engine import Engine
from coordinator.verdict import DISK_FULL_BYTES, DISK_LOW_BYTES, is_silent, is_stuck
from coordinator.witness import Witness

LOOK_EVERY_S = 5.0


class Watch:
    """Makes the recorder's incidents complete. `read_free_bytes`: of the run folder's disk."""

    def __init__(self, engine: Engine, witness: Witness, read_free_bytes: Callable[[], int]) -> None:
        self._engine = engine
        self._witness = witness
        self._read_free_bytes = read_free_bytes
        engine.recorder.read_silence = witness.silent_s

    async def keep_watching(self) -> None:
        """Until cancelled."""
        while True:
            self.look(time.time())
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self, unix_s: float) -> None:
        """Begin and end what changed since the last look."""
        self._look_at_disk(unix_s)
        self._look_at_workers(unix_s)
        if self._engine.recorder.incidents.has_news:
            self._engine.write_news()

    def _look_at_disk(self, unix_s: float) -> None:
        incidents, state = self._engine.recorder.incidents, self._engine.state
        free = self._read_free_bytes()
        kind = "disk_full" if free < DISK_FULL_BYTES else "disk_low" if free < DISK_LOW_BYTES else ""
        for other in {"disk_full", "disk_low"} - {kind}:
            incidents.end(other, state, unix_s)
        if kind and not incidents.lasts(kind):
            action = "the coordinator stops when a write fails; nothing that was committed is lost"
            incidents.begin(kind, state, unix_s, evidence={"free_bytes": free}, action=action)

    def _look_at_workers(self, unix_s: float) -> None:
        incidents, state = self._engine.recorder.incidents, self._engine.state
        timeout_s = state.spec.round.heartbeat_timeout_s
        leases = state.round.leases if state.round else {}
        stalled = set()
        for peer_id, pulse in self._witness.describe_connected().items():
            peer, lease = state.peers.get(peer_id), leases.get(peer_id)
            if peer is None:
                continue
            facts = {
                **pulse,
                "lease": lease.status.value if lease else "",
                "pause_reason": peer.pause_reason,
                "steps_per_s": peer.steps_per_s,
            }
            if not is_silent(facts, timeout_s) and not is_stuck(facts, timeout_s):
                continue
            stalled.add(peer_id)
            if not incidents.lasts("stalled_peer", peer_id):
                evidence = {key: facts[key] for key in ("activity", "inner_step", "heartbeat_age_s", "unmoved_s")}
                action = "the round waits for it until its deadline; without heartbeats its session is closed"
                incidents.begin("stalled_peer", state, unix_s, peer=peer_id, evidence=evidence, action=action)
        for peer_id in incidents.lasting("stalled_peer") - stalled:
            incidents.end("stalled_peer", state, unix_s, peer_id)


def free_bytes_of(folder: Path) -> Callable[[], int]:
    """What reads the free space of a folder's disk."""
    return lambda: shutil.disk_usage(folder).free
