"""A scenario: who takes part, over which links, in which run, for how long. TOML, checked; see simulations/scenarios.

A mistake is one line that names the place and, for an unknown key, the nearest known one.
"""

import difflib
import tomllib
from collections.abc import Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, PlainValidator, ValidationError, model_validator

from protocol.codecs import get_codec
from protocol.errors import ConfigError
from protocol.run_spec import AUTO, RunSpec, Section, parse_run_spec
from simulations.world.devices import TRAINING_BYTES_PER_PARAMETER
from simulations.world.faults import FaultSpec
from simulations.world.links import LINKS, REGIONS
from simulations.world.population import UNPLANNED, PopulationSpec, one_of

FOLDER = Path(__file__).parent / "scenarios"
MAX_SHARDS = 10_000_000


class ModelSize(Section):
    """The model as far as time and memory depend on it."""

    parameters: Annotated[int, Field(ge=1, le=10**13)] = 10_000_000
    flops_per_token: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="forward and backward; 6 a parameter when absent (Kaplan et al. 2020)"
    )


class CoordinatorSite(Section):
    """Where the coordinator and its validator stand."""

    link: Annotated[str, PlainValidator(one_of(LINKS))] = "datacenter"
    region: Annotated[str, PlainValidator(one_of(REGIONS))] = "europe"


class LearnSpec(Section):
    """What fidelity `learn` trains, and how it is computed."""

    task: Literal["lm", "digits"] = Field("lm", description="lm: run.data's text; digits: scikit-learn's, classified")
    backend: Literal["batched", "sequential", "ray"] = "batched"
    chunk: Annotated[int, Field(ge=0)] = Field(0, description="peers computed at a time; 0: as memory allows")
    device: str = "auto"


