"""What a round costs as a run grows from 30 to 100,000 workers: a cost model, measured small cases beside it, tables.

    sudo python -m benchmarks.scaling [--quick] [--json FILE]

The model is benchmarks.scaling_model. Speeds of codecs and merge, and sizes of messages, are measured first, on one
core (benchmarks.scaling_speeds). Then come small cases with real processes, predicted beside measured: exchanges on
loopback (benchmarks.averaging), and whole runs of six workers on links of 20/100 Mbit/s (benchmarks.scaling_runs; root
on Linux, left out elsewhere and with --quick). All processes of a case share this machine's cores, and the prediction
takes that into account. The tables, in markdown, are those of docs/scaling.md.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.averaging import MILLION, limited_loopback, measure
from benchmarks.figures import Figure, parse_options, write_figures
from benchmarks.scaling_model import Cost, Links, Setting, allgather, butterfly, two_level
from benchmarks.scaling_runs import DOWN_MBPS, NUM_WORKERS, UP_MBPS, Played, play
from benchmarks.scaling_speeds import AVERAGE, Speeds, measure_decisions, measure_signals, measure_speeds
from benchmarks.scaling_tables import (
    FAST,
    SEEDS,
    TABLE_SIZE,
    Cells,
    cost_of,
    list_cases,
    tabulate,
    tabulate_changes,
    tabulate_groups,
    tabulate_limits,
    tabulate_seconds,
    tabulate_unreachable,
)
from benchmarks.wan_network import find_obstacle

CODECS = ("sparse", "int2")
PEER_MBPS = 20  # on the limited loopback
WORK = ("error feedback", "encode", "merge and outer step", "digest")  # what the model has of benchmarks.averaging
RUNS: Mapping[str, Mapping[str, Any]] = {
    "all-gather, 6 of 6": {},
    "turns, 2 of 6": {"max_contributors": 2},
    "two-level, 6 of 6, groups of 3": {"group_size": 3},
    "butterfly, 4 of 6": {"method": "butterfly", "max_contributors": 4},
}
NUM_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One quantity, predicted and measured: megabytes or seconds, as `what` says."""

    case: str
    what: str
    predicted: float
    measured: float

    @property
    def deviation(self) -> float:
        """Of what was measured from what was predicted."""
        return self.measured / self.predicted - 1.0


# ---- measured small cases


async def check_loopback(base: Setting, quick: bool) -> list[Check]:
    """Exchanges of benchmarks.averaging, in which nothing is pushed to a coordinator."""
    checks = []
    speeds = measure_speeds(MILLION, ("sparse",), AVERAGE)
    small = replace(base, parameters=MILLION, coder=speeds.coders["sparse"], finish=speeds.finish)
    for num_peers in (4,) if quick else (4, 8):
        cost = allgather(replace(small, workers=num_peers), num_peers)
        outcome = await measure("sparse", num_peers, MILLION)
        case = f"sparse, {num_peers} peers, 1 M, loopback"
        sent = cost.worker_up - cost.coordinator_in / num_peers
        work_s = cost.phases_s["encode"] + cost.phases_s["merge"]
        measured_s = sum(outcome.phases_cpu_s[phase] for phase in WORK)
        checks.append(Check(case=case, what="MB up", predicted=sent / 1e6, measured=outcome.sent_bytes / 1e6))
        checks.append(Check(case=case, what="CPU s", predicted=work_s, measured=measured_s))
    with limited_loopback(4 * PEER_MBPS) as inside:
        if inside is not None:
            links = Links(up_bps=PEER_MBPS * 1e6, down_bps=PEER_MBPS * 1e6)
            cost = butterfly(share_cores(replace(small, workers=4, links=links)), 4)
            outcome = await measure("butterfly", 4, MILLION, inside)
            case, sent = f"butterfly, 4 peers, 1 M, {PEER_MBPS} Mbit/s", cost.worker_up - cost.coordinator_in / 4
            checks.append(Check(case=case, what="MB up", predicted=sent / 1e6, measured=outcome.sent_bytes / 1e6))
            checks.append(Check(case=case, what="s", predicted=cost.phases_s["all-reduce"], measured=outcome.time_s))
    return checks


def check_run(base: Setting, case: str) -> list[Check]:
    """A whole run on home links."""
    played = play(RUNS[case], NUM_ROUNDS)
    setting = share_cores(replace(base, workers=NUM_WORKERS, parameters=played.num_parameters))
    setting = replace(setting, links=Links(up_bps=UP_MBPS * 1e6, down_bps=DOWN_MBPS * 1e6))
    manifest = played.manifests[-1]
    contributors = len(manifest.contributions)
    if RUNS[case].get("method") == "butterfly":
        cost = butterfly(setting, contributors)
    elif manifest.groups:
        cost = two_level(setting, contributors, max(len(group.peers) for group in manifest.groups))
    else:
        cost = allgather(setting, contributors)
    return list(compare(case, cost, played))


def compare(case: str, cost: Cost, played: Played) -> Iterator[Check]:
    """A run's bytes on all workers' links and on the coordinator's, and its seconds before and after the close."""
    after = ("fetch", "merge")
    before_s = sum(seconds for phase, seconds in cost.phases_s.items() if phase not in after)
    up, down = NUM_WORKERS * cost.worker_up, NUM_WORKERS * cost.worker_down + cost.coordinator_out
    rows = {
        "MB up, all workers": (up / 1e6, played.workers_up / 1e6),
        "MB down, all workers": (down / 1e6, played.workers_down / 1e6),
        "MB into the coordinator": (cost.coordinator_in / 1e6, played.coordinator_in / 1e6),
        "MB out of the coordinator": (cost.coordinator_out / 1e6, played.coordinator_out / 1e6),
        "s to the close": (before_s, played.close_s),
        "s from the close": (cost.seconds - before_s, played.merge_s),
    }
    for what, (predicted, measured) in rows.items():
        yield Check(case=case, what=what, predicted=predicted, measured=measured)


