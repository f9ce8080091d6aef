"""A whole exchange and merge beside hivemind's averaging: bytes and seconds for each peer, and whether peers end equal.

    python -m benchmarks.averaging [--quick] [--json FILE]

Peers are processes on loopback. All begin at a barrier with a vector in memory; a round is over when the last of them
has the result. The first two rounds, which make connections and touch memory for the first time, are not counted;
figures are medians of five. Loopback costs next to nothing, so seconds there are the processors' alone; the last table
has links of 100 Mbit/s (a network namespace whose loopback is limited; root on Linux, left out elsewhere). Seconds on a
machine that does other things as well say little: the load average is printed, processor seconds stand beside.

manyhands, sparse codec: error feedback, encoding, payloads by hash from the peers that made them, merge, outer step.
What comes after it, the digest of the state (hivemind computes none) and taking what was sent off the error feedback,
is shown apart; `time_with_digest_vs_…` counts the digest as part of our time. manyhands, butterfly: float16, digests
compared. hivemind: DecentralizedAverager with its defaults. Its time
counts from the moment when the first peer has a group; matchmaking comes on top, in the column `step`.

hivemind and the butterfly average all values, at their codec's precision; the sparse codec sends 1 of 64, the rest
later by error feedback. That is the point of it, and what it costs in learning is measured elsewhere
(benchmarks.learning). The figures without a size are those of 4 peers at the largest size, on loopback.
"""

import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, parse_options, write_figures

