"""What follows from a run's journal about its peers: medians, each with how often it was seen and how much it varied.

Speed. Between a lease and its header a peer fetches shards, makes its inner steps, sleeps in proportion where its owner
throttles it, and encodes. Its signed header says how long it was inside the steps, x, so that the time between the two
is k x + c over its leases: k by the median of slopes (Theil 1950, Sen 1968), c by the median of what is left. Shards
and payloads are alike, so the median peer's c is everybody's overhead; the rest is time of inner steps.

Jitter. Peers that share a machine or a network slow down together. The simulator draws each lease's speed by itself, so
only what is left when the mean over a round's peers is taken off counts as jitter.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, log, sqrt
from statistics import fmean, median

from simulations.calibration.journal import Seen, SeenLease, SeenPeer

HOUR_S = 3600.0
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
ENOUGH_FOR_JITTER = 5  # leases of one peer; with fewer, everybody's counts
ENOUGH_FOR_SLOPE = 5  # with fewer, k is 1
MOST_FOR_SLOPE = 200  # the last ones
MOST_UNTHROTTLED = 1.1  # a k below is noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A median, of how many observations, and their spread: the robust standard deviation over the median."""

    value: float
    count: int
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPeer:
    """One peer. None where nothing was seen. reveal_s, merge_s: as measured, transfers included."""

    id: str
    name: str
    device: str
    sessions_hours: list[list[float]]
    steps_per_s: Figure
    speed_from: str  # in words
    claimed_steps_per_s: float | None  # when it joined
    jitter: float
    start_s: Figure | None
    reveal_s: Figure | None
    merge_s: Figure | None
    up_bps: Figure | None
    down_bps: Figure | None
    latency_s: Figure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFigures:
    """Merged rounds, real or simulated."""

    round_s: Figure  # from the opening to the next opening
    merge_s: Figure | None  # from the close to the next opening; None when there was one round
    payload_bytes: Figure  # of one contribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """All peers, in the journal's order. together: by how much (a share) all speeds moved together."""

    peers: list[FittedPeer]
    lease_s: Figure  # everybody's overhead between lease and header
    rounds: RoundFigures
    together: float


def describe(values: Iterable[float]) -> Figure | None:
    """The figure of some observations; None when there are none."""
    seen = list(values)
    if not seen:
        return None
    middle = median(seen)
    return Figure(value=middle, count=len(seen), spread=_deviation(seen) / abs(middle) if middle else 0.0)


def fit(seen: Seen, compute_s: Mapping[int, float]) -> Fit:
    """Fit a run with at least one merged round. compute_s: seconds inside inner steps, by lease, from the ledger."""
    lease_s = fit_overhead(seen, compute_s)
    steps = {id_: _step_seconds(peer, lease_s.value, compute_s) for id_, peer in seen.peers.items()}
    jitter, together = _fit_jitter(steps)
    medians = {id_: median(by_round.values()) for id_, by_round in steps.items() if by_round}
    return Fit(
        peers=[
            _fit_peer(id_, peer, steps[id_], jitter[id_], median(medians.values())) for id_, peer in seen.peers.items()
        ],
        lease_s=lease_s,
        rounds=describe_rounds([seen]),
        together=together,
    )


def describe_rounds(runs: Sequence[Seen]) -> RoundFigures:
    """The rounds of these runs together. The last one of a run has no next: the median merge stands for its own."""
    rounds = [round_ for seen in runs for round_ in seen.rounds]
    merge_s = describe(round_.next_s - round_.closed_s for round_ in rounds if round_.next_s is not None)
    usual_s = merge_s.value if merge_s else 0.0
    peers = [peer for seen in runs for peer in seen.peers.values()]
    sizes = [lease.payload_bytes for peer in peers for lease in peer.leases if lease.header_s is not None]
    return RoundFigures(
        round_s=_must(describe((round_.next_s or round_.closed_s + usual_s) - round_.opened_s for round_ in rounds)),
        merge_s=merge_s,
        payload_bytes=_must(describe(float(size) for size in sizes)),
    )


def fit_overhead(seen: Seen, compute_s: Mapping[int, float]) -> Figure:
    """Seconds between lease and header besides the inner steps and the sleep that goes with them."""
    rests: list[float] = []
    of_peers: list[float] = []
    for peer in seen.peers.values():
        pairs = [(compute_s[lease.lease_id], _span(lease)) for lease in _trained(peer, compute_s)]
        slope = _fit_slope(pairs)
        left = [span - slope * inside for inside, span in pairs]
        if left:
            of_peers.append(max(median(left), 0.0))
            rests += left
    value = median(of_peers)
    return Figure(value=value, count=len(rests), spread=_deviation(rests) / value if value else 0.0)


