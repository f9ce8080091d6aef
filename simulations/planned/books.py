"""What a plan leaves behind: the same rows and figures as simulations.results takes from a virtual run."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protocol.policy import ExchangePlan
from simulations.planned.crowd import Crowd, Floats
from simulations.planned.grouping import Grouped
from simulations.planned.leasing import Training
from simulations.planned.playing import Merged, Played
from simulations.planned.site import Site
from simulations.results import Results
from simulations.scenario import Scenario
from simulations.virtual.recorder import ACTIVITIES

Row = dict[str, Any]
Sampled = tuple[Training, Floats, Played, Grouped, Merged]  # a whole round, with what was trained ahead
NUM_SAMPLES = 240
MOST_PEERS = 5000  # in the table of peers; of a larger crowd a sample


@dataclass(slots=True, kw_only=True)
class Books:
    """Filled while the plan goes on."""

    scenario: Scenario
    site: Site
    num_peers: int
    rounds: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    merged_bytes: list[float] = field(default_factory=list)  # of each round's payloads, as everybody fetches them
    voids: int = 0
    tokens: float = 0.0
    refused: int = 0
    coordinator_sent_bytes: float = 0.0
    coordinator_received_bytes: float = 0.0

    def note_round(
        self, played: Played, plan: ExchangePlan, grouped: Grouped, *, opened_s: float, closed_s: float, leased: int
    ) -> None:
        tokens = int(played.shards[played.accepted].sum() * self.site.spec.shard_tokens)
        self.tokens += tokens
        accepted, due = int(played.accepted.sum()), len(played.accepted)
        refused = int(np.count_nonzero(played.committed & ~played.accepted))
        self.refused += refused
        self.merged_bytes.append(grouped.size * len(grouped.makers))
        self.coordinator_received_bytes += grouped.size * grouped.num_groups
        self.rounds.append(
            {
                "round": len(self.rounds),
                "opened_s": opened_s,
                "trained_s": opened_s + min(played.trained_s, closed_s - opened_s),
                "closed_s": closed_s,
                "merged_s": None,
                "tokens": tokens,
                "tokens_after": int(self.tokens),
                "leased_peers": leased,
                "due": due,
                "contributions": accepted,
                "refused": refused,
                "groups": grouped.num_groups,
                "payload_bytes": accepted * played.payload_bytes,
                "codec": plan.codec,
                "inner_steps": plan.inner_steps,
                "clipped": 0,
                "mean_loss": None,
                "held_out_loss": None,
                "closed_because": played.because,
                "plan": plan.reason,
            }
        )

    def sample(self, crowd: Crowd, until_s: float, *, from_s: float, what: Sampled | None) -> None:
        """Rows for the moments due before `until_s`: how many do what on average over a round."""
        every_s = self.scenario.hours * 3600.0 / NUM_SAMPLES
        while (due_s := len(self.samples) * every_s) < until_s:
            self.samples.append({"t_s": due_s, **self._count(crowd, max(due_s, from_s), what)})

    def _count(self, crowd: Crowd, now_s: float, what: Sampled | None) -> Row:
        online = int(crowd.online.sum())
        offline = self.num_peers - online
        ready = int(np.count_nonzero(crowd.online & (crowd.synced_s <= now_s)))
        training = sending = merging = busy = 0.0
        if what is not None:
            leases, ahead, played, grouped, merged = what
            length_s = played.closes_s + grouped.seconds + float(np.clip(merged.opens_s - merged.closed_s, 0.0, 3600.0))
            trains_s = np.minimum(leases.finish_s, played.trained_s) - leases.start_s + ahead * leases.unit_s
            shares = np.clip(trains_s / length_s, 0.0, 1.0)
            training = float(shares.sum())
            busy = float((shares / crowd.step_s[leases.peers]).sum())
            sends_s = grouped.seconds + np.where(played.pushed_bytes > 0.0, played.push_s, 0.0)
            sending = float(np.clip(sends_s[played.accepted], 0.0, length_s).sum() / length_s)
            merging = float(np.clip(merged.took_s, 0.0, length_s).sum() / length_s)
        merging = min(merging, max(0.0, ready - training - sending))
        outages = (fault for fault in self.scenario.fault if fault.kind == "coordinator_outage")
        if any(fault.start_s <= now_s < fault.end_s for fault in outages):
            return self._row(crowd, {**dict.fromkeys(ACTIVITIES, 0), "cut off": online, "offline": offline}, 0.0)
        speed = float((1.0 / crowd.step_s[crowd.online]).sum())
        counts = {
            **dict.fromkeys(ACTIVITIES, 0),
            "training": round(training),
            "sending": round(sending),
            "merging": round(merging),
            "waiting": max(0, ready - round(training) - round(sending) - round(merging)),
            "fetching": online - ready,
            "offline": offline,
        }
        return self._row(crowd, counts, min(1.0, busy / speed) if speed else 0.0)

    def _row(self, crowd: Crowd, counts: dict[str, int], utilisation: float) -> Row:
        return {
            **counts,
            "utilisation": utilisation,
            "sent_bytes": float(crowd.sent_bytes.sum(dtype=np.float64)),
            "coordinator_sent_bytes": self.coordinator_sent_bytes,
        }


def collect(
    books: Books, crowd: Crowd, *, now_s: float, finished: bool, wall_s: float, rng: np.random.Generator
) -> Results:
    """The plan's results."""
    scenario = books.scenario
    return Results(
        scenario=scenario,
        summary=_summarise(books, crowd, now_s=now_s, finished=finished, wall_s=wall_s),
        rounds=books.rounds,
        peers=_describe_peers(scenario, crowd, rng),
        timeline=books.samples,
        faults=[{"kind": fault.kind, "start_s": fault.start_s, "end_s": fault.end_s} for fault in scenario.fault],
    )


