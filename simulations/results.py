"""What a simulation leaves in its folder, and comparing several.

results.parquet    a row a round: when it opened, was trained, closed; tokens, bytes, losses, why it closed
peers.parquet      a row a peer: its device, time online, time computing, bytes, tokens credited
timeline.parquet   what everybody did, at 240 moments
summary.json       the figures of the whole run
trace.jsonl        the coordinator's journal: every event that the core was given, and when
report.html        all of it to look at
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protocol.errors import ConfigError
from simulations.scenario import Scenario
from simulations.virtual.recorder import ACTIVITIES
from simulations.virtual_run import JOURNAL, VirtualRun

Row = dict[str, Any]
SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A finished simulation, as its report and its files have it."""

    scenario: Scenario
    summary: Row
    rounds: list[Row]
    peers: list[Row]
    timeline: list[Row]
    faults: list[Row]


def collect(run: VirtualRun, wall_s: float) -> Results:
    """Take the figures from a run that was finished."""
    peers = [_describe_peer(run, index) for index in range(len(run.world.peers))]
    rounds, timeline = run.recorder.rounds, run.recorder.samples
    return Results(
        scenario=run.scenario,
        summary=_summarise(run, rounds, peers, wall_s),
        rounds=rounds,
        peers=peers,
        timeline=timeline,
        faults=run.recorder.faults,
    )


def write_results(results: Results, folder: Path) -> None:
    """Write everything but the report and the trace."""
    for name, rows in (("results", results.rounds), ("peers", results.peers), ("timeline", results.timeline)):
        if rows:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / SUMMARY).write_text(json.dumps(results.summary, indent=2) + "\n", encoding="utf-8")


def read_summaries(folders: Sequence[Path]) -> list[Row]:
    """The figures of several simulations. Raises ConfigError for a folder without any."""
    summaries = []
    for folder in folders:
        path = folder / SUMMARY
        if not path.is_file():
            raise ConfigError(f"{folder} holds no finished simulation: {SUMMARY} is not there")
        summaries.append({"folder": str(folder), **json.loads(path.read_text(encoding="utf-8"))})
    return summaries


def hash_trace(path: Path) -> str:
    """SHA-256 of a trace, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe_peer(run: VirtualRun, index: int) -> Row:
    world, peer = run.world, run.world.peers[index]
    population, spec = world.population, run.scenario.population[world.population.kind[index]]
    known = run.coordinator.state.peers.get(peer.id)
    return {
        "peer": peer.id,
        "population": spec.name,
        "device": spec.device,
        "attack": spec.attack if population.attackers[index] else None,
        "flops": float(population.flops[index]),
        "down_bps": float(population.down_bps[index]),
        "up_bps": float(population.up_bps[index]),
        "dialable": bool(population.dialable[index]),
        "sessions": peer.sessions,
        "online_s": peer.online_s,
        "compute_s": float(peer.compute_s),
        "energy_wh": float(peer.compute_s) * float(population.watts[index]) / 3600.0,
        "sent_bytes": peer.sent_bytes,
        "received_bytes": peer.received_bytes,
        "trained_tokens": peer.trained_units * run.scenario.spec.shard_tokens,
        "credited_tokens": known.credited_tokens if known else 0,
        "contributions": known.accepted if known else 0,
        "refused": known.refused if known else 0,
    }


def _summarise(run: VirtualRun, rounds: list[Row], peers: list[Row], wall_s: float) -> Row:
    state, recorder, hours = run.coordinator.state, run.recorder, run.world.clock.now_s / 3600.0
    losses = [row["held_out_loss"] for row in rounds if row["held_out_loss"] is not None]
    took = [row["merged_s"] - row["opened_s"] for row in rounds if row["merged_s"] is not None]
    online = [sample for sample in recorder.samples if sample["offline"] < len(peers)]
    sent = [peer["sent_bytes"] for peer in peers if peer["sessions"]]
    return {
        "scenario": run.scenario.name,
        "fidelity": run.scenario.fidelity,
        "seed": run.scenario.seed,
        "peers": len(peers),
        "peers_that_trained": sum(peer["trained_tokens"] > 0 for peer in peers),
        "too_small_for_the_model": recorder.too_small,
        "parameters": state.num_parameters,
        "virtual_hours": hours,
        "finished": run.coordinator.finished,
        "rounds": state.rounds_merged,
        "rounds_void": len(recorder.voids),
        "round_s": median(took) if took else None,
        "tokens": state.tokens_credited,
        "tokens_per_s": state.tokens_credited / max(3600.0 * hours, 1e-9),
        "trained_tokens": sum(peer["trained_tokens"] for peer in peers),
        "utilisation": float(np.mean([sample["utilisation"] for sample in online])) if online else 0.0,
        "peers_online": float(np.mean([len(peers) - sample["offline"] for sample in recorder.samples])),
        "contributions": sum(row["contributions"] for row in rounds),
        "refused": sum(recorder.refusals.values()) + recorder.copies_refused,
        "copies_refused": recorder.copies_refused,
        "clipped": sum(row["clipped"] for row in rounds),
        "payload_bytes": sum(row["payload_bytes"] for row in rounds),
        "sent_bytes_per_peer": median(sent) if sent else 0.0,
        "coordinator_sent_bytes": recorder.coordinator_sent_bytes,
        "coordinator_received_bytes": recorder.coordinator_received_bytes,
        "energy_kwh": sum(peer["energy_wh"] for peer in peers) / 1000.0,
        "held_out_loss_start": recorder.first_loss,
        "held_out_loss": losses[-1] if losses else None,
        "activity": {name: float(np.mean([sample[name] for sample in recorder.samples])) for name in ACTIVITIES},
        "refusals": recorder.refusals,
        "events": run.coordinator.journal_rows,
        "trace_sha256": hash_trace(run.folder / JOURNAL),
        "wall_s": wall_s,
    }
