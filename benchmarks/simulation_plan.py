"""How long fidelity `plan` takes for a million peers and one virtual day, in how much memory; and for ten million.

python -m benchmarks.simulation_plan [--quick] [--json FILE]

The peers are of all kinds, at home on three continents, and arrive over three hours; rented seeds pass payloads on.
Each size runs in a process of its own, whose peak memory is its resident set's maximum. --quick: a hundred thousand.
"""

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.figures import Figure, parse_options, write_figures
from simulations.plan import plan_run
from simulations.scenario import Scenario, parse_scenario

HOURS = 24.0
KINDS = (
    ("laptops-europe", 0.30, "laptop", "fixed", "evenings", "europe"),
    ("laptops-america", 0.20, "laptop", "cable", "evenings", "america"),
    ("desktops-asia", 0.20, "desktop", "fiber", "volunteer", "asia"),
    ("gaming-cards", 0.10, "gaming-gpu", "fixed", "when-idle", "america"),
    ("phones", 0.197, "phone", "home-wifi", "charging-at-night", "asia"),
)
NUM_SEEDS = 3000.0  # of a million


def describe_scenario(num_peers: int) -> Scenario:
    """So many peers, a model of 30 M parameters, one day."""
    populations: list[dict[str, Any]] = [
        {
            "name": name,
            "count": max(1, round(share * num_peers)),
            "device": device,
            "link": link,
            "availability": availability,
            "region": region,
            "joins_over_hours": 3.0,
        }
        for name, share, device, link, availability, region in KINDS
    ]
    seeds = {"name": "seeds", "device": "desktop", "link": "datacenter", "availability": "server", "seed": True}
    populations.append({**seeds, "count": max(1, round(NUM_SEEDS / 1e6 * num_peers)), "throttle": 0.5})
    return parse_scenario(
        {
            "name": "million",
            "fidelity": "plan",
            "hours": HOURS,
            "seed": 1,
            "model": {"parameters": 30_000_000},
            "run": {
                "train": {"tokens": 10**15},
                "data": {"sequence_length": 1024, "shard_steps": 2},
                "round": {"inner_steps": 20, "min_peers": 500, "exchange_s": 300.0, "merge_timeout_s": 600.0},
                "exchange": {"codec": "sparse", "max_contributors": 32},
            },
            "population": populations,
        },
        where="benchmark",
    )


def measure(num_peers: int) -> dict[str, Figure]:
    """Plan it here; seconds, peak gigabytes, and what came out."""
    started_s = time.monotonic()
    summary = plan_run(describe_scenario(num_peers)).summary
    return {
        "s": time.monotonic() - started_s,
        "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "rounds": summary["rounds"],
        "peers_online": summary["peers_online"],
        "tokens": summary["tokens"],
        "trained_tokens": summary["trained_tokens"],
    }


def main(argv: list[str] | None = None) -> None:
    options = parse_options("Seconds and memory of fidelity `plan`.", argv)
    sizes = {"100k": 100_000} if options.quick else {"1m": 1_000_000, "10m": 10_000_000}
    figures: dict[str, Figure] = {}
    print(f"{'peers':>12} {'seconds':>8} {'GB':>6} {'rounds':>7} {'online':>11}    load {os.getloadavg()[0]:.1f}")
    for name, size in sizes.items():
        command = [sys.executable, "-m", "benchmarks.simulation_plan", str(size)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        online = result["peers_online"]
        print(f"{size:12,} {result['s']:8.1f} {result['gb']:6.2f} {result['rounds']:7} {online:11,.0f}")
        figures |= {f"plan_{name}_{key}": value for key, value in result.items()}
    if not options.quick:
        print("wanted for a million: under 60 s and 4 GB")
    write_figures(options.json, figures)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].isdecimal():
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        main()
