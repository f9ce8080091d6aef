"""What a round costs as a run grows: bytes and seconds, from the number of workers and how they exchange.

Pure functions; nothing is measured here. Who serves whom is what protocol.exchange.order decides, on average over the
lots that it draws; a worker's upload in a round depends on its luck, so the one that sends most is told apart.

Seconds are those of the slowest link or core in each phase, the phases one after the other: nobody merges while it
fetches, and inner steps are not among them. Left out: latency (a tree is five hops deep), headers of TCP and TLS, what
is sent again after a failure, shards, and the state for those who join.
"""

from dataclasses import dataclass, replace
from math import ceil, sqrt

from coordinator.core.groups import QUORUM as MERGERS
from coordinator.sessions import MAX_PAYLOAD_PEERS
from protocol.exchange.fetch import CONCURRENCY
from protocol.exchange.order import FANOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bits a second: a worker's up and down, a seed's and the coordinator's both ways."""

    up_bps: float = 20e6
    down_bps: float = 100e6
    seed_bps: float = 1e9
    coordinator_bps: float = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Coder:
    """A codec: bytes a parameter, and parameters a second on one core to encode, to decode into a sum, to check."""

    bytes_per_parameter: float
    encode: float
    decode: float
    check: float

    def shared(self, processes: float) -> "Coder":
        """When so many workers share a core. They encode and decode at once; checks are the coordinator's, alone."""
        return replace(self, encode=self.encode / processes, decode=self.decode / processes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Bytes that the coordinator sends each worker in a round beside payloads: a lease, and the manifest's notice."""

    base: float
    per_named: float  # the addresses of a worker that passes payloads on
    per_contribution: float
    per_source: float  # the addresses of who made a payload
    per_group: float
    per_member: float  # of a group

    def total(self, named: int, contributors: int, groups: int = 0) -> float:
        sources = MERGERS * groups or contributors
        in_groups = self.per_group * groups + self.per_member * contributors if groups else 0.0
        addresses = self.per_named * named + self.per_source * sources
        return self.base + addresses + self.per_contribution * contributors + in_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A run. Without seeds its named workers serve all; `unreachable`: share of the workers whom nobody can dial."""

    workers: int
    parameters: int
    coder: Coder  # of contributions
    group_coder: Coder  # of a merged group
    dense_coder: Coder  # of the butterfly
    finish: float  # outer step and digest, parameters a second
    signals: Signals
    links: Links
    seeds: int = 0
    unreachable: float = 0.0
    max_named: int = MAX_PAYLOAD_PEERS
    window: int = CONCURRENCY  # payloads that a worker fetches at a time

    @property
    def named(self) -> int:
        """Seeds; or, without any, workers that pass payloads on."""
        return min(self.seeds or self.workers, self.max_named)

    def signals_bytes(self, contributors: int, groups: int = 0) -> float:
        """To all workers together."""
        return self.workers * self.signals.total(self.named, contributors, groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Copies of payloads that are sent until all workers have them, on average."""

    by_workers: float  # of one payload, by all workers together
    by_busiest: float  # of all payloads, by the worker that sends most
    by_seed: float  # of one payload, by each seed
    by_coordinator: float  # of one payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One round. Bytes; those of a worker are means over all, `busiest_up` is what the one that sends most sends."""

    contributors: int
    group_size: int  # 0: no groups
    worker_up: float
    worker_down: float
    busiest_up: float
    seed_up: float
    coordinator_in: float
    coordinator_out: float
    phases_s: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases_s.values())


# ---- who sends how many copies


