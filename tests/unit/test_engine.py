"""The engine ends when it is told to, whatever comes at that moment."""

import asyncio
from pathlib import Path

from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.engine import Committed, Engine
from coordinator.ledger import LedgerWriter
from coordinator.storage.database import Database
from protocol.identity import Identity
from tests.core_run import digest_after, small_spec


class Listener:
    """A carrier that carries nothing out."""

    def carry_out(self, committed: Committed) -> None:
        pass


async def test_engine_ends_when_it_is_cancelled_as_an_event_comes(tmp_path: Path) -> None:
    spec, database = small_spec(), Database(f"sqlite:///{tmp_path / 'run.db'}")
    fresh = machine.create(spec, num_shards=1, num_parameters=1, initial_digest=digest_after(0))
    engine = Engine.recover(database, LedgerWriter(Identity.generate(), "0" * 16, spec, None), fresh)
    running = asyncio.create_task(engine.run(Listener()))
    # A round's deadline is waited for with a timeout: only then could the cancellation be lost.
    fresh.wait_until_s = engine.now_s() + 1000.0
    engine.submit(ev.InviteIssued(token_id="first", uses=1))
    await asyncio.sleep(0.3)  # the engine waits for the next event
    engine.submit(ev.InviteIssued(token_id="second", uses=1))
    await asyncio.sleep(0)  # the event has reached it, and it has not run yet
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=3)
    assert done, "the engine goes on"
    database.close()
