"""A scenario's peers as the plan keeps them, and when each is online. N: the peers with memory for the model.

Sessions and gaps are drawn as simulations.virtual.sessions draws them, for all peers at once.
"""

from dataclasses import dataclass, field
from math import gamma

import numpy as np
from numpy.typing import NDArray

from simulations.scenario import Scenario
from simulations.world.availability import AVAILABILITY, DAY_S, HOUR_S, share_online
from simulations.world.links import UTC_OFFSET_HOURS
from simulations.world.population import draw_population

Floats = NDArray[np.float64]
Halves = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
HOURS = np.arange(25.0)
NEVER_S = np.inf


@dataclass(slots=True, kw_only=True)
class Crowd:
    """Arrays over peers. float32 where a value is measured, float64 where it is a moment."""

    index: NDArray[np.int32]  # its place among all peers of the scenario
    kind: NDArray[np.int16]  # index into the scenario's populations
    step_s: Halves  # of one inner step
    jitter: Halves
    watts: Halves
    codec_bps: Halves
    up_bps: Halves
    down_bps: Halves
    latency_s: Halves
    stream_bps: Halves
    dialable: Bools
    seeds: Bools
    toggles_s: Floats  # when its session ends, or its next one begins
    started_s: Floats  # when its session began
    synced_s: Floats  # since when it has followed the manifests
    report_s: Floats  # since when the coordinator has known that it holds the newest state
    busy_until_s: Floats  # when it was last done with a lease; 0: had none in this session
    steps_per_s: Halves  # what the coordinator believes
    online: Bools = field(init=False)
    observed: Bools = field(init=False)
    upload_bps: Halves = field(init=False)  # measured; 0: not yet
    download_bps: Halves = field(init=False)
    carried: Halves = field(init=False)  # shards trained and not yet credited
    last_turn: NDArray[np.int32] = field(init=False)
    sessions: NDArray[np.int32] = field(init=False)
    online_s: Halves = field(init=False)
    compute_s: Halves = field(init=False)
    sent_bytes: Halves = field(init=False)
    received_bytes: Halves = field(init=False)
    trained_shards: Halves = field(init=False)
    credited_shards: Halves = field(init=False)
    accepted: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.kind)
        for name in ("online", "observed"):
            setattr(self, name, np.zeros(count, np.bool_))
        for name in ("sessions", "accepted"):
            setattr(self, name, np.zeros(count, np.int32))
        self.last_turn = np.full(count, -1, np.int32)
        for name in ("upload_bps", "download_bps", "carried", "online_s", "compute_s"):
            setattr(self, name, np.zeros(count, np.float32))
        for name in ("sent_bytes", "received_bytes", "trained_shards", "credited_shards"):
            setattr(self, name, np.zeros(count, np.float32))

    @property
    def count(self) -> int:
        return len(self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """When each population is online. K: populations."""

    shape: Floats  # (K,) of Weibull
    scale_s: Floats
    abrupt: Floats
    lifetime_s: Floats
    returns: Floats  # (K, 25) returns to expect of a peer that is offline, from midnight to each hour of its local day
    hour_at_start: Floats  # (K,) local hour at the scenario's start

    def local_hour(self, kind: NDArray[np.int16], at_s: Floats) -> Floats:
        return (self.hour_at_start[kind] + at_s / HOUR_S) % 24.0

    def draw_sessions_s(self, kind: NDArray[np.int16], rng: np.random.Generator) -> Floats:
        """Lengths of sessions, float64 like `kind`."""
        return self.scale_s[kind] * rng.standard_exponential(len(kind)) ** (1.0 / self.shape[kind])

    def draw_gaps_s(self, kind: NDArray[np.int16], at_s: Floats, rng: np.random.Generator) -> Floats:
        """Seconds until peers that go offline at `at_s` are back."""
        hour = self.local_hour(kind, at_s)
        target = rng.standard_exponential(len(kind))
        gaps = np.empty(len(kind))
        for k in np.unique(kind):
            of_kind = kind == k
            returns, from_hour = self.returns[k], hour[of_kind]
            days, rest = np.divmod(np.interp(from_hour, HOURS, returns) + target[of_kind], returns[-1])
            gaps[of_kind] = HOUR_S * (24.0 * days + np.interp(rest, returns, HOURS) - from_hour)
        return gaps


def describe_habits(scenario: Scenario) -> Habits:
    """The habits of the scenario's populations."""
    kinds = [AVAILABILITY[spec.availability] for spec in scenario.population]
    shares = np.array([kind.share_online for kind in kinds])
    mean_hours = np.array([kind.session_hours for kind in kinds])
    rates = shares / np.maximum(1.0 - shares, 1e-6) / mean_hours[:, None]  # as availability.draw_gap_s
    shape = np.array([kind.session_shape for kind in kinds])
    return Habits(
        shape=shape,
        scale_s=mean_hours * HOUR_S / np.array([gamma(1 + 1 / each) for each in shape]),
        abrupt=np.array([kind.abrupt for kind in kinds]),
        lifetime_s=np.array([kind.lifetime_days * DAY_S for kind in kinds]),
        returns=np.concatenate([np.zeros((len(kinds), 1)), np.cumsum(rates, axis=1)], axis=1),
        hour_at_start=np.array(
            [scenario.start_hour_utc + UTC_OFFSET_HOURS[spec.region] for spec in scenario.population]
        ),
    )


def draw_crowd(scenario: Scenario, habits: Habits, rng: np.random.Generator) -> Crowd:
    """The peers that can hold the model, each with the moment at which its first session begins."""
    parameters = scenario.model.parameters
    population = draw_population(scenario.population, scenario.coordinator.region, scenario.seed)
    fits = np.flatnonzero(population.memory_bytes >= scenario.training_bytes(parameters))
    kind = population.kind[fits].astype(np.int16)
    begins_s = population.joins_s[fits]
    shares = np.empty(len(fits))
    for k, spec in enumerate(scenario.population):
        of_kind = kind == k
        hour = habits.local_hour(kind[of_kind], begins_s[of_kind])
        shares[of_kind] = share_online(AVAILABILITY[spec.availability], hour)
    late = np.flatnonzero(rng.random(len(fits)) >= shares)
    begins_s[late] += habits.draw_gaps_s(kind[late], begins_s[late], rng)
    begins_s += rng.random(len(fits))
    step_s = (scenario.flops_per_step(parameters) / population.flops[fits]).astype(np.float32)

    def pick(name: str) -> Halves:
        values: Floats = getattr(population, name)
        return values[fits].astype(np.float32)

    return Crowd(
        index=fits.astype(np.int32),
        kind=kind,
        step_s=step_s,
        jitter=pick("jitter"),
        watts=pick("watts"),
        codec_bps=pick("codec_bps"),
        up_bps=pick("up_bps"),
        down_bps=pick("down_bps"),
        latency_s=pick("latency_s"),
        stream_bps=pick("stream_bps"),
        dialable=population.dialable[fits],
        seeds=population.seeds[fits],
        toggles_s=begins_s,
        started_s=np.zeros(len(fits)),
        synced_s=np.full(len(fits), NEVER_S),
        report_s=np.full(len(fits), NEVER_S),
        busy_until_s=np.zeros(len(fits)),
        steps_per_s=1.0 / step_s,
    )


def advance(crowd: Crowd, habits: Habits, now_s: float, rng: np.random.Generator) -> Ints:
    """End and begin the sessions that are due by `now_s`. Returns the peers whose session began and still lasts."""
    due = np.flatnonzero(crowd.toggles_s <= now_s)
    begun = [np.zeros(0, np.int64)]
    while len(due):
        ends = crowd.online[due]
        _end(crowd, habits, due[ends], rng)
        begin = due[~ends]
        crowd.online[begin] = True
        crowd.sessions[begin] += 1
        crowd.started_s[begin] = crowd.toggles_s[begin]
        crowd.toggles_s[begin] += habits.draw_sessions_s(crowd.kind[begin], rng)
        begun.append(begin)
        due = due[crowd.toggles_s[due] <= now_s]
    new = np.unique(np.concatenate(begun))
    return new[crowd.online[new]]


def _end(crowd: Crowd, habits: Habits, peers: Ints, rng: np.random.Generator) -> None:
    """What a process kept in memory is gone with it."""
    at_s, kind = crowd.toggles_s[peers], crowd.kind[peers]
    length_s = at_s - crowd.started_s[peers]
    crowd.online[peers] = False
    crowd.online_s[peers] += length_s
    crowd.carried[peers] = crowd.busy_until_s[peers] = 0.0
    crowd.synced_s[peers] = crowd.report_s[peers] = NEVER_S
    back_s = at_s + habits.draw_gaps_s(kind, at_s, rng)
    gone = rng.random(len(peers)) < length_s / habits.lifetime_s[kind]
    crowd.toggles_s[peers] = np.where(gone, NEVER_S, back_s)