def spread(setting: Setting, payloads: int, holders: int = 1) -> Spread:
    """Of `payloads` payloads that `holders` workers each have already, to all workers."""
    missing = setting.workers - holders
    if payloads == 0 or missing == 0:
        return Spread(by_workers=0.0, by_busiest=0.0, by_seed=0.0, by_coordinator=0.0)
    reached = 1.0 - setting.unreachable
    if setting.seeds:
        by_root = min(FANOUT, setting.named)  # the seeds' tree hangs below whoever made the payload
        return Spread(
            by_workers=by_root * reached,
            by_busiest=by_root,
            by_seed=(missing - by_root) / setting.named,
            by_coordinator=by_root * setting.unreachable,
        )
    by_coordinator = coordinator_copies(setting.workers, setting.named, setting.unreachable)
    by_coordinator *= missing / (setting.workers - 1)
    even = payloads == setting.workers == setting.named  # everybody stands once in every place
    busiest = payloads - 1.0 if even else busiest_copies(setting.workers, setting.named, payloads)
    busiest = max(1.0, busiest * missing / (setting.workers - 1))
    return Spread(
        by_workers=missing - by_coordinator,
        by_busiest=busiest / reached if reached else 0.0,
        by_seed=0.0,
        by_coordinator=by_coordinator,
    )


def busiest_copies(workers: int, named: int, payloads: int, deviations: float = 2.0) -> float:
    """Copies that the worker sends who sends most: its places are drawn by lot, and how many are below it.

    A leaf serves its share of those who are not named, another place its children. The unluckiest is put so many
    standard deviations off.
    """
    places = min(workers, named + 1)
    leaves = places - places // FANOUT
    on_leaf, inside = (workers - places) / leaves, (places - 1) / (places - leaves)
    unlucky = min(float(payloads), payloads / 2 + deviations * sqrt(payloads) / 2)
    times_leaf = unlucky if on_leaf > inside else payloads - unlucky
    guests = times_leaf * on_leaf
    return guests + deviations * sqrt(guests) + (payloads - times_leaf) * inside


def paced_copies(setting: Setting, payloads: int, busiest: float) -> float:
    """In the time of how many copies the slowest uplink is through, when the busiest sends `busiest` in all.

    A worker fetches `window` payloads at a time, all in the same order: so it waits for whoever is unlucky among these,
    and who is not is idle meanwhile.
    """
    window = min(setting.window, payloads)
    if window == payloads:
        return busiest
    if setting.seeds:
        return busiest * payloads / window  # those who made the others wait for their turn
    reached = 1.0 - setting.unreachable
    a_window = busiest_copies(setting.workers, setting.named, window, deviations=1.0)
    return max(busiest, payloads / window * a_window / reached) if reached else 0.0


