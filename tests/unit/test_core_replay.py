"""The same events at the same times give the same run: in another process, under another hash seed, after a crash."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.state import PeerStatus, Phase, dump_state, load_state
from tests.core_run import CoreRun

ROOT = Path(__file__).parents[2]
WORKERS = [f"worker-{index:02d}" for index in range(12)]


def play_scenario(seed: int, num_events: int) -> CoreRun:
    """A seeded run with churn, late and refused work, pauses and restarts."""
    choose = random.Random(seed)  # noqa: S311 - a repeatable scenario, nothing secret
    run = CoreRun(num_shards=37, round={"min_peers": 3, "quorum_fraction": 0.3})
    run.join("validator", role="validator")
    while len(run.journal) < num_events:
        name = choose.choice(WORKERS)
        peer = run.state.peers.get(name)
        action = choose.random()
        run.now_s += choose.uniform(0.0, 0.5)
        if peer is None or peer.status is PeerStatus.GONE:
            run.join(name, lease_id=run.granted[name].lease_id if name in run.granted and action < 0.5 else None)
        elif action < 0.02:
            run.send(ev.PeerLeft(peer=name, reason="churn"))
        elif action < 0.03:
            run.send(ev.PauseRequested(paused=action < 0.0225))
        elif action < 0.032:
            run.send(ev.CoordinatorRestarted())
        elif action < 0.3 and name in run.num_leased():
            header = run.commit(name, units=run.granted[name].units[: choose.choice([1, None, None, None])])
            run.check(name, header.payload_hash, "refused" if action < 0.05 else "", norm=choose.uniform(0.5, 5.0))
        elif action < 0.301:
            deadline_s = machine.next_deadline(run.state)
            run.send(ev.TimerFired(), after_s=0.0 if deadline_s is None else max(0.0, deadline_s - run.now_s))
        else:
            run.report(name, "validator", claimed_steps_per_s=choose.uniform(0.1, 10.0))
    return run


def trace_digest(seed: int, num_events: int) -> str:
    """SHA-256 of all events, all effects and the final state."""
    run = play_scenario(seed, num_events)
    return hashlib.sha256(repr((run.journal, run.trace)).encode() + dump_state(run.state)).hexdigest()


def test_scenario_is_worth_replaying_when_it_is_played() -> None:
    run = play_scenario(seed=7, num_events=3_000)
    assert len(run.closed) > 10
    assert run.state.pool.pass_index > 1
    assert sum(peer.refused for peer in run.state.peers.values()) > 10
    assert run.state.phase is not Phase.FINISHED


def test_trace_is_the_same_when_the_hash_seed_differs() -> None:
    digests = set()
    for hash_seed in ("0", "1"):
        script = "from tests.unit.test_core_replay import trace_digest; print(trace_digest(7, 3_000))"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        digests.add(done.stdout)
    assert digests == {trace_digest(7, 3_000) + "\n"}


def test_run_goes_on_as_if_nothing_had_happened_when_it_is_recovered_from_snapshot_and_journal() -> None:
    run = play_scenario(seed=8, num_events=2_000)
    recovered = run.fresh_state()
    for index, (now_s, event) in enumerate(run.journal):
        if index % 250 == 0:
            recovered = load_state(dump_state(recovered))
        assert machine.handle(recovered, ev.load_event(event), now_s) == run.trace[index]
    assert recovered == run.state