def share_cores(setting: Setting) -> Setting:
    """All workers on this machine."""
    processes = max(1.0, setting.workers / (os.cpu_count() or 1))
    return replace(
        setting,
        coder=setting.coder.shared(processes),
        group_coder=setting.group_coder.shared(processes),
        dense_coder=setting.dense_coder.shared(processes),
        finish=setting.finish / processes,
    )


# ---- the whole


def print_table(title: str, rows: Iterator[Cells]) -> None:
    heads, *body = rows
    print(f"\n### {title}\n")
    print("|", " | ".join(heads), "|")
    print("|", " | ".join("---" for _ in heads), "|")
    for cells in body:
        print("|", " | ".join(cells), "|")
    sys.stdout.flush()


def print_checks(checks: Sequence[Check]) -> None:
    heads = ("case", "what", "predicted", "measured", "deviation")
    rows = ((c.case, c.what, f"{c.predicted:.3g}", f"{c.measured:.3g}", f"{c.deviation:+.0%}") for c in checks)
    print_table(f"Predicted and measured (load average {os.getloadavg()[0]:.1f})", iter([heads, *rows]))


def make_settings(speeds: Speeds) -> dict[str, Setting]:
    """By codec of the contributions; workers and parameters are to be set."""
    signals = measure_signals()
    return {
        name: Setting(
            workers=1,
            parameters=1,
            coder=speeds.coders[name],
            group_coder=speeds.coders["int8"],
            dense_coder=speeds.coders["float16"],
            finish=speeds.finish,
            signals=signals,
            links=Links(),
        )
        for name in CODECS
    }


def print_speeds(speeds: Speeds, settings: Mapping[str, Setting], decisions_s: Mapping[int, float]) -> None:
    heads = ("codec", "bytes a parameter", "encode, M parameters/s", "decode + merge", "check")
    rows = [
        (name, f"{c.bytes_per_parameter:.4f}", *(f"{speed / 1e6:,.0f}" for speed in (c.encode, c.decode, c.check)))
        for name, c in speeds.coders.items()
    ]
    print_table("Measured on one core", iter([heads, *rows]))
    print(f"\nOuter step and digest: {speeds.finish / 1e6:,.0f} M parameters/s.")
    print(f"Messages to a worker and round: {settings[CODECS[0]].signals}")
    for workers, seconds in decisions_s.items():
        print(f"Core and lease, {workers:,} workers: {1e3 * seconds:.3f} ms a worker and round.")


def figures_of(settings: Mapping[str, Setting], checks: Sequence[Check]) -> dict[str, Figure]:
    """Deviations of the checks, and seconds at TABLE_SIZE."""
    figures: dict[str, Figure] = {f"deviation: {check.case}: {check.what}": check.deviation for check in checks}
    for name, base in settings.items():
        for seeds in (0, SEEDS):
            for workers, form in list_cases():
                cost = cost_of(form, base, workers=workers, parameters=TABLE_SIZE, seeds=seeds)
                figures[f"seconds: {name}, {seeds} seeds, {workers} workers, {form}"] = cost.seconds
    return figures


def print_tables(settings: Mapping[str, Setting]) -> None:
    sparse = settings["sparse"]
    seeded = {f"{name}, {SEEDS} seeds": replace(base, seeds=SEEDS) for name, base in settings.items()}
    fast = {f"{name}, no seeds, 1 Gbit/s": replace(base, links=FAST) for name, base in settings.items()}
    bases = {f"{name}, no seeds": base for name, base in settings.items()} | seeded | fast
    print_table("sparse, no seeds", tabulate(sparse))
    print_table(f"sparse, {SEEDS} seeds", tabulate(replace(sparse, seeds=SEEDS)))
    print_table("Time at 100 M", tabulate_seconds(bases))
    print_table("Most workers for which the exchange takes no longer than the inner steps", tabulate_limits(bases))
    print_table("Groups", tabulate_groups(seeded))
    print_table("Behind NAT", tabulate_unreachable(sparse))
    print_table("What two constants do", tabulate_changes(sparse))


def use_one_thread() -> None:
    """Start anew unless numpy has one thread here and in all processes of a case: they share the cores anyway."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        command = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S606 # numpy is loaded


def main() -> None:
    options = parse_options("Bytes and seconds a round for 30 to 100,000 workers: model, measured cases, tables.")
    use_one_thread()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: what was set up is taken down
    size = (4 if options.quick else 16) * MILLION
    speeds = measure_speeds(size, (*CODECS, "int8", "float16"))
    settings = make_settings(speeds)
    print_speeds(speeds, settings, {workers: measure_decisions(workers) for workers in (1_000, 10_000)})
    print_tables(settings)
    checks = asyncio.run(check_loopback(settings["sparse"], options.quick))
    obstacle = "--quick" if options.quick else find_obstacle()
    for case in () if obstacle else RUNS:
        checks += check_run(settings["int2"], case)
        write_figures(options.json, figures_of(settings, checks))
    print_checks(checks)
    if obstacle:
        print(f"\nWhole runs on home links: left out ({obstacle}).")
    write_figures(options.json, figures_of(settings, checks))


if __name__ == "__main__":
    main()
