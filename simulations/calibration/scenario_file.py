"""A calibrated scenario as a commented TOML file: beside each figure, what it was measured from and how sure it is."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomlkit

from protocol.run_spec import RunSpec
from simulations.calibration.fit import Figure, Fit, FittedPeer
from simulations.calibration.journal import Seen
from simulations.world.devices import DEVICES, TRAINING_BYTES_PER_PARAMETER

MARGIN = 1.25  # of time, so that a simulated run that is a little slower ends too
MAX_HOURS = 100_000.0
COLUMN = 34
UNSEEN = {"coordinator", "invite", "name", "seed"}  # sections of a run that the scenario has by itself, or not at all
Line = tuple[str, Any, str]  # key, value, comment


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run is, from its genesis. is_local: its coordinator listened on the loopback interface alone."""

    run_id: str
    spec: RunSpec
    num_parameters: int
    is_local: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Seconds of one peer that the simulator does not model, and that the real run took."""

    start_s: float = 0.0
    lease_s: float = 0.0
    reveal_s: float = 0.0
    merge_s: float = 0.0


def render_scenario(facts: RunFacts, seen: Seen, fitted: Fit, extras: Mapping[str, Extra]) -> str:
    """The file's text. extras: by peer."""
    lines = [*_head(facts, seen, fitted), ""]
    for heading, entries in _tables(facts, seen, fitted, extras):
        lines += [heading] if heading else []
        lines += [*(_render(entry) for entry in entries), ""]
    return "\n".join(lines)


def name_scenario(spec: RunSpec) -> str:
    """What the scenario of a run is called, and by default its file."""
    return re.sub(r"[^\w.-]+", "-", f"{spec.name[:50]}-as-run")


def name_populations(fitted: Fit) -> list[str]:
    """A name for each peer: its own, numbered where two have the same."""
    names: list[str] = []
    for peer in fitted.peers:
        name = re.sub(r"[^\w-]+", "-", peer.name)[:32].strip("-") or "peer"
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names


def tell(figure: Figure, unit: str) -> str:
    """ "12 leases, ±3 %" """
    return f"{figure.count:,} {unit if figure.count == 1 else unit + 's'}, ±{100 * figure.spread:.0f} %"


def _head(facts: RunFacts, seen: Seen, fitted: Fit) -> Iterator[str]:
    yield f"# Calibrated from the run `{facts.spec.name}` ({facts.run_id}) by `manyhands simulate calibrate`:"
    yield f"# {len(seen.rounds):,} merged rounds, {seen.num_void:,} void, {len(seen.peers):,} workers."
    yield "#"
    yield "# Figures are medians. Beside each: of how many observations, and their spread (robust standard deviation)."
    round_s, lease_s = fitted.rounds.round_s, fitted.lease_s
    yield f"# A round took {round_s.value:.2f} s ({tell(round_s, 'round')}) from its opening to the next."
    yield f"# Between lease and header, besides inner steps: {lease_s.value:.3f} s ({tell(lease_s, 'lease')})."
    yield f"# All speeds together moved by ±{100 * fitted.together:.0f} % from round to round, which is not simulated."


def _tables(
    facts: RunFacts, seen: Seen, fitted: Fit, extras: Mapping[str, Extra]
) -> Iterator[tuple[str, Sequence[Line]]]:
    spec = facts.spec
    yield (
        "",
        [
            ("name", name_scenario(spec), ""),
            ("description", f"As the run {spec.name} went", ""),
            ("fidelity", "time", "learn trains for real, on [run.data]'s text"),
            ("seed", spec.seed, "the run's: the same shards go to the same peers"),
            _hours(seen, spec),
            ("validator", seen.has_validator, ""),
        ],
    )
    yield "[model]", [("parameters", facts.num_parameters, "from the genesis")]
    yield "[coordinator]", [("link", "datacenter", "not recorded: assumed")]
    for section, values in _run_sections(spec):
        yield f"[run.{section}]", [(key, value, "") for key, value in values.items()]
    for name, peer in zip(name_populations(fitted), fitted.peers, strict=True):
        yield "[[population]]", _describe_population(facts, name, peer)
        yield "[population.measured]", list(_describe_measured(facts, fitted, peer, extras[peer.id]))