def coordinator_copies(workers: int, named: int, unreachable: float) -> float:
    """Copies of one payload for workers all of whose forebears in its tree are unreachable, up to who made it."""
    places = min(workers, named + 1)
    leaves = range(places // FANOUT, places)
    inside = sum(unreachable ** _depth(place) for place in range(1, places))
    below = sum(unreachable ** (_depth(leaf) + 1) for leaf in leaves) / len(leaves)
    return inside + (workers - places) * below


def _depth(place: int) -> int:
    """Of a place in a binary tree; the root is place 0."""
    return (place + 1).bit_length() - 1


# ---- the forms of exchange


def allgather(setting: Setting, contributors: int) -> Cost:
    """Everybody fetches every contribution."""
    size = setting.coder.bytes_per_parameter * setting.parameters
    sent = spread(setting, contributors)
    out = contributors * size * sent.by_coordinator + setting.signals_bytes(contributors)
    return Cost(
        contributors=contributors,
        group_size=0,
        worker_up=contributors * size * (1 + sent.by_workers) / setting.workers,
        worker_down=contributors * size * (setting.workers - 1) / setting.workers,
        busiest_up=size * (1 + sent.by_busiest),
        seed_up=contributors * size * sent.by_seed,
        coordinator_in=contributors * size,
        coordinator_out=out,
        phases_s={
            "encode": setting.parameters / setting.coder.encode,
            "push": _push_s(setting, contributors, setting.coder),
            "fetch": _fetch_s(setting, contributors, size, sent, out),
            "merge": _merge_s(setting, contributors, setting.coder),
        },
    )


def two_level(setting: Setting, contributors: int, group_size: int) -> Cost:
    """Two mergers of each group fetch its contributions and merge them; everybody fetches what they came to."""
    groups = ceil(contributors / group_size)
    members = ceil(contributors / groups)
    mergers = min(MERGERS, members)
    parameters, links = setting.parameters, setting.links
    size, merged = (parameters * coder.bytes_per_parameter for coder in (setting.coder, setting.group_coder))
    sent = spread(setting, groups, mergers)
    gathered = mergers * (contributors - groups) * size  # by all mergers together, from those who made them
    relayed = gathered * setting.unreachable
    signals = setting.signals_bytes(contributors, groups)
    out = groups * merged * sent.by_coordinator + signals
    up = contributors * size + gathered - relayed + groups * merged * (1 + sent.by_workers)
    return Cost(
        contributors=contributors,
        group_size=group_size,
        worker_up=up / setting.workers,
        worker_down=(gathered + groups * merged * (setting.workers - mergers)) / setting.workers,
        busiest_up=size * mergers + merged * (1 + sent.by_busiest),
        seed_up=groups * merged * sent.by_seed,
        coordinator_in=contributors * size + groups * merged,
        coordinator_out=out + relayed,
        phases_s={
            "encode": parameters / setting.coder.encode,
            "push": _push_s(setting, contributors, setting.coder),
            "gather": 8 * size * max((members - 1) / links.down_bps, min(mergers, members - 1) / links.up_bps),
            "merge groups": parameters * (members / setting.coder.decode + 1 / setting.group_coder.encode),
            "push groups": _push_s(setting, groups, setting.group_coder),
            "fetch": _fetch_s(setting, groups, merged, sent, out),
            "merge": _merge_s(setting, groups, setting.group_coder),
        },
    )


def best_group_size(setting: Setting, contributors: int) -> int:
    """The group size with which a round takes the fewest seconds; two groups or more."""
    sizes = {ceil(contributors / groups) for groups in range(2, contributors + 1)}
    return min(sorted(sizes), key=lambda size: two_level(setting, contributors, size).seconds)


def butterfly(setting: Setting, contributors: int) -> Cost:
    """All-reduce among the contributors; everybody else fetches the average, which one of them pushes."""
    parameters, coder = setting.parameters, setting.dense_coder
    size = coder.bytes_per_parameter * parameters
    followers = setting.workers - contributors
    exchanged = 2 * (contributors - 1) / contributors * size
    sent = spread(setting, 1, contributors)
    out = size * sent.by_coordinator + setting.signals_bytes(contributors, 1)
    return Cost(
        contributors=contributors,
        group_size=0,
        worker_up=(contributors * exchanged + size * (1 + sent.by_workers)) / setting.workers,
        worker_down=(contributors * exchanged + size * followers) / setting.workers,
        busiest_up=exchanged + size * (1 + sent.by_busiest),
        seed_up=size * sent.by_seed,
        coordinator_in=size,
        coordinator_out=out,
        phases_s={
            "all-reduce": 8 * exchanged / min(setting.links.up_bps, setting.links.down_bps)
            + parameters * (2 / coder.encode + 2 / coder.decode),
            "push": _push_s(setting, 1, coder),
            "fetch": _fetch_s(setting, 1 if followers else 0, size, sent, out),
            "merge": _merge_s(setting, 1, coder),
        },
    )


def _push_s(setting: Setting, payloads: int, coder: Coder) -> float:
    """As many workers push one payload each; the coordinator checks them one after the other as they come."""
    size = coder.bytes_per_parameter * setting.parameters
    return max(
        8 * size / setting.links.up_bps,
        8 * size * payloads / setting.links.coordinator_bps,
        payloads * setting.parameters / coder.check,
    )


def _fetch_s(setting: Setting, payloads: int, size: float, sent: Spread, coordinator_out: float) -> float:
    """Everybody fetches `payloads` of `size` bytes."""
    links = setting.links
    own = payloads == setting.workers
    return 8 * max(
        (payloads - own) * size / links.down_bps,
        size * paced_copies(setting, payloads, sent.by_busiest) / links.up_bps,
        size * sent.by_seed * payloads / links.seed_bps,
        coordinator_out / links.coordinator_bps,
    )


def _merge_s(setting: Setting, payloads: int, coder: Coder) -> float:
    return setting.parameters * (payloads / coder.decode + 1 / setting.finish)