MILLION = 1_000_000
NUM_ROUNDS, NUM_UNCOUNTED = 7, 2
MAX_SPOILT = 4  # hivemind may form smaller groups, an all-reduce may break off: such a round is played again
SHARE_TIMEOUT_S = 600.0
REFERENCE_PEERS = 4
LINK_MBPS = 100
DIGEST = "afterwards: digest"  # a phase of benchmarks.averaging_peer
_TO_KEY = str.maketrans({" ": "_", ":": None})
SYSTEMS = {
    "sparse": "manyhands sparse",
    "butterfly": "manyhands butterfly",
    "float16": "hivemind Float16",
    "uniform8": "hivemind Uniform8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One system with N peers and D parameters: medians over rounds."""

    system: str
    num_peers: int
    num_parameters: int
    time_s: float  # barrier to the last peer's result; for hivemind from the first group on
    whole_s: float  # the same with hivemind's matchmaking
    cpu_s: float  # a peer, mean, with all its processes
    sent_bytes: float  # a peer, mean
    phases_s: dict[str, float]  # mean over peers
    phases_cpu_s: dict[str, float]  # mean over peers, of the peer's own process; where it was told
    equal: bool  # bit for bit at all peers, in all rounds
    difference: float  # the largest between two peers in the last round, in a sample, over the largest value
    spoilt_rounds: int  # in which the peers did not all meet


async def measure(system: str, num_peers: int, num_parameters: int, inside: Sequence[str] = ()) -> Outcome:
    """Start the peers, let them play, and end them whatever happens. `inside`: put before their commands."""
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as folder:
        folders = [Path(folder) / str(index) for index in range(num_peers)]
        async with started_peers(system, num_parameters, folders, inside) as peers:
            rounds, spoilt = await play(peers)
        samples = [np.load(each / "sample.npy") for each in folders]
    spread = max(float(np.abs(sample - samples[0]).max()) for sample in samples)
    counted = rounds[NUM_UNCOUNTED:]
    return Outcome(
        system=system,
        num_peers=num_peers,
        num_parameters=num_parameters,
        time_s=statistics.median(duration_s(reports, "met_s") for reports in counted),
        whole_s=statistics.median(duration_s(reports, "begin_s") for reports in counted),
        cpu_s=median_of_means(counted, "cpu_s"),
        sent_bytes=median_of_means(counted, "sent_bytes"),
        phases_s=phases_of(counted, "phases_s"),
        phases_cpu_s=phases_of(counted, "phases_cpu_s"),
        equal=all(len({report["digest"] for report in reports}) == 1 for reports in rounds),
        difference=spread / float(np.abs(samples[0]).max()),
        spoilt_rounds=spoilt,
    )


def duration_s(reports: list[Any], since: str) -> float:
    """From the first peer's begin (or `since`, where it is told) to the last peer's end."""
    begin_s: float = min(report.get(since, report["begin_s"]) for report in reports)
    end_s: float = max(report["end_s"] for report in reports)
    return end_s - begin_s


def median_of_means(rounds: list[list[Any]], name: str) -> float:
    """The median over rounds of the mean over peers."""
    value: float = statistics.median(statistics.mean(report[name] for report in reports) for reports in rounds)
    return value


def phases_of(rounds: list[list[Any]], kind: str) -> dict[str, float]:
    """The median over rounds of the mean over peers, for each phase."""
    return {
        phase: statistics.median(statistics.mean(report[kind][phase] for report in reports) for reports in rounds)
        for phase in rounds[0][0][kind]
    }


class PeerProcess:
    """One process of benchmarks.averaging_peer."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("a peer is started with pipes")
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._log = log

    async def read(self) -> Any:
        """The next value that it shares. Raises RuntimeError with its last words when it ends, TimeoutError."""
        async with asyncio.timeout(SHARE_TIMEOUT_S):
            line = await self._stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended: {self._log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    def write(self, line: bytes) -> None:
        self._stdin.write(line)

    async def kill(self) -> None:
        """With all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


@asynccontextmanager
async def started_peers(
    system: str, num_parameters: int, folders: list[Path], inside: Sequence[str]
) -> AsyncIterator[list[PeerProcess]]:
    """One process a folder, each in a session of its own, so that what it forks can be ended with it."""
    peers: list[PeerProcess] = []
    try:
        for index, folder in enumerate(folders):
            folder.mkdir()
            facts = (system, str(index), str(len(folders)), str(num_parameters), str(folder))
            with (folder / "log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *inside,
                    sys.executable,
                    "-m",
                    "benchmarks.averaging_peer",
                    *facts,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            peers.append(PeerProcess(process, folder / "log"))
        yield peers
    finally:
        await asyncio.gather(*(peer.kill() for peer in peers))


@contextmanager
def limited_loopback(total_mbps: int) -> Iterator[Sequence[str] | None]:
    """What to put before a command so that its loopback carries so many Mbit/s in all; None where that cannot be."""
    if not (shutil.which("tc") and shutil.which("nsenter") and os.geteuid() == 0):
        yield None
        return
    # The namespace lasts as long as `cat`, and that as long as its input is open: it goes with this process.
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as holder:
        inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            time.sleep(0.01)
        for command in (
            "ip link set lo up",
            f"tc qdisc add dev lo root tbf rate {total_mbps}mbit burst 512kb latency 100ms",
        ):
            subprocess.run([*inside, *command.split()], check=True)
        yield inside


async def play(peers: list[PeerProcess]) -> tuple[list[list[Any]], int]:
    """The reports of NUM_ROUNDS rounds in which all peers took part, and how many rounds were not such."""
    rounds: list[list[Any]] = []
    spoilt = 0
    while len(rounds) < NUM_ROUNDS:
        values = await asyncio.gather(*(peer.read() for peer in peers))
        if isinstance(values[0], dict):  # a report ends a round
            if any(report.get("group", len(peers)) < len(peers) for report in values):
                spoilt += 1
            else:
                rounds.append(values)
            if spoilt > MAX_SPOILT:
                raise RuntimeError(f"the peers did not all meet in {spoilt} of {spoilt + len(rounds)} rounds")
        line = json.dumps(values).encode() + b"\n"
        for peer in peers:
            peer.write(line)
    return rounds, spoilt


def show(console: Console, outcomes: list[Outcome], network: str = "loopback") -> None:
    first = outcomes[0]
    size = f"{first.num_peers} peers, {first.num_parameters / MILLION:g} M parameters"
    table = Table(title=f"{size}, {network}, load average {os.getloadavg()[0]:.1f}")
    table.add_column("system", no_wrap=True)
    for column in ("MB sent", "CPU s", "seconds", "step", "equal", "differ"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        table.add_row(
            SYSTEMS[outcome.system],
            f"{outcome.sent_bytes / 1e6:.3f}",
            f"{outcome.cpu_s:.2f}",
            f"{outcome.time_s:.2f}",
            f"{outcome.whole_s:.2f}",
            "yes" if outcome.equal else "no",
            f"{outcome.difference:.1e}",
        )
    console.print(table)
    for outcome in outcomes:
        phases = ", ".join(describe_phase(outcome, phase) for phase in outcome.phases_s)
        spoilt = (
            f"; {outcome.spoilt_rounds} rounds in which the peers did not all meet" if outcome.spoilt_rounds else ""
        )
        console.print(f"  {SYSTEMS[outcome.system]}: {phases}{spoilt}", highlight=False)


def describe_phase(outcome: Outcome, phase: str) -> str:
    cpu_s = outcome.phases_cpu_s.get(phase)
    return f"{phase} {outcome.phases_s[phase]:.2f}" + ("" if cpu_s is None else f" (CPU {cpu_s:.3f})")


def figures_of(outcomes: list[Outcome], suffix: str = "") -> dict[str, Figure]:
    """The figures of one number of peers and one size."""
    by_system = {outcome.system: outcome for outcome in outcomes}
    sparse, butterfly = by_system["sparse"], by_system["butterfly"]
    fp16, uniform8 = by_system["float16"], by_system["uniform8"]
    figures: dict[str, Figure] = {
        "time_vs_hivemind_fp16": fp16.time_s / sparse.time_s,
        "time_with_digest_vs_hivemind_fp16": fp16.time_s / (sparse.time_s + sparse.phases_s[DIGEST]),
        "bytes_vs_hivemind_fp16": fp16.sent_bytes / sparse.sent_bytes,
        "time_vs_hivemind_uniform8": uniform8.time_s / sparse.time_s,
        "bytes_vs_hivemind_uniform8": uniform8.sent_bytes / sparse.sent_bytes,
        "cpu_vs_hivemind_fp16": fp16.cpu_s / sparse.cpu_s,
        "cpu_vs_hivemind_uniform8": uniform8.cpu_s / sparse.cpu_s,
        "whole_step_vs_hivemind_fp16": fp16.whole_s / sparse.whole_s,
        "whole_step_vs_hivemind_uniform8": uniform8.whole_s / sparse.whole_s,
        "butterfly_time_vs_hivemind_fp16": fp16.time_s / butterfly.time_s,
        "digests_equal": float(sparse.equal and butterfly.equal),
        "hivemind_digests_equal": float(fp16.equal or uniform8.equal),
        "hivemind_fp16_difference": fp16.difference,
        "hivemind_uniform8_difference": uniform8.difference,
        "seconds": sparse.time_s,
        "hivemind_fp16_seconds": fp16.time_s,
        "megabytes_sent": sparse.sent_bytes / 1e6,
        "hivemind_fp16_megabytes_sent": fp16.sent_bytes / 1e6,
        **{f"seconds_{phase.translate(_TO_KEY)}": value_s for phase, value_s in sparse.phases_s.items()},
        "load_average": os.getloadavg()[0],
    }
    return {name + suffix: value for name, value in figures.items()}


async def run(quick: bool, json_path: Path | None) -> None:
    console = Console()
    figures: dict[str, Figure] = {}
    for num_peers in (REFERENCE_PEERS,) if quick else (REFERENCE_PEERS, 8):
        for millions in (1, 8) if quick else (1, 8, 50):
            outcomes = [await measure(system, num_peers, millions * MILLION) for system in SYSTEMS]
            show(console, outcomes)
            figures |= figures_of(outcomes, f"_{num_peers}_peers_{millions}m")
            if num_peers == REFERENCE_PEERS:
                figures |= figures_of(outcomes)  # the last, largest size stays
            write_figures(json_path, figures)
    with limited_loopback(REFERENCE_PEERS * LINK_MBPS) as inside:
        if inside is None:
            console.print(f"Links of {LINK_MBPS} Mbit/s: left out, they need root, tc and nsenter.")
            return
        outcomes = [await measure(system, REFERENCE_PEERS, millions * MILLION, inside) for system in SYSTEMS]
        show(console, outcomes, f"{LINK_MBPS} Mbit/s a peer")
        write_figures(json_path, figures | figures_of(outcomes, f"_{LINK_MBPS}mbit"))


def main() -> None:
    options = parse_options("Averaging beside hivemind's: bytes, seconds, equality of the results.")
    asyncio.run(run(options.quick, options.json))


if __name__ == "__main__":
    main()