class Scenario(Section):
    """A whole scenario file."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w.-]+$")]
    description: str = ""
    fidelity: Literal["learn", "time", "plan"] = "time"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    hours: Annotated[float, Field(gt=0.0, le=100_000.0)] = Field(1.0, description="virtual time at which it ends")
    start_hour_utc: Annotated[float, Field(ge=0.0, lt=24.0)] = 18.0
    scale: Annotated[float, Field(gt=0.0, le=1e6)] = Field(1.0, description="multiplies every population's count")
    validator: bool = Field(True, description="a validator beside the coordinator: checkpoints, held-out loss")
    run: dict[str, Any] = Field(default_factory=dict, description="sections of a run.toml")
    model: ModelSize = Field(default_factory=ModelSize)
    coordinator: CoordinatorSite = Field(default_factory=CoordinatorSite)
    population: Annotated[tuple[PopulationSpec, ...], Field(min_length=1)]
    fault: tuple[FaultSpec, ...] = ()
    learn: LearnSpec = Field(default_factory=LearnSpec)

    @cached_property
    def spec(self) -> RunSpec:
        """The run. Raises ConfigError."""
        return parse_run_spec({"name": self.name, "seed": self.seed, **self.run}, where=f"{self.name}: [run]")

    @property
    def num_peers(self) -> int:
        return sum(population.count for population in self.population)

    @property
    def num_shards(self) -> int:
        """Shards of a corpus that lasts for the whole run, for runs without text."""
        return min(MAX_SHARDS, ceil(self.spec.train.tokens / self.spec.shard_tokens))

    def flops_per_step(self, num_parameters: int) -> float:
        """Floating-point operations of one inner step."""
        return (self.model.flops_per_token or 6.0 * num_parameters) * self.spec.step_tokens

    def training_bytes(self, num_parameters: int) -> float:
        """Memory that a peer needs, activations not counted."""
        return TRAINING_BYTES_PER_PARAMETER * num_parameters

    @model_validator(mode="after")
    def _check_together(self) -> "Scenario":
        names = [population.name for population in self.population]
        for index, population in enumerate(self.population):
            unplanned = sorted(population.measured.model_fields_set & UNPLANNED)
            if self.fidelity == "plan" and unplanned:
                place = f"population[{index}].measured.{unplanned[0]}"
                raise ValueError(f"{place}: fidelity plan has no place for it; use learn or time")
        if len(set(names)) != len(names):
            raise ValueError(f"population: the name `{next(n for n in names if names.count(n) > 1)}` is there twice")
        for index, fault in enumerate(self.fault):
            if fault.population is not None and fault.population not in names:
                near = difflib.get_close_matches(fault.population, names, n=1, cutoff=0.0)[0]
                raise ValueError(f"fault[{index}].population: there is no `{fault.population}`; did you mean `{near}`?")
            regions = sorted({population.region for population in self.population})
            if fault.region is not None and fault.region not in regions:
                raise ValueError(f"fault[{index}].region: no peers in `{fault.region}`; there are some in {regions}")
        return self


def list_scenarios() -> list[Path]:
    """The scenarios that come with manyhands."""
    return sorted(FOLDER.glob("*.toml"))


def load_scenario(name_or_path: str, overrides: Sequence[str] = (), *, short: bool = False) -> Scenario:
    """A scenario by name or file, with `key=value` overrides. Raises ConfigError with one line.

    short: put in the values of its table `[short]` first, which make a small run of it.
    """
    path = _find(name_or_path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    table.setdefault("name", path.stem)
    shortened = table.pop("short", {})
    if not isinstance(shortened, dict):
        raise ConfigError(f"{path.name}: short: a table of keys and their values")
    for key, value in shortened.items() if short else ():
        _put(table, key, value)
    for override in overrides:
        _override(table, override)
    return parse_scenario(table, where=path.name)


def parse_scenario(table: dict[str, Any], where: str) -> Scenario:
    """Check a parsed scenario file. Raises ConfigError as `load_scenario` does."""
    try:
        scenario = Scenario.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from error
    if scenario.scale != 1.0:
        scaled = [p.model_copy(update={"count": max(1, round(p.count * scenario.scale))}) for p in scenario.population]
        scenario = scenario.model_copy(update={"population": tuple(scaled), "scale": 1.0})
    try:
        exchange = scenario.spec.exchange
        if exchange.codec != AUTO:
            get_codec(exchange.codec, exchange.codec_options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{scenario.name}: ')}") from error
    return scenario


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return path
    known = [scenario.stem for scenario in list_scenarios()]
    if name_or_path in known:
        return FOLDER / f"{name_or_path}.toml"
    near = difflib.get_close_matches(name_or_path, known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"there is no scenario `{name_or_path}`; did you mean `{near}`? (`manyhands simulate list`)")


def _override(table: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into the table; in a list of tables the step is an index or a name."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write key=value, such as run.round.inner_steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a word without quotes
    _put(table, key, value)


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *steps, last = key.split(".")
    place: Any = table
    for step in steps:
        place = _entry(place, step, key) if isinstance(place, list) else place.setdefault(step, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"--set {key}: `{step}` is a value, not a table")
    if isinstance(place, list):
        raise ConfigError(f"--set {key}: name the entry and a key of it, such as {key}.count")
    place[last] = value


def _entry(entries: list[Any], step: str, key: str) -> Any:
    named = [entry for entry in entries if isinstance(entry, dict) and entry.get("name") == step]
    if named:
        return named[0]
    if step.isdecimal() and int(step) < len(entries):
        return entries[int(step)]
    raise ConfigError(f"--set {key}: there is no entry `{step}`; {len(entries)} are there, by number or by name")


def _describe(error: ValidationError) -> str:
    """One problem in one line, with its place: an unknown key if there is one, since it explains a missing one."""
    inside = [
        found for found in error.errors() if len(found["loc"]) > 1
    ]  # a list of which none is right is "too short"
    problems = inside or error.errors()
    problem = min(problems, key=lambda found: found["type"] != "extra_forbidden")
    location = problem["loc"]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys_at(location[:-1]), n=1, cutoff=0.0)
        return f"unknown key `{place}`; did you mean `{near[0]}`?{more}"
    if location == ("population",) and problem["type"] in ("missing", "too_short"):
        return f"population: there are no peers; add a [[population]] with name, count and device{more}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}{more}" if place else f"{message}{more}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Scenario
    for part in location:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            models = [
                a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            model = models[0]
    return list(model.model_fields)