def _describe_peers(scenario: Scenario, crowd: Crowd, rng: np.random.Generator) -> list[Row]:
    """A row a peer; of a large crowd those of a sample."""
    count = min(crowd.count, MOST_PEERS)
    chosen = np.sort(rng.choice(crowd.count, count, replace=False)) if crowd.count else np.zeros(0, np.int64)
    tokens, width = scenario.spec.shard_tokens, len(str(scenario.num_peers - 1))
    flops = scenario.flops_per_step(scenario.model.parameters)
    rows = []
    for peer in chosen.tolist():
        spec = scenario.population[crowd.kind[peer]]
        compute_s = float(crowd.compute_s[peer])
        rows.append(
            {
                "peer": f"peer-{int(crowd.index[peer]):0{width}d}",
                "population": spec.name,
                "device": spec.device,
                "attack": None,
                "flops": flops / float(crowd.step_s[peer]),
                "down_bps": float(crowd.down_bps[peer]),
                "up_bps": float(crowd.up_bps[peer]),
                "dialable": bool(crowd.dialable[peer]),
                "sessions": int(crowd.sessions[peer]),
                "online_s": float(crowd.online_s[peer]),
                "compute_s": compute_s,
                "energy_wh": compute_s * float(crowd.watts[peer]) / 3600.0,
                "sent_bytes": float(crowd.sent_bytes[peer]),
                "received_bytes": float(crowd.received_bytes[peer]),
                "trained_tokens": int(crowd.trained_shards[peer] * tokens),
                "credited_tokens": int(crowd.credited_shards[peer] * tokens),
                "contributions": int(crowd.accepted[peer]),
                "refused": 0,
            }
        )
    return rows


def _summarise(books: Books, crowd: Crowd, *, now_s: float, finished: bool, wall_s: float) -> Row:
    scenario, rounds, hours = books.scenario, books.rounds, now_s / 3600.0
    took = [row["merged_s"] - row["opened_s"] for row in rounds if row["merged_s"] is not None]
    online = [sample for sample in books.samples if sample["offline"] < books.num_peers]
    sent = crowd.sent_bytes[crowd.sessions > 0]

    def mean(name: str, samples: list[Row]) -> float:
        return float(np.mean([sample[name] for sample in samples])) if samples else 0.0

    return {
        "scenario": scenario.name,
        "fidelity": scenario.fidelity,
        "seed": scenario.seed,
        "peers": books.num_peers,
        "peers_that_trained": int(np.count_nonzero(crowd.trained_shards)),
        "too_small_for_the_model": books.num_peers - crowd.count,
        "parameters": books.site.num_parameters,
        "virtual_hours": hours,
        "finished": finished,
        "rounds": len(rounds),
        "rounds_void": books.voids,
        "round_s": float(np.median(took)) if took else None,
        "tokens": int(books.tokens),
        "tokens_per_s": books.tokens / max(3600.0 * hours, 1e-9),
        "trained_tokens": int(crowd.trained_shards.sum(dtype=np.float64) * books.site.spec.shard_tokens),
        "utilisation": mean("utilisation", online),
        "peers_online": books.num_peers - mean("offline", books.samples) if books.samples else 0.0,
        "contributions": sum(row["contributions"] for row in rounds),
        "refused": books.refused,
        "copies_refused": 0,
        "clipped": 0,
        "payload_bytes": sum(row["payload_bytes"] for row in rounds),
        "sent_bytes_per_peer": float(np.median(sent)) if len(sent) else 0.0,
        "coordinator_sent_bytes": books.coordinator_sent_bytes,
        "coordinator_received_bytes": books.coordinator_received_bytes,
        "energy_kwh": float((crowd.compute_s * crowd.watts).sum(dtype=np.float64)) / 3.6e6,
        "held_out_loss_start": None,
        "held_out_loss": None,
        "activity": {name: mean(name, books.samples) for name in ACTIVITIES},
        "refusals": {},
        "events": 0,
        "trace_sha256": "",  # nothing happens in a plan that could be traced
        "wall_s": wall_s,
    }
