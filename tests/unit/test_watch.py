"""Incidents that no event tells of, with a real engine and database; only the disk and the heartbeats are given."""

import asyncio
from pathlib import Path
from typing import Any

from coordinator.core import events as ev
from coordinator.engine import Committed, Engine
from coordinator.records.reader import read_incidents
from coordinator.records.watch import Watch
from tests.recorded_run import RecordedRun


class Listener:
    def carry_out(self, committed: Committed) -> None:
        pass


class Pulses:
    """What the witness would say of one worker."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.unmoved_s = 0.0

    def describe_connected(self) -> dict[str, dict[str, object]]:
        pulse: dict[str, object] = {
            "connected": True,
            "activity": "training",
            "inner_step": 7,
            "heartbeat_age_s": 0.5,
            "unmoved_s": self.unmoved_s,
        }
        return {self.peer: pulse}

    def silent_s(self, peer: str) -> float | None:
        return 0.5


async def test_disk_and_stalled_workers_are_incidents_while_they_last(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path)
    (ann,) = run.meet("ann")
    run.start(ann)
    engine = Engine.recover(run.database, run.ledger, run.fresh_state())
    running = asyncio.create_task(engine.run(Listener()))
    pulses: Any = Pulses(ann)
    free = [1 << 40]
    watch = Watch(engine, pulses, lambda: free[0])

    async def look() -> dict[str, bool]:
        """Kinds of incidents that were written, and whether they last."""
        watch.look(1_800_000_000.0)
        written: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
        engine.submit(ev.TimerFired(), on_committed=written.set_result)
        await written
        return {i.kind: i.until_unix_s is None for i in read_incidents(run.database.readers) if i.kind != "restart"}

    assert await look() == {}
    free[0] = 500 << 20
    assert await look() == {"disk_low": True}
    free[0] = 1 << 20
    pulses.unmoved_s = 100.0
    assert await look() == {"disk_low": False, "disk_full": True, "stalled_peer": True}
    free[0] = 1 << 40
    pulses.unmoved_s = 1.0
    assert await look() == {"disk_low": False, "disk_full": False, "stalled_peer": False}
    running.cancel()
    await asyncio.wait({running}, timeout=3)
    run.database.close()
