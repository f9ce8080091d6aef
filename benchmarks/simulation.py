"""How fast virtual peers learn, beside Flower's simulation and pfl-research; and what a thousand peers cost.

    python -m benchmarks.simulation [--quick] [--job NAME] [--json FILE] [--baselines FOLDER --python PYTHON]
    python -m benchmarks.simulation --scale [--quick] [--json FILE]

The same jobs, data, client schedule, batch order, start weights and hyper-parameters in every engine, so that all must
end at the same parameters (norms and losses are compared to 1e-4), one after the other, one thread a process. Ours and
pfl-research keep one core busy; Flower runs with an actor a core, and with one actor. Ours is what `manyhands simulate`
trains with: TensorLearner on the batched backend, with codec, hash, error feedback and deterministic merge. FOLDER has
bench_flower.py and bench_pfl.py, PYTHON is of an environment with flwr[simulation] and pfl[pytorch]; without them only
ours is measured.

- `mlp`: 1,000 clients of 50 digits, 100 of them a round, 20 rounds; 64-32-10, SGD 0.1, batches of 10.
- `char`: 64 clients, all of them a round, 5 rounds; a transformer of 2 layers of 64, 5 steps of 4 x 64 characters.
- `--scale`: 1,000 peers that all train a language model of 0.5 M parameters and send it as int2, for 20 rounds; and the
  memory of 250 and of 1,000 peers with the same chunk.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, write_figures

REPEATS = 3
STEADY_S = 4.0  # ours goes on beyond the job until then: all of its rounds together take half a second
TOLERANCE = 1e-4
JOBS = ("mlp", "char")
BASELINES = {"flower": "bench_flower.py", "flower_one_actor": "bench_flower.py", "pfl": "bench_pfl.py"}
ENGINES = {
    "ours": "manyhands",
    "flower": "Flower, an actor a core",
    "flower_one_actor": "Flower, one actor",
    "pfl": "pfl-research",
}
LIMIT_S = 7200.0
SCALE_PEERS, SMALL_PEERS, SCALE_ROUNDS, SCALE_CHUNK = 1000, 250, 20, 16
SCALE_SPEC: dict[str, Any] = {
    "model": {
        "config": {
            "hidden_size": 128,
            "intermediate_size": 400,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        }
    },
    "data": {"sequence_length": 64, "shard_steps": 4, "max_tokens": 2_000_000, "held_out_max_tokens": 8192},
    "train": {"batch_sequences": 2, "optimizer": "adamw", "learning_rate": 2e-3, "tokens": 10_240_000},
}


# ---- ours, in a process of its own


class _Timed:
    """A backend, and the time spent in it."""

    def __init__(self, backend: Any) -> None:
        self.chunk, self.forget = backend.chunk, backend.forget
        self._backend, self._spent_s = backend, 0.0

    def train(self, starts: Any, jobs: Sequence[Any], merge: Any = None) -> Any:
        started_s = time.perf_counter()
        trained = self._backend.train(starts, jobs, merge)
        self._spent_s += time.perf_counter() - started_s
        return trained

    def take_s(self) -> float:
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s


def run_job(name: str, threads: int, chunk: int) -> dict[str, Any]:
    """Our side of a job, in the baselines' words."""
    import numpy as np
    import torch

    from benchmarks.simulation_jobs import char_problem, mlp_problem, play_round
    from simulations.learning.backend import make_backend
    from simulations.learning.learner import TensorLearner

    torch.set_num_threads(threads)
    problem, schedule, per_client = mlp_problem() if name == "mlp" else char_problem()
    backend = _Timed(make_backend("batched", problem, chunk=chunk, device=torch.device("cpu")))
    learner = TensorLearner(problem, backend)
    rounds_s, backend_s, result = [], [], {}
    while len(rounds_s) < len(schedule) or sum(rounds_s) < STEADY_S:
        started_s = time.perf_counter()
        clients = schedule[len(rounds_s) % len(schedule)]
        leases = {f"client-{client}": client for client in clients}
        play_round(learner, len(rounds_s), leases, "float32", per_client)
        rounds_s.append(time.perf_counter() - started_s)
        backend_s.append(backend.take_s())
        if len(rounds_s) == len(schedule):
            result = {
                "param_norm": float(np.linalg.norm(learner.state.theta.astype(np.float64))),
                "final_loss": learner.held_out_loss(),
            }
    return {
        "updates_per_s_steady": len(schedule[0]) / statistics.median(rounds_s[1:]),
        "backend_per_s": len(schedule[0]) / statistics.median(backend_s[1:]),
        "round1_s": rounds_s[0],
        "beyond_job_s": sum(rounds_s[len(schedule) :]),
        **result,
    }