def _fit_slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Seconds that pass for one inside inner steps: 1 of a peer that is not throttled."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(pairs[-MOST_FOR_SLOPE:], 2) if x1 != x2]
    if len(pairs) < ENOUGH_FOR_SLOPE or not slopes:
        return 1.0
    slope = median(slopes)
    return slope if slope >= MOST_UNTHROTTLED else 1.0


def _fit_peer(id_: str, peer: SeenPeer, steps: Mapping[int, float], jitter: float, others_step_s: float) -> FittedPeer:
    step_s = describe(steps.values())
    speed = Figure(value=1.0 / step_s.value, count=step_s.count, spread=step_s.spread) if step_s else None
    speed_from = "leases"
    if speed is None and peer.claimed_steps_per_s > 0.0:
        speed, speed_from = Figure(value=peer.claimed_steps_per_s, count=1, spread=0.0), "its own claim"
    elif speed is None:
        speed, speed_from = Figure(value=1.0 / others_step_s, count=0, spread=0.0), "the other peers"
    checked = [lease for lease in peer.leases if lease.header_s is not None and lease.checked_s is not None]
    pushed = [lease for lease in checked if lease.upload_bps > 0.0]
    return FittedPeer(
        id=id_,
        name=peer.name,
        device=peer.device,
        sessions_hours=[[moment / HOUR_S for moment in session] for session in peer.sessions],
        steps_per_s=speed,
        speed_from=speed_from,
        claimed_steps_per_s=peer.claimed_steps_per_s or None,
        jitter=jitter,
        start_s=describe(peer.starts_s),
        reveal_s=describe(_reveal_s(lease) for lease in checked),
        merge_s=describe(peer.merges_s),
        up_bps=describe(lease.upload_bps for lease in pushed),
        down_bps=describe(peer.download_bps),
        latency_s=_fit_latency(pushed),
    )


def _fit_latency(pushed: Sequence[SeenLease]) -> Figure | None:
    """Half of the shortest time from header to payload that was not transfer: a round trip, and what else there is."""
    rests = [_reveal_s(lease) - 8.0 * lease.payload_bytes / lease.upload_bps for lease in pushed]
    if not rests:
        return None
    return Figure(value=max(min(rests), 0.0) / 2, count=len(rests), spread=0.0)


def _step_seconds(peer: SeenPeer, overhead_s: float, compute_s: Mapping[int, float]) -> dict[int, float]:
    """Seconds of an inner step, throttling included, by round."""
    return {
        lease.round: max(_span(lease) - overhead_s, compute_s[lease.lease_id]) / lease.inner_steps
        for lease in _trained(peer, compute_s)
    }


def _trained(peer: SeenPeer, compute_s: Mapping[int, float]) -> list[SeenLease]:
    return [
        lease
        for lease in peer.leases
        if lease.header_s is not None and lease.inner_steps > 0 and compute_s.get(lease.lease_id, 0.0) > 0.0
    ]


def _fit_jitter(steps: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], float]:
    """Of each peer, and the part of it that all have in common."""
    apart = {
        id_: {round_: log(step_s / median(by_round.values())) for round_, step_s in by_round.items()}
        for id_, by_round in steps.items()
        if by_round
    }
    rounds = sorted({round_ for by_round in apart.values() for round_ in by_round})
    beside = {round_: [by_round[round_] for by_round in apart.values() if round_ in by_round] for round_ in rounds}
    common = {round_: fmean(values) for round_, values in beside.items() if len(values) > 1}
    own = {
        id_: [
            (each - common[round_]) * sqrt(len(beside[round_]) / (len(beside[round_]) - 1))
            if round_ in common
            else each
            for round_, each in by_round.items()
        ]
        for id_, by_round in apart.items()
    }
    pooled = _deviation([each for values in own.values() for each in values])
    jitter = {id_: _deviation(own[id_]) if len(own.get(id_, ())) >= ENOUGH_FOR_JITTER else pooled for id_ in steps}
    return jitter, exp(_deviation(list(common.values()))) - 1.0


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation by the median of absolute deviations; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    middle = median(values)
    return MAD_TO_DEVIATION * median(abs(value - middle) for value in values)


def _span(lease: SeenLease) -> float:
    return (lease.header_s or lease.granted_s) - lease.granted_s


def _reveal_s(lease: SeenLease) -> float:
    return (lease.checked_s or 0.0) - (lease.header_s or 0.0)


def _must(figure: Figure | None) -> Figure:
    if figure is None:
        raise ValueError("a run without a merged round")
    return figure
