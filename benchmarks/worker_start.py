"""From the invite to the first inner step, on loopback against a real coordinator, and what a worker weighs.

cold: nothing of it in memory (the page cache is dropped, where this is root), a fresh home. warm: the same worker once
more in the same home. The clock starts when the process does and stops when the worker's own status file shows time in
inner steps; it is written at most every half second, so the figure is an upper bound by that much.

    joined      the interpreter, torch, transformers and hivemind are loaded, libp2p is up, the coordinator let it in
    prepared    shard index and model config are here; the model is built, autocast and speed are measured
    stepping    the state and the first shards are here, the first steps are made

rss_mb: resident memory of the worker's process while it trains, at its highest of some seconds, without what the size
of the model decides: parameters, gradients, AdamW's two moments and error feedback, five float32 vectors of D. Its
libp2p daemon, a process of its own, is told apart. `< 15 s` cold and `< 450 MB` are what is asked for. On Linux it is
parted into what is the process's own (anonymous) and what comes from files, such as torch's libraries, which other
workers on the machine share and the system can drop.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from benchmarks.figures import parse_options, write_figures
from tests.processes import RunningCoordinator, RunningWorker, start_coordinator, start_worker, wait_until

TARGET_S, TARGET_MB = 15.0, 450.0
MODEL_VECTORS = 5  # float32, D each: see above
TIMEOUT_S = 120.0
WATCH_S = 5.0  # memory, after the first step
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a worker: seconds since the process began, and its memory in MB."""

    joined_s: float
    prepared_s: float
    stepping_s: float
    rss_mb: float
    anonymous_mb: float  # of it; 0 where the system does not tell
    libp2p_mb: float


def main(argv: list[str] | None = None) -> int:
    options = parse_options(__doc__.splitlines()[0], argv)
    repeats = 1 if options.quick else 3
    load = os.getloadavg()[0]
    print(f"{psutil.cpu_count(logical=False)} cores, load average {load:.1f}, {repeats} cold and warm starts")
    starts: dict[str, list[Start]] = {"cold": [], "warm": []}
    dropped = True
    with tempfile.TemporaryDirectory() as folder, run_coordinator(Path(folder)) as coordinator:
        for number in range(repeats):
            home = Path(folder) / f"home-{number}"
            dropped = drop_page_cache() and dropped
            starts["cold"].append(measure(coordinator, home))
            starts["warm"].append(measure(coordinator, home))
        num_parameters = coordinator.status()["num_parameters"]
    import_s = measure_imports()
    print(f"{'':>6} {'joined':>8} {'prepared':>9} {'stepping':>9}   RSS MB  anonymous   libp2p MB")
    for kind, several in starts.items():
        for one in several:
            print(
                f"{kind:>6} {one.joined_s:>8.2f} {one.prepared_s:>9.2f} {one.stepping_s:>9.2f}"
                f" {one.rss_mb:>8.0f} {one.anonymous_mb:>10.0f} {one.libp2p_mb:>11.0f}"
            )
    print(f"of a warm start, importing what a worker needs: {import_s:.2f} s")
    if not dropped:
        print("the page cache could not be dropped (that needs root): cold means a fresh home only")
    own_mb = 4e-6 * MODEL_VECTORS * num_parameters
    cold_s, warm_s = (statistics.median(one.stepping_s for one in several) for several in starts.values())
    rss_mb = max(one.rss_mb for several in starts.values() for one in several) - own_mb
    anonymous_mb = max(one.anonymous_mb for several in starts.values() for one in several) - own_mb
    libp2p_mb = max(one.libp2p_mb for several in starts.values() for one in several)
    print(f"cold {cold_s:.1f} s (asked for: {TARGET_S:.0f}), warm {warm_s:.1f} s")
    print(
        f"memory without the model's own {own_mb:.0f} MB (D = {num_parameters:,}): {rss_mb:.0f} MB "
        f"(asked for: {TARGET_MB:.0f}), of it {anonymous_mb:.0f} MB anonymous; {libp2p_mb:.0f} MB of libp2p beside it"
    )
    write_figures(
        options.json,
        {
            "cold_s": round(cold_s, 2),
            "warm_s": round(warm_s, 2),
            "rss_mb": round(rss_mb, 1),
            "rss_anonymous_mb": round(anonymous_mb, 1),
            "libp2p_mb": round(libp2p_mb, 1),
            "import_s": round(import_s, 2),
            "page_cache_dropped": str(dropped).lower(),
            "load_average": round(load, 2),
        },
    )
    return 0


