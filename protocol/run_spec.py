"""RunSpec: everything in run.toml, checked. An unknown key is an error that names the nearest known one."""

import difflib
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from protocol.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
AUTO: Literal["auto"] = "auto"
BUTTERFLY: Literal["butterfly"] = "butterfly"


def _check_steps(value: object) -> object:
    if value != AUTO and not (type(value) is int and 1 <= value <= 100_000):
        raise ValueError('a whole number from 1 to 100000, or "auto"')
    return value


def _check_rate(value: object) -> object:
    if value == AUTO:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise ValueError('a number above 0, or "auto"')
    return float(value)


RateOrAuto = Annotated[float | Literal["auto"], PlainValidator(_check_rate)]
StepsOrAuto = Annotated[int | Literal["auto"], PlainValidator(_check_steps)]


class Section(BaseModel):
    """A table of run.toml: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSpec(Section):
    """Any causal language model that transformers.AutoConfig describes."""

    architecture: str = Field("llama", description="a transformers model type: llama, gpt2, qwen3, mistral …")
    config: dict[str, Any] = Field(
        default_factory=lambda: {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "tie_word_embeddings": False,
        },
        description="fields of that type's config; vocab_size comes from the tokenizer",
    )
    initial_weights: str | None = Field(None, description="a Hugging Face model folder to start from")


class DataSpec(Section):
    """Where the text comes from and how it becomes tokens."""

    source: str = Field("stdlib", description="file, folder, glob or fsspec URL; `stdlib` = Python's own sources")
    field: str = Field("text", description="the field that holds the text in jsonl and parquet files")
    tokenizer: str = Field("bytes", description="`bytes`, or a folder with a tokenizer.json")
    sequence_length: Annotated[int, Field(ge=8, le=1 << 20)] = 128
    held_out_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    held_out_max_tokens: Annotated[int, Field(ge=1024)] = 65_536
    shard_steps: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="inner steps that one shard feeds")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="use only so much of the source")


class TrainSpec(Section):
    """The inner steps."""

    tokens: Annotated[int, Field(ge=1)] = Field(4_000_000, description="the run ends when so many are credited")
    batch_sequences: Annotated[int, Field(ge=1, le=1 << 16)] = Field(8, description="sequences in one inner step")
    optimizer: Literal["adamw", "muon", "auto"] = Field(
        "muon", description='"auto": muon, or adamw where muon\'s update would take most of a step'
    )
    learning_rate: RateOrAuto = Field(
        8e-3, description='the highest; "auto": by the optimizer, the run\'s length and the number of workers'
    )
    final_learning_rate_fraction: Fraction = 0.1
    warmup_fraction: Fraction = Field(0.02, description="share of the run's tokens over which the rate rises")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    gradient_clip: Positive = 1.0

    @property
    def first_optimizer(self) -> Literal["adamw", "muon"]:
        """What a run begins with before anybody has measured anything."""
        return "muon" if self.optimizer == AUTO else self.optimizer


class RoundSpec(Section):
    """How a round opens and closes."""

    inner_steps: StepsOrAuto = Field(20, description='H of a peer of median speed, or "auto": as links allow')
    min_peers: Annotated[int, Field(ge=1)] = Field(1, description="ready peers needed to open a round")
    quorum_fraction: Fraction = Field(0.0, description="share of the leased weight below which a round is void")
    deadline_factor: Annotated[float, Field(ge=1.0, le=100.0)] = Field(
        2.0, description="deadline = expected compute time times this, plus exchange_s"
    )
    exchange_s: Positive = Field(
        10.0,
        description="time that encoding and sending may take; twice as much after a round that nothing reached in time",
    )
    merge_timeout_s: Positive = Field(20.0, description="how long the next round waits for slow mergers")
    heartbeat_timeout_s: Positive = Field(15.0, description="silence after which a peer counts as gone")


class ExchangeSpec(Section):
    """What is sent, and how."""

    method: Literal["allgather", "butterfly"] = Field(
        "allgather", description="butterfly: all-reduce among trusted, well-connected workers that can all be dialled"
    )
    group_size: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="merge in groups of so many first, then the groups; 0: no groups"
    )
    codec: str = Field("int2", description="float32, float16, int8, int4, int2, sign, sparse, or auto: as links allow")
    codec_options: dict[str, int | float] = Field(
        default_factory=dict, description="k and chunk for sparse, block for the others"
    )
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="auto: the part of a round that exchange may take"
    )
    max_contributors: Annotated[int, Field(ge=1, le=1024)] = Field(
        32, description="in one round; with more workers they take turns, and keep their work until theirs comes"
    )
    overlap: bool = Field(False, description="go on training while a round is exchanged and merged")
    error_feedback_decay: Fraction = Field(1.0, description="beta in e <- beta e + delta")

    @model_validator(mode="before")
    @classmethod
    def _complete_butterfly(cls, table: Any) -> Any:
        """`butterfly` alone is complete: the default codec is not one of its own."""
        return {"codec": "float16"} | table if isinstance(table, dict) and table.get("method") == BUTTERFLY else table

    @model_validator(mode="after")
    def _check_butterfly(self) -> "ExchangeSpec":
        if self.method == BUTTERFLY and self.codec not in ("float16", "float32"):
            raise ValueError("method = 'butterfly' averages with codec = 'float16' or 'float32'")
        if self.method == BUTTERFLY and (self.group_size or self.max_contributors) > 64:
            raise ValueError("method = 'butterfly' takes at most 64 workers in a group; set group_size")
        return self


class OuterSpec(Section):
    """The outer step."""

    optimizer: Literal["average", "nesterov", "sgd"] = Field("nesterov", description="average takes no parameters")
    learning_rate: Positive = 0.7
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.5, description="0.9 for rounds of hundreds of steps")

    @model_validator(mode="before")
    @classmethod
    def _complete_average(cls, table: Any) -> Any:
        """`average` alone is complete: what belongs to the other optimizers' defaults is not meant."""
        if isinstance(table, dict) and table.get("optimizer") == "average":
            return {"learning_rate": 1.0, "momentum": 0.0} | table
        return table


