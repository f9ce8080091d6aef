"""How long a crowd of phones and computers takes for a model: a formula, from the same world as the simulator's.

    t = (D / (phi V) + tau D / B_crit) / u

D tokens are wanted (20 a parameter: Hoffmann et al. 2022). V: tokens a second of the devices that are online and hold
the model. phi: the share of the work that is credited, since peers take turns and what they keep is lost when their
session ends. The second term is the price of a batch of B = phi V tau tokens, tau being the seconds of one inner step:
(S/S_min - 1)(E/E_min - 1) = 1 with S_min = D / B_crit (McCandlish et al. 2018, equation 2.11). u: the share of a round
that a typical peer computes; the rest is exchange, and waiting for the slowest contributor. Codec, inner steps,
contributors and the kinds of devices are those with the least t whose penalty in loss is bearable, and as many devices
as help.

B_crit = 22.9 D^0.47 tokens (Zhang et al. 2024, the fit over data sizes).
"""

from dataclasses import dataclass, field, replace
from functools import cache
from math import erf, exp, log, sqrt

import numpy as np
from numpy.typing import NDArray

from coordinator.core.leases import MAX_LEASE_FACTOR
from coordinator.sessions import MAX_PAYLOAD_PEERS
from protocol.policy import CHOICES, STEPS_PENALTY
from simulations.virtual.merging import DECODE_GAIN, DECODE_GAIN_DENSE
from simulations.world.availability import AVAILABILITY, HOUR_S
from simulations.world.devices import DEVICES, TRAINING_BYTES_PER_PARAMETER
from simulations.world.links import LINKS