def _hours(seen: Seen, spec: RunSpec) -> Line:
    """Until the run was finished, or until it would be at its speed so far."""
    factor = 1.0 if seen.finished else max(1.0, spec.train.tokens / max(seen.tokens, 1))
    why = "when it was finished" if seen.finished else "when it would be finished at its speed so far"
    return "hours", _short(min(MAX_HOURS, MARGIN * factor * seen.ends_s / 3600.0)), f"{why}, and a quarter more"


def _run_sections(spec: RunSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """What differs from the defaults."""
    for section, values in spec.model_dump(mode="json", exclude_defaults=True, exclude_none=True).items():
        if section not in UNSEEN:
            yield section, values


def _describe_population(facts: RunFacts, name: str, peer: FittedPeer) -> list[Line]:
    link = "datacenter" if facts.is_local else "fixed"
    return [
        ("name", name, peer.id),
        ("count", 1, ""),
        ("device", _choose_device(peer), f"its class, for power and codec, by its name: {peer.device}"),
        ("link", link, "assumed, for what is not measured below: loss of packets"),
    ]


def _choose_device(peer: FittedPeer) -> str:
    words = peer.device.lower()
    if any(word in words for word in ("h100", "h200", "a100", "b200", "l40", "v100")):
        return "server-gpu"
    return "gaming-gpu" if any(word in words for word in ("nvidia", "geforce", "radeon")) else "laptop"


def _describe_measured(facts: RunFacts, fitted: Fit, peer: FittedPeer, extra: Extra) -> Iterator[Line]:
    speed = peer.steps_per_s
    step_flops = 6.0 * facts.num_parameters * facts.spec.step_tokens
    sure = tell(speed, "lease") if peer.speed_from == "leases" else f"from {peer.speed_from}"
    yield "flops", _short(speed.value * step_flops), f"{speed.value:.3g} inner steps a second; {sure}"
    yield "jitter", _short(peer.jitter), "of the speed, from lease to lease"
    if peer.claimed_steps_per_s:
        yield "claimed_steps_per_s", _short(peer.claimed_steps_per_s), "when it joined: sizes its first lease"
    memory = max(DEVICES[_choose_device(peer)].memory_bytes, 1.1 * TRAINING_BYTES_PER_PARAMETER * facts.num_parameters)
    yield "memory_bytes", _short(memory), "not measured; it held the model"
    yield from _describe_link(facts, peer)
    for key, value, seen, unit in (
        ("start_s", extra.start_s, peer.start_s, "start"),
        ("lease_s", extra.lease_s, fitted.lease_s, "lease"),
        ("reveal_s", extra.reveal_s, peer.reveal_s, "payload"),
        ("merge_s", extra.merge_s, peer.merge_s, "merge"),
    ):
        if seen is not None:
            told = f"beyond what is simulated; {seen.value:.3f} s were measured, {tell(seen, unit)}"
            yield key, _short(value), told
        elif key == "start_s":
            yield key, 0.0, "not seen"
    sessions = [[round(moment, 7) for moment in session] for session in peer.sessions_hours]
    yield "sessions_hours", sessions, "when it was here; the last one goes on where no end was seen"


def _describe_link(facts: RunFacts, peer: FittedPeer) -> Iterator[Line]:
    for key, figure, unit in (("up_bps", peer.up_bps, "upload"), ("down_bps", peer.down_bps, "merge")):
        if figure is not None:
            yield key, _short(figure.value), f"{figure.value / 1e6:.3g} Mbit/s; {tell(figure, unit)}"
    if peer.latency_s is not None:
        of = f"half of the shortest wait of {peer.latency_s.count:,} for a payload"
        yield "latency_s", _short(peer.latency_s.value), f"at most: {of}, transfer taken off"
    if facts.is_local:
        yield "dialable", 1.0, "not recorded; on one machine everybody can be dialled"


def _render(line: Line) -> str:
    key, value, comment = line
    text = f"{key} = {_to_toml(value)}"
    return f"{text.ljust(COLUMN)}  # {comment}" if comment else text


def _to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_to_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_to_toml(each) for each in value) + "]"
    if isinstance(value, float):
        text = repr(value) if abs(value) < 1e6 else f"{value:g}"
        return text.replace("e+0", "e").replace("e+", "e")
    return str(tomlkit.item(value).as_string())


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