class AggregationSpec(Section):
    """Which contributions count, and how much."""

    rule: Literal["mean", "norm_clip"] = "norm_clip"
    clip_factor: Positive = Field(2.0, description="norm_clip: norms above this many medians are scaled down")
    max_weight_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="cap on one peer's share")


class CheckpointSpec(Section):
    every_rounds: Annotated[int, Field(ge=1)] = 10
    keep: Annotated[int, Field(ge=1)] = Field(3, description="older checkpoints are removed")


class CoordinatorSpec(Section):
    listen: str = Field("127.0.0.1:7640", description="host:port for workers; 0.0.0.0 to accept from outside")
    advertise: str | None = Field(None, description="host:port in the invite when it differs from `listen`")
    http: str = Field("127.0.0.1:7641", description="host:port of the page")
    database: str | None = Field(None, description="SQLAlchemy URL; SQLite in the run folder when absent")


class InviteSpec(Section):
    """Who may join. Read again at each start of the coordinator."""

    expires_hours: Positive = 168.0
    uses: Annotated[int, Field(ge=1)] = 1000
    approval: bool = Field(
        False,
        description="true: a worker that joins waits until `manyhands coordinator approve`",
        exclude_if=lambda approval: not approval,  # earlier versions do not know the key in a genesis
    )


class RunSpec(Section):
    """A whole run.toml."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = "manyhands-run"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    model: ModelSpec = Field(default_factory=ModelSpec)
    data: DataSpec = Field(default_factory=DataSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    round: RoundSpec = Field(default_factory=RoundSpec)
    exchange: ExchangeSpec = Field(default_factory=ExchangeSpec)
    outer: OuterSpec = Field(default_factory=OuterSpec)
    aggregation: AggregationSpec = Field(default_factory=AggregationSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    coordinator: CoordinatorSpec = Field(default_factory=CoordinatorSpec)
    invite: InviteSpec = Field(default_factory=InviteSpec)

    @model_validator(mode="after")
    def _check_together(self) -> "RunSpec":
        if self.outer.optimizer == "average" and (self.outer.momentum or self.outer.learning_rate != 1.0):
            raise ValueError(
                "outer.optimizer = 'average' takes neither momentum nor learning_rate; use 'nesterov' or 'sgd'"
            )
        if self.train.optimizer == AUTO and self.train.learning_rate != AUTO:
            raise ValueError("train.optimizer = 'auto' needs train.learning_rate = 'auto': each optimizer has its own")
        if self.exchange.codec == AUTO and self.exchange.codec_options:
            raise ValueError("exchange.codec = 'auto' chooses its own codec_options; leave them out")
        return self

    @property
    def step_tokens(self) -> int:
        """Tokens of one inner step."""
        return self.train.batch_sequences * self.data.sequence_length

    @property
    def shard_tokens(self) -> int:
        """Tokens of one data shard (predicted tokens; the stored shard has one more a sequence)."""
        return self.step_tokens * self.data.shard_steps


def load_run_spec(path: Path) -> RunSpec:
    """Read and check a run.toml. Raises ConfigError with one line that names the place and what to do."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; `manyhands init {path}` writes a commented one") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_run_spec(table, where=str(path))


def parse_run_spec(table: dict[str, Any], where: str = "run.toml") -> RunSpec:
    """Check a parsed run.toml. Raises ConfigError as `load_run_spec` does."""
    try:
        return RunSpec.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error, RunSpec)}") from error


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a ValidationError in one line; for an unknown key also the nearest known one."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg'].removeprefix('Value error, ')}{more}"
    known = _keys_at(root, problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.0)
    hint = f"did you mean `{near[0]}`?" if near else "remove it"
    return f"unknown key `{place}`; {hint}{more}"


def _keys_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    model = root
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