def run_scale(peers: int, rounds: int) -> dict[str, Any]:
    """So many peers of a language model, for so many rounds; seconds and gigabytes."""
    import torch

    from benchmarks.simulation_jobs import play_round
    from protocol.run_spec import parse_run_spec
    from simulations.learning.backend import make_backend
    from simulations.learning.learner import TensorLearner
    from simulations.learning.problem import make_problem

    spec = parse_run_spec(SCALE_SPEC)
    problem = make_problem("lm", spec)
    backend = make_backend("batched", problem, chunk=SCALE_CHUNK, device=torch.device("cpu"))
    learner = TensorLearner(problem, backend)
    before, started_s, num_shards = learner.held_out_loss(), time.monotonic(), len(problem.data.shards)
    for number in range(rounds):
        leases = {f"peer-{peer:04d}": (number * peers + peer) % num_shards for peer in range(peers)}
        play_round(learner, number, leases, spec.exchange.codec, spec.shard_tokens)
        print(f"round {number}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
    return {
        "parameters": learner.num_parameters,
        "seconds": time.monotonic() - started_s,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "loss_before": before,
        "loss_after": learner.held_out_loss(),
        "load": os.getloadavg()[0],
    }


# ---- all engines, one after the other


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a process printed as RESULT, and `process_s`, its whole time. Raises RuntimeError when it failed."""
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        own = {} if environment is None else {"cwd": folder}
        done = subprocess.run(
            command,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **(environment or {})},  # its idle threads spin
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            **own,
        )
    process_s = time.perf_counter() - started_s
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result = json.loads(results[-1].removeprefix("RESULT "))
    return {**result, "process_s": process_s - result.get("beyond_job_s", 0.0)}


def measure_engine(engine: str, job: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one engine."""
    if engine == "ours":
        more = ["--threads", str(options.threads), "--chunk", str(options.chunk)]
        return measure([sys.executable, "-m", "benchmarks.simulation", "--run", job, *more])
    environment = {
        "JOB": job,
        "THREADS": str(options.threads),
        "ACTOR_CPUS": str(os.cpu_count()) if engine == "flower_one_actor" else "1",
        "ACTOR_THREADS": "1",
        "PYTHONPATH": str(options.baselines),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return measure([str(options.python), str(options.baselines / BASELINES[engine])], environment)


def compare(job: str, options: argparse.Namespace, console: Console) -> dict[str, Figure]:
    """All engines on one job, in turns. Raises RuntimeError when they do not end at the same parameters."""
    engines = ["ours", *(BASELINES if options.baselines else ())]
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for turn in range(1 if options.quick else REPEATS):
        for engine in engines:
            with console.status(f"{job}: {ENGINES[engine]}, run {turn + 1}"):
                runs[engine].append(measure_engine(engine, job, options))
    for engine in engines:
        for key in ("param_norm", "final_loss"):
            ours, other = runs["ours"][0][key], runs[engine][0][key]
            if abs(ours - other) > TOLERANCE * max(1.0, abs(other)):
                raise RuntimeError(f"{job}: {key} is {ours} here, {other} with {ENGINES[engine]}")
    figures: dict[str, Figure] = {}
    table = Table(title=f"{job}: client updates a second, load {os.getloadavg()[0]:.1f}")
    for heading in ("engine", "updates/s", "first round, s", "process, s", "norm", "loss", "ours: times as fast"):
        table.add_column(heading)
    for engine in engines:
        rate, first_s, process_s = (
            statistics.median(run[key] for run in runs[engine])
            for key in ("updates_per_s_steady", "round1_s", "process_s")
        )
        figures |= {f"{job}_{engine}_per_s": rate, f"{job}_{engine}_process_s": process_s}
        if engine == "ours":
            figures[f"{job}_backend_per_s"] = statistics.median(run["backend_per_s"] for run in runs[engine])
        factor = ""
        if engine != "ours":
            ratio = float(figures[f"{job}_ours_per_s"]) / rate
            figures[f"{job}_vs_{engine}"] = ratio
            factor = f"{ratio:.1f}; whole process {process_s / float(figures[f'{job}_ours_process_s']):.1f}"
        last = runs[engine][-1]
        table.add_row(
            ENGINES[engine],
            f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
            f"{first_s:.2f}",
            f"{process_s:.1f}",
            f"{last['param_norm']:.5f}",
            f"{last['final_loss']:.5f}",
            factor,
        )
    console.print(table)
    alone = float(figures[f"{job}_backend_per_s"])
    console.print(f"Ours without encoding, hashing, error feedback and merge: {alone:,.0f} updates a second.")
    return figures


def measure_scale(quick: bool, console: Console) -> dict[str, Figure]:
    """A thousand peers for 20 rounds (quick: two), then the memory of fewer peers with the same chunk."""
    rounds = 2 if quick else SCALE_ROUNDS
    console.print(f"{SCALE_PEERS} peers, {rounds} rounds, chunks of {SCALE_CHUNK}; minutes each…")
    command = [sys.executable, "-m", "benchmarks.simulation", "--run"]
    large = measure([*command, f"scale-{SCALE_PEERS}-{rounds}"])
    small = measure([*command, f"scale-{SMALL_PEERS}-1"])
    minutes = large["seconds"] / 60
    said = f"{minutes:.1f} minutes"
    if quick:
        minutes *= SCALE_ROUNDS / rounds
        said = f"extrapolated from {rounds} rounds: {minutes:.1f} minutes for {SCALE_ROUNDS}"
    console.print(
        f"{large['parameters']:,} parameters, {SCALE_PEERS} peers: {said}; peak memory {large['peak_gb']:.2f} GB "
        f"({SMALL_PEERS} peers: {small['peak_gb']:.2f} GB); loss {large['loss_before']:.3f} -> "
        f"{large['loss_after']:.3f}; load {large['load']:.1f}"
    )
    return {
        "learn_1000_minutes": minutes,
        "learn_1000_peak_gb": large["peak_gb"],
        "learn_250_peak_gb": small["peak_gb"],
        "learn_1000_rounds_measured": rounds,
    }


def run_child(name: str, options: argparse.Namespace) -> None:
    """One measurement, in this process; prints it as the baselines do."""
    if name.startswith("scale-"):
        _, peers, rounds = name.split("-")
        result = run_scale(int(peers), int(rounds))
    else:
        result = run_job(name, options.threads, options.chunk)
    print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one run each; --scale: two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as a flat JSON object")
    parser.add_argument("--baselines", type=Path, metavar="FOLDER", help="has bench_flower.py and bench_pfl.py")
    parser.add_argument("--python", type=Path, metavar="PYTHON", help="of the environment with flwr and pfl")
    parser.add_argument("--threads", type=int, default=1, help="of ours and of pfl-research")
    parser.add_argument("--chunk", type=int, default=0, help="peers computed at a time; 0: as memory allows")
    parser.add_argument("--job", choices=JOBS, help="one of the two jobs only")
    parser.add_argument("--scale", action="store_true", help="measure a thousand peers instead")
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_child(options.run, options)
        return
    if bool(options.baselines) != bool(options.python):
        parser.error("--baselines and --python go together")
    console = Console()
    if options.scale:
        write_figures(options.json, measure_scale(options.quick, console))
        return
    if not options.baselines:
        console.print("Only ours: for Flower and pfl-research give --baselines and --python.")
    figures: dict[str, Figure] = {}
    for job in [options.job] if options.job else JOBS:
        figures |= compare(job, options, console)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