def run_coordinator(folder: Path) -> contextlib.AbstractContextManager[RunningCoordinator]:
    """A run of about a million parameters, whose leases last longer than this looks, and whose status is fresh."""
    return start_coordinator(
        folder / "run",
        options=["--no-validator"],
        model={"config": MODEL},
        data={"sequence_length": 64},
        train={"tokens": 100_000_000, "batch_sequences": 8, "optimizer": "adamw"},
        round={"inner_steps": 1000, "heartbeat_timeout_s": 2.5},
    )


def measure(coordinator: RunningCoordinator, home: Path) -> Start:
    """Start a worker, wait for its first inner step, watch its memory, stop it."""
    log = home / "runs" / coordinator.status()["run_id"] / "worker.log"
    written_before = log.stat().st_size if log.exists() else 0
    begun_unix_s = time.time()
    with start_worker(coordinator.invite, home) as worker:
        computing_unix_s = wait_until(lambda: read_first_steps(home, worker), TIMEOUT_S)
        rss_mb, anonymous_mb, libp2p_mb = watch_memory(worker.pid)
        worker.stop()
    events: dict[str, float] = {}
    for line in log.read_bytes()[written_before:].splitlines():
        event = json.loads(line)
        events.setdefault(event["event"], datetime.fromisoformat(event["timestamp"]).timestamp() - begun_unix_s)
    return Start(
        joined_s=events["joined"],
        prepared_s=events.get("fetching the state", events["joined"]),
        stepping_s=computing_unix_s - begun_unix_s,
        rss_mb=rss_mb,
        anonymous_mb=anonymous_mb,
        libp2p_mb=libp2p_mb,
    )


def read_first_steps(home: Path, worker: RunningWorker) -> float:
    """When the worker said that it had made inner steps; 0 before it has. Raises RuntimeError when it ended."""
    if not worker.is_alive():
        raise RuntimeError(f"the worker ended: {worker.last_lines(3)}")
    for path in home.glob("runs/*/status.json"):
        status = json.loads(path.read_text())
        if status["pid"] == worker.pid and status.get("compute_s", 0.0) > 0.0:
            return float(status["unix_s"])
    return 0.0


def watch_memory(pid: int) -> tuple[float, float, float]:
    """The highest resident memory of a worker's process, its anonymous part, and that of its children, in MB."""
    process = psutil.Process(pid)
    own, anonymous, children = 0.0, 0.0, 0.0
    deadline_s = time.monotonic() + WATCH_S
    while time.monotonic() < deadline_s:
        own = max(own, process.memory_info().rss / 1e6)
        anonymous = max(anonymous, read_anonymous_bytes(pid) / 1e6)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = max(children, sum(child.memory_info().rss for child in process.children(recursive=True)) / 1e6)
        time.sleep(0.1)
    return own, anonymous, children


def read_anonymous_bytes(pid: int) -> int:
    """Resident memory that no file is behind; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def drop_page_cache() -> bool:
    """Whether it could be dropped."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def measure_imports() -> float:
    """Seconds that a new interpreter takes to import a worker, everything being in the page cache."""
    durations_s = []
    for _ in range(3):
        started_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import worker.daemon"], check=True)
        durations_s.append(time.perf_counter() - started_s)
    return min(durations_s)


if __name__ == "__main__":
    sys.exit(main())
