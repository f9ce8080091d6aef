"""A scenario's peers as arrays, drawn once from its seed. N: all peers, in the order of the populations."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainValidator, field_validator

from protocol.run_spec import Fraction, Positive, Section
from simulations.world import links
from simulations.world.availability import AVAILABILITY
from simulations.world.devices import DEVICES

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Attack = Literal["sign_flip", "scaled", "noise", "zeros", "copies"]


def one_of(known: Collection[str]) -> Callable[[object], object]:
    """A check that a value is one of these words."""

    def check(value: object) -> object:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
        return value

    return check


# Of what can be measured, that which fidelity `plan` does not know.
UNPLANNED = frozenset({"start_s", "lease_s", "reveal_s", "merge_s", "claimed_steps_per_s", "sessions_hours"})


class Measured(Section):
    """What was measured of such peers (simulations.calibrate), with no spread; absent: as their classes have it."""

    flops: Positive | None = Field(None, description="that a training step gets out of the device")
    jitter: Annotated[float, Field(ge=0.0, le=3.0)] | None = Field(None, description="of log(speed), by lease")
    memory_bytes: Positive | None = None
    down_bps: Positive | None = None
    up_bps: Positive | None = None
    latency_s: Annotated[float, Field(ge=0.0)] | None = Field(None, description="one way to the coordinator")
    dialable: Fraction | None = Field(None, description="share that others can dial")
    start_s: Annotated[float, Field(ge=0.0)] | None = Field(None, description="of a process, before it has a state")
    lease_s: Annotated[float, Field(ge=0.0)] = Field(0.0, description="more, from lease to header")
    reveal_s: Annotated[float, Field(ge=0.0)] = Field(0.0, description="more, from header to payload")
    merge_s: Annotated[float, Field(ge=0.0)] = Field(0.0, description="more, from manifest to the new state")
    claimed_steps_per_s: Positive | None = Field(None, description="inner steps, as it says when it joins")
    sessions_hours: tuple[tuple[float, ...], ...] = Field(
        (), description="[from, to] of each session, in order; without a `to` the last one does not end"
    )

    @field_validator("sessions_hours")
    @classmethod
    def _check_sessions(cls, sessions: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        moments = [moment for session in sessions for moment in session]
        whole = all(len(session) == 2 for session in sessions[:-1]) and (not sessions or len(sessions[-1]) in (1, 2))
        if not whole or moments != sorted(moments) or (moments and moments[0] < 0.0):
            raise ValueError("write [[from, to], …] in order of time; the last may be [from]")
        return sessions


class PopulationSpec(Section):
    """So many peers of one kind."""

    name: Annotated[str, Field(min_length=1, max_length=40)]
    count: Annotated[int, Field(ge=1, le=10_000_000)]
    device: Annotated[str, PlainValidator(one_of(DEVICES))]
    link: Annotated[str, PlainValidator(one_of(links.LINKS))] = "fixed"
    availability: Annotated[str, PlainValidator(one_of(AVAILABILITY))] = "always"
    region: Annotated[str, PlainValidator(one_of(links.REGIONS))] = "europe"
    joins_at_hours: Annotated[float, Field(ge=0.0)] = Field(0.0, description="when the first of them arrive")
    joins_over_hours: Annotated[float, Field(ge=0.0)] = Field(0.0, description="they arrive evenly over this time")
    throttle: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="share of the time that is computed")
    speed_spread: Annotated[float, Field(ge=0.0, le=3.0)] | None = Field(None, description="instead of the device's")
    seed: bool = Field(False, description="offers to pass everybody's payloads on")
    attack: Attack | None = None
    attack_fraction: Fraction = Field(1.0, description="share of these peers that attack")
    measured: Measured = Field(default_factory=Measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """All peers. Units: operations, bits and bytes a second; seconds one way to the coordinator."""

    kind: NDArray[np.int64]  # (N,) index into the scenario's populations
    flops: Floats
    memory_bytes: Floats
    watts: Floats
    codec_bps: Floats
    jitter: Floats
    down_bps: Floats
    up_bps: Floats
    latency_s: Floats
    stream_bps: Floats  # of one TCP stream to a peer elsewhere
    dialable: Bools
    seeds: Bools
    joins_s: Floats
    attackers: Bools

    @property
    def count(self) -> int:
        return len(self.kind)


def name_peers(count: int) -> list[str]:
    """The ids of so many peers, in order."""
    width = len(str(max(count - 1, 0)))
    return [f"peer-{index:0{width}d}" for index in range(count)]


def name_attackers(specs: tuple[PopulationSpec, ...]) -> dict[str, Attack]:
    """The attack of each peer that attacks: the first of their population."""
    names = iter(name_peers(sum(spec.count for spec in specs)))
    attacks: dict[str, Attack] = {}
    for spec in specs:
        own = [next(names) for _ in range(spec.count)]
        if spec.attack is not None:
            attacks |= dict.fromkeys(own[: round(spec.attack_fraction * spec.count)], spec.attack)
    return attacks


def draw_population(specs: tuple[PopulationSpec, ...], coordinator_region: str, seed: int) -> Population:
    """The peers of these populations. Each population has a stream of its own, so one more changes no other."""
    drawn = [_draw(index, spec, coordinator_region, specs, seed) for index, spec in enumerate(specs)]
    return Population(**{name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]})


def _draw(
    index: int, spec: PopulationSpec, coordinator_region: str, specs: tuple[PopulationSpec, ...], seed: int
) -> dict[str, NDArray[np.generic]]:
    rng = np.random.Generator(np.random.PCG64((seed, 1, index)))
    n, device, link = spec.count, DEVICES[spec.device], links.LINKS[spec.link]
    spread = device.flops_spread if spec.speed_spread is None else spec.speed_spread
    down_bps, up_bps = links.draw_bandwidth(link, n, rng)
    latency_s = link.latency_s * rng.lognormal(0.0, 0.3, n)
    total = sum(other.count for other in specs)
    others_s = sum(links.region_latency_s(spec.region, other.region) * other.count for other in specs) / total
    numbers = np.arange(n)
    drawn = {
        "kind": np.full(n, index),
        "flops": device.flops * rng.lognormal(0.0, spread, n) * spec.throttle,
        "memory_bytes": device.memory_bytes * rng.lognormal(0.0, 0.3, n),
        "watts": np.full(n, device.watts),
        "codec_bps": np.full(n, device.codec_bps),
        "jitter": np.full(n, device.jitter),
        "down_bps": down_bps,
        "up_bps": up_bps,
        "latency_s": latency_s + links.region_latency_s(spec.region, coordinator_region),
        "stream_bps": links.stream_bps(2 * (2 * latency_s + others_s), link.loss),
        "dialable": rng.random(n) < link.dialable,
        "seeds": np.full(n, spec.seed),
        "joins_s": 3600.0 * (spec.joins_at_hours + spec.joins_over_hours * rng.random(n)),
        "attackers": (numbers < round(spec.attack_fraction * n)) & (spec.attack is not None),
    }
    return drawn | _draw_measured(spec, rng)


def _draw_measured(spec: PopulationSpec, rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    """What stands in the place of what was drawn."""
    names = ("flops", "jitter", "memory_bytes", "down_bps", "up_bps", "latency_s")
    values = {name: getattr(spec.measured, name) for name in names}
    measured: dict[str, NDArray[np.generic]] = {
        name: np.full(spec.count, value) for name, value in values.items() if value is not None
    }
    if spec.measured.dialable is not None:
        measured["dialable"] = rng.random(spec.count) < spec.measured.dialable
    return measured