Floats = NDArray[np.float64]
# Of all phones and computers: share, link, availability; the fastest kind first. 4.7 billion people use a smartphone
# (GSMA, The Mobile Economy 2025); Microsoft counts 1.4 billion Windows devices; 132 million play on Steam in a month
# (Valve 2021). Laptops outsell desktops about three to one (IDC).
KINDS = (
    ("gaming-gpu", 0.02, "fiber", "when-idle"),
    ("desktop", 0.06, "cable", "volunteer"),
    ("laptop", 0.17, "fixed", "evenings"),
    ("phone", 0.75, "home-wifi", "charging-at-night"),
)
MEMORY_SPREAD = 0.3  # as world.population draws it
TOKENS_PER_PARAMETER = 20.0
BATCH_COEFFICIENT, BATCH_EXPONENT = 22.9, 0.47
SEQUENCE_TOKENS = 1024.0  # the smallest batch of one inner step
SHORTEST_STEP_S = 0.1
FIXED_S = 3.0  # of a round: latencies, the manifest, the outer step
# A round waits for its slowest contributor, and after it for most peers' merges: the others miss the next one.
PROMPT, PROMPT_DISTANCE = 0.9, 1.28
DEADLINE_FACTOR = 2.0  # round.deadline_factor
BEARABLE_NATS = 0.06
PART_STEP = 1.5
UNKNOWN_NATS = 10.0  # beyond what was measured
MOST_TOGETHER = 20_000.0  # devices; more never helped, for no codec and no H
DAY_S = 86400.0
GROUPS = (8, 16, 32)  # sizes; a merged group is one int8 payload
GROUP_BYTES = next(choice.bytes_per_parameter for choice in CHOICES if choice.codec == "int8")
CONTRIBUTORS = (16, 32, 64, 128, 256, 512, 1024)
LIMITS = ("computing", "work lost", "batch size", "exchange and waiting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Factors on what is uncertain."""

    phone_speed: float = 1.0
    computer_speed: float = 1.0
    critical_batch: float = 1.0
    online: float = 1.0
    session: float = 1.0
    links: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """How a run exchanges. None: whatever is best."""

    codec: tuple[str, tuple[tuple[str, int | float], ...]] | None = None
    inner_steps: int | None = None
    contributors: int | None = None
    kinds: int | None = None  # how many of KINDS take part
    bearable_nats: float = BEARABLE_NATS
    everybody: bool = False  # who can, takes part; else as many as help
    tokens_per_parameter: float = TOKENS_PER_PARAMETER
    memory_bytes: float = TRAINING_BYTES_PER_PARAMETER  # a parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """days: infinite when nobody can hold the model. limits: days that each limit costs, in the order of LIMITS."""

    days: float
    limits: tuple[float, ...] = (0.0,) * len(LIMITS)
    online: float = 0.0  # devices that take part at a time: of those that could, as many as help
    able: float = 0.0  # devices that could
    fits: float = 0.0  # share of all devices that hold the model
    kinds: int = 0
    codec: str = ""
    inner_steps: int = 0
    contributors: int = 0
    group_size: int = 1
    penalty: float = 0.0
    batch_tokens: float = 0.0
    critical_tokens: float = 0.0
    round_s: float = 0.0
    credited: float = 0.0  # share of the work
    tokens_per_s: float = 0.0  # credited


@dataclass(slots=True, kw_only=True)
class _Crowd:
    """The first so many kinds of a population, online and with memory for the model."""

    counts: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # tokens a second, medians
    speed_spreads: list[float] = field(default_factory=list)
    link_spreads: list[float] = field(default_factory=list)
    jitters: list[float] = field(default_factory=list)
    up_bps: list[float] = field(default_factory=list)
    down_bps: list[float] = field(default_factory=list)
    codec_bps: list[float] = field(default_factory=list)
    session_s: list[float] = field(default_factory=list)

    def take(self, part: float) -> "_Crowd":
        """A part of it, of each kind alike."""
        return replace(self, counts=[count * part for count in self.counts])

    def median(self, values: list[float]) -> float:
        """Of the peers, each of whom has its kind's value."""
        order = np.argsort(values)
        reached = np.cumsum(np.array(self.counts)[order]) / sum(self.counts)
        return values[int(order[int(np.searchsorted(reached, 0.5))])]

    def mean(self, values: list[float]) -> float:
        return float(np.average(values, weights=self.counts))


def estimate(
    peers: float, parameters: float, assume: Assumptions | None = None, means: Means | None = None
) -> Estimate:
    """The fastest way that these means allow."""
    assume, means = assume or Assumptions(), means or Means()
    numbers = range(1, len(KINDS) + 1) if means.kinds is None else (means.kinds,)
    training_bytes = means.memory_bytes * parameters
    best = Estimate(days=float("inf"))
    for number in numbers:
        crowd = _gather(peers, parameters, training_bytes, number, assume)
        able = sum(crowd.counts)
        part = 1.0 if means.everybody else min(1.0, MOST_TOGETHER / max(able, 1.0))
        while able * part >= 1.0:
            one = _estimate(crowd.take(part), parameters, assume, means)
            best = min(best, replace(one, kinds=number, able=able), key=lambda found: found.days)
            part = 0.0 if means.everybody else part / PART_STEP
    fits = sum(share * share_with_memory(device, training_bytes) for device, share, _, _ in KINDS)
    return replace(best, fits=fits)


def share_with_memory(device: str, training_bytes: float) -> float:
    """Of a device class: those that hold what training takes, activations not counted."""
    distance = log(DEVICES[device].memory_bytes / training_bytes) / MEMORY_SPREAD
    return _normal(distance)


def critical_batch(tokens: float) -> float:
    """Tokens a step at which twice the data are needed for a given loss (Zhang et al. 2024)."""
    return BATCH_COEFFICIENT * float(tokens**BATCH_EXPONENT)


def _gather(peers: float, parameters: float, training_bytes: float, number: int, assume: Assumptions) -> _Crowd:
    crowd = _Crowd()
    for name, share, link_name, habit_name in KINDS[:number]:
        device, link, habit = DEVICES[name], LINKS[link_name], AVAILABILITY[habit_name]
        online = min(1.0, assume.online * sum(habit.share_online) / 24.0)
        factor = assume.phone_speed if name == "phone" else assume.computer_speed
        speed = factor * device.flops / (6.0 * parameters)
        crowd.counts.append(peers * share * online * share_with_memory(name, training_bytes))
        crowd.speeds.append(speed)
        crowd.speed_spreads.append(device.flops_spread)
        crowd.link_spreads.append(link.spread)
        crowd.jitters.append(device.jitter)
        crowd.up_bps.append(assume.links * link.up_bps)
        crowd.down_bps.append(assume.links * link.down_bps)
        crowd.codec_bps.append(device.codec_bps)
        crowd.session_s.append(assume.session * habit.session_hours * HOUR_S)
    return crowd


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """Ways of exchanging, a row each."""

    codecs: tuple[str, ...]
    bytes_per_parameter: Floats
    inner_steps: Floats
    contributors: Floats
    groups: Floats  # size; 1: none
    penalties: Floats  # of the codec
    gains: Floats  # how much faster it is decoded than encoded


@cache
def _list_options(means: Means) -> _Options:
    rows = [
        (choice, steps, count, group)
        for choice in CHOICES
        for steps, _ in STEPS_PENALTY
        for count in CONTRIBUTORS
        for group in (1, *GROUPS)
        if means.codec in (None, (choice.codec, choice.options))
        and means.inner_steps in (None, steps)
        and means.contributors in (None, count)
        and group < count
    ]
    if not rows:
        raise ValueError("there is no such codec, number of inner steps or of contributors")
    return _Options(
        codecs=tuple(c.codec + "".join(f" {key} = {value}" for key, value in c.options) for c, *_ in rows),
        bytes_per_parameter=np.array([choice.bytes_per_parameter for choice, *_ in rows]),
        inner_steps=np.array([float(steps) for _, steps, *_ in rows]),
        contributors=np.array([float(count) for _, _, count, _ in rows]),
        groups=np.array([float(group) for *_, group in rows]),
        penalties=np.array([choice.penalty for choice, *_ in rows]),
        gains=np.array([DECODE_GAIN.get(choice.codec, DECODE_GAIN_DENSE) for choice, *_ in rows]),
    )


def _estimate(crowd: _Crowd, parameters: float, assume: Assumptions, means: Means) -> Estimate:
    """With all of this crowd."""
    online = sum(crowd.counts)
    tokens = means.tokens_per_parameter * parameters
    critical = assume.critical_batch * critical_batch(tokens)
    step_s = max(SEQUENCE_TOKENS / crowd.median(crowd.speeds), SHORTEST_STEP_S)
    velocity = PROMPT * _sum_speeds(crowd, SEQUENCE_TOKENS / step_s)
    options = _list_options(means)
    contributors = np.minimum(options.contributors, online)
    compute_s = options.inner_steps * step_s
    slowest_s = compute_s * np.minimum(np.exp(crowd.mean(crowd.jitters) * _extreme(contributors)), DEADLINE_FACTOR)
    round_s = slowest_s + _exchange_s(crowd, parameters, contributors, options)
    waits = np.where(contributors < online, online * round_s / (contributors * crowd.mean(crowd.session_s)), 0.0)
    credited, useful = 1.0 / (1.0 + waits), compute_s / round_s
    plain, batch = tokens / velocity / DAY_S, step_s * tokens / critical / DAY_S
    penalties = options.penalties + _steps_penalty(options.inner_steps * np.maximum(1.0, online / contributors))
    days = (plain * (1.0 + waits) + batch) / useful
    days[penalties > means.bearable_nats] = np.inf
    best = int(np.argmin(days))
    lost = plain * float(waits[best])
    return Estimate(
        days=float(days[best]),
        limits=(plain, lost, batch, float(days[best]) - plain - lost - batch),
        online=online,
        codec=options.codecs[best],
        inner_steps=int(options.inner_steps[best]),
        contributors=int(contributors[best]),
        group_size=int(options.groups[best]),
        penalty=float(penalties[best]),
        batch_tokens=float(credited[best]) * velocity * step_s,
        critical_tokens=critical,
        round_s=float(round_s[best]),
        credited=float(credited[best]),
        tokens_per_s=float(credited[best] * useful[best]) * velocity,
    )


def _sum_speeds(crowd: _Crowd, median: float) -> float:
    """Tokens a second of all; no lease is for more than MAX_LEASE_FACTOR times the median peer's."""
    most, total = MAX_LEASE_FACTOR * median, 0.0
    for count, speed, spread in zip(crowd.counts, crowd.speeds, crowd.speed_spreads, strict=True):
        distance = log(most / speed) / spread
        below = speed * exp(spread**2 / 2.0) * _normal(distance - spread)
        total += count * (below + most * (1.0 - _normal(distance)))
    return total


def _normal(distance: float) -> float:
    return 0.5 * (1.0 + erf(distance / sqrt(2.0)))


def _extreme(count: Floats) -> Floats:
    """How many standard deviations the most extreme of so many is off, about."""
    distance: Floats = np.sqrt(2.0 * np.log(np.maximum(count, 1.0)))
    return distance


def _steps_penalty(inner_steps: Floats) -> Floats:
    """Nats, between the measured points. What a peer did while it waited for its turn counts as more inner steps."""
    steps, penalties = np.array(STEPS_PENALTY, np.float64).T
    inside = np.interp(np.log(inner_steps), np.log(steps), np.maximum(penalties, 0.0))
    return np.where(inner_steps <= steps[-1], inside, UNKNOWN_NATS)


def _exchange_s(crowd: _Crowd, parameters: float, contributors: Floats, options: _Options) -> Floats:
    """Seconds a round: own payload up, all (or all groups') down, passed on by seeds in data centres."""
    own_bits, merged_bits = 8.0 * options.bytes_per_parameter * parameters, 8.0 * GROUP_BYTES * parameters
    spread = crowd.mean(crowd.link_spreads)
    up_bps = crowd.median(crowd.up_bps) * np.exp(-spread * _extreme(contributors))
    down_bps = crowd.median(crowd.down_bps) * exp(-spread * PROMPT_DISTANCE)
    codec_bps = crowd.median(crowd.codec_bps)
    online = sum(crowd.counts)
    seeds_bps = MAX_PAYLOAD_PEERS * LINKS["datacenter"].up_bps
    grouped = options.groups > 1.0
    payloads = np.where(grouped, np.ceil(contributors / options.groups), contributors)
    bits = np.where(grouped, merged_bits, own_bits)
    fetch_s = payloads * bits * max(1.0 / down_bps, online / seeds_bps)
    gains = np.where(grouped, DECODE_GAIN_DENSE, options.gains)
    decode_s = 4.0 * parameters * (1.0 + payloads / gains) / codec_bps
    gather_s = np.maximum(2.0 * own_bits / up_bps, options.groups * own_bits / down_bps) + merged_bits / up_bps
    gather_s += 4.0 * parameters * (1.0 + options.groups) / codec_bps
    seconds: Floats = FIXED_S + own_bits / up_bps + fetch_s + decode_s + np.where(grouped, gather_s, 0.0)
    return seconds


def sample_days(peers: float, parameters: float, draws: list[Assumptions]) -> tuple[float, float]:
    """The 5th and 95th percentile of days under these assumptions."""
    days = [estimate(peers, parameters, assume).days for assume in draws]
    return float(np.quantile(days, 0.05, method="nearest")), float(np.quantile(days, 0.95, method="nearest"))


def draw_assumptions(count: int, spreads: dict[str, float], seed: int) -> list[Assumptions]:
    """Every factor log-uniform between 1/spread and spread, by itself."""
    rng = np.random.default_rng(seed)
    return [
        Assumptions(**{name: float(spread ** rng.uniform(-1.0, 1.0)) for name, spread in spreads.items()})
        for _ in range(count)
    ]
