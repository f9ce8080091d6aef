"""The tables of docs/scaling.md: what each form of exchange costs a worker, a seed and the coordinator, by the model.

Nothing is measured here. A form takes as many contributors as run.toml allows it. With inner steps in proportion to the
model, and next to nothing that does not grow with it, a table for one size is one for all.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from benchmarks.scaling_model import Cost, Links, Setting, allgather, best_group_size, butterfly, two_level
from coordinator.sessions import MAX_PAYLOAD_PEERS
from protocol.exchange.fetch import CONCURRENCY

Cells = tuple[str, ...]
MILLION = 1_000_000
SIZES = {10 * MILLION: "10 M", 100 * MILLION: "100 M", 1000 * MILLION: "1 B"}
TABLE_SIZE = 100 * MILLION
COMPUTE_S = 50.0  # of a round at TABLE_SIZE: 50 inner steps of one second; at the other sizes in proportion
WORKERS = (30, 300, 3_000, 100_000)
MOST_WORKERS = 1_000_000
SEEDS = 32
SEEDED = tuple(f"{workers:,} workers, {SEEDS} seeds" for workers in WORKERS[:3])
FAST = Links(up_bps=1e9, down_bps=1e9)
TURN, MOST, BUTTERFLY = 32, 1024, 64  # contributors: run.toml's default and limits


def turns(setting: Setting) -> Cost:
    return allgather(setting, min(setting.workers, TURN))


def groups(setting: Setting) -> Cost:
    """With the best group size."""
    contributors = min(setting.workers, MOST)
    return two_level(setting, contributors, best_group_size(setting, contributors))


FORMS: Mapping[str, Callable[[Setting], Cost]] = {
    "all-gather of all": lambda setting: allgather(setting, setting.workers),
    "turns": turns,
    "two-level": groups,
    "butterfly": lambda setting: butterfly(setting, min(setting.workers, BUTTERFLY)),
}


def cost_of(form: str, setting: Setting, **changes: float) -> Cost:
    return FORMS[form](replace(setting, **changes))  # type: ignore[arg-type] # the fields that are changed are numbers


def list_cases() -> Iterator[tuple[int, str]]:
    """Workers and form; turns where there are any."""
    return ((workers, form) for workers in WORKERS for form in FORMS if form != "turns" or workers > TURN)


def tabulate(base: Setting) -> Iterator[Cells]:
    """Bytes at TABLE_SIZE, seconds at all sizes, and the part of a round that they are."""
    yield (
        "workers",
        "form",
        "contributors",
        "a worker sends, MB",
        "receives, MB",
        "a seed sends, MB" if base.seeds else "the busiest sends, MB",
        "coordinator receives, MB",
        "sends, MB",
        *SIZES.values(),
        "of a round",
    )
    for workers, form in list_cases():
        by_size = {size: cost_of(form, base, workers=workers, parameters=size) for size in SIZES}
        cost = by_size[TABLE_SIZE]
        most = cost.seed_up if base.seeds else cost.busiest_up
        sizes = (cost.worker_up, cost.worker_down, most, cost.coordinator_in, cost.coordinator_out)
        yield (
            f"{workers:,}",
            f"{form}, groups of {cost.group_size}" if cost.group_size else form,
            f"{cost.contributors:,}",
            *(show(size / 1e6) for size in sizes),
            *(show_time(each.seconds) for each in by_size.values()),
            f"{cost.seconds / (cost.seconds + COMPUTE_S):.0%}",
        )


def tabulate_seconds(bases: Mapping[str, Setting]) -> Iterator[Cells]:
    """Of several settings, at TABLE_SIZE."""
    yield "workers", "form", *bases
    for workers, form in list_cases():
        costs = (cost_of(form, base, workers=workers, parameters=TABLE_SIZE) for base in bases.values())
        yield f"{workers:,}", form, *(show_time(cost.seconds) for cost in costs)


def tabulate_limits(bases: Mapping[str, Setting]) -> Iterator[Cells]:
    """The most workers for which the exchange takes no longer than the inner steps."""
    yield "form", *bases
    for form in FORMS:
        yield form, *(find_limit(form, base) for base in bases.values())


def find_limit(form: str, base: Setting) -> str:
    """See `tabulate_limits`. Seconds grow with the number of workers."""

    def seconds(workers: int) -> float:
        return cost_of(form, base, workers=workers, parameters=TABLE_SIZE).seconds

    most = 3 + bisect_right(range(4, MOST_WORKERS), COMPUTE_S, key=seconds)
    return f"{most:,}" if most > 3 else "none"


def tabulate_groups(bases: Mapping[str, Setting]) -> Iterator[Cells]:
    """At TABLE_SIZE, when all contribute: the best groups beside none."""
    yield "contributors", *(f"{name}: {what}" for name in bases for what in ("no groups", "best size", "with groups"))
    for contributors in (32, 100, 300, MOST):
        cells: list[str] = []
        for base in bases.values():
            setting = replace(base, workers=contributors, parameters=TABLE_SIZE)
            flat, grouped = allgather(setting, contributors), groups(setting)
            cells += [show_time(flat.seconds), f"{grouped.group_size}", show_time(grouped.seconds)]
        yield f"{contributors:,}", *cells


def tabulate_unreachable(base: Setting) -> Iterator[Cells]:
    """Turns at TABLE_SIZE: what the coordinator sends when so many workers cannot be dialled."""
    columns = [(workers, seeds) for seeds in (0, SEEDS) for workers in WORKERS[:3]]
    yield "cannot be dialled", *(f"{workers:,} workers, {seeds} seeds: MB" for workers, seeds in columns)
    for unreachable in (0.0, 0.2, 0.4, 0.7, 1.0):
        settings = (replace(base, workers=workers, seeds=seeds) for workers, seeds in columns)
        costs = (cost_of("turns", each, parameters=TABLE_SIZE, unreachable=unreachable) for each in settings)
        yield f"{unreachable:.0%}", *(show(cost.coordinator_out / 1e6) for cost in costs)


def tabulate_changes(base: Setting) -> Iterator[Cells]:
    """Turns at TABLE_SIZE, if workers fetched more payloads at a time, and if the coordinator named more workers."""
    yield "named", "at a time", *(f"{workers:,} workers" for workers in WORKERS[:3]), "coordinator sends, MB", *SEEDED
    for named, window in ((MAX_PAYLOAD_PEERS, CONCURRENCY), (MAX_PAYLOAD_PEERS, TURN), (512, TURN), (3_000, TURN)):
        changed = replace(base, max_named=named, window=window)
        costs = [cost_of("turns", changed, workers=workers, parameters=TABLE_SIZE) for workers in WORKERS[:3]]
        seeded = [cost_of("turns", changed, workers=n, parameters=TABLE_SIZE, seeds=SEEDS) for n in WORKERS[:3]]
        times = [show_time(cost.seconds) for cost in (*costs, *seeded)]
        yield f"{named:,}", f"{window}", *times[:3], show(costs[-1].coordinator_out / 1e6), *times[3:]


def show(value: float) -> str:
    """Two digits, or whole numbers; powers of ten where they are easier to read."""
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def show_time(seconds: float) -> str:
    for unit, size_s in (("years", 365 * 86400.0), ("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size_s:
            return f"{show(seconds / size_s)} {unit}"
    return f"{show(seconds)} s"
