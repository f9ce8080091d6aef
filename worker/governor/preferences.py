"""The volunteer's settings: one commented TOML file, read again whenever it changes.

Numbers of 0 turn a limit off where that is allowed. Nothing here looks at the machine.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import platformdirs
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from protocol.errors import ConfigError
from protocol.run_spec import describe
from worker.governor.schedule import EXAMPLE, Window, parse_window

IoPriority = Literal["normal", "low", "idle"]
CompileMode = Literal["off", "auto", "on"]  # see worker.compiling
Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Celsius = Annotated[float, Field(ge=0.0, le=150.0)]
Size = Annotated[float, Field(ge=0.0, le=1e6)]


class Preferences(BaseModel):
    """Everything in worker.toml. GB are 10^9 bytes, Mbit 10^6 bits, percents of CPU are of all cores together."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    pause_on_battery: bool = Field(True, description="pause while the computer is not plugged in")
    battery_min_percent: Percent = Field(20.0, description="pause under this level, also while it charges; 0: off")
    pause_when_user_active: bool = Field(False, description="pause while somebody uses keyboard, mouse or screen")
    user_idle_minutes: Annotated[float, Field(ge=0.1, le=1440.0)] = Field(
        5.0, description="how long nobody must have touched them before it goes on"
    )
    other_programs_max_percent: Percent = Field(
        0.0, description="pause while other programs take more of the CPU than this; 0: off"
    )
    cpu_max_celsius: Celsius = Field(90.0, description="pause over this temperature of the CPU; 0: off")
    gpu_max_celsius: Celsius = Field(85.0, description="pause over this temperature of the GPU; 0: off")
    schedule: tuple[str, ...] = Field(
        (), strict=False, description=f"when it may compute, in local time, such as {EXAMPLE}; empty: always"
    )
    pause_on_metered: bool = Field(True, description="pause on a connection that is paid by volume")
    monthly_traffic_gb: Size = Field(0.0, description="pause when a month's traffic, both ways, is used up; 0: off")
    memory_min_free_gb: Size = Field(0.5, description="pause when less memory is free; 0: off")
    disk_min_free_gb: Size = Field(2.0, description="pause when less of the disk is free; 0: off")
    store_max_gb: Size = Field(20.0, description="the most that the worker may keep on the disk; 0: off")
    compute_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="share of the time that CPU or GPU compute; they rest between inner steps"
    )
    cpu_threads: Annotated[int, Field(ge=0, le=4096)] = Field(0, description="CPU threads to use; 0: one a core")
    compile: CompileMode = Field(
        "off", description="compile the model at the start: off, on, or auto: where a lease is long and it pays"
    )
    niceness: Annotated[int, Field(ge=0, le=19)] = Field(10, description="how far other programs go first")
    io_priority: IoPriority = Field("low", description="how far other programs' disk access goes first")
    upload_mbps: Size = Field(0.0, description="the fastest upload in Mbit/s; 0: no limit")
    download_mbps: Size = Field(0.0, description="the fastest download in Mbit/s; 0: no limit")

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            parse_window(text)
        return texts

    @property
    def windows(self) -> tuple[Window, ...]:
        """The schedule, parsed."""
        return tuple(parse_window(text) for text in self.schedule)

    @property
    def upload_bps(self) -> float | None:
        """Bits a second; None: no limit."""
        return self.upload_mbps * 1e6 or None

    @property
    def download_bps(self) -> float | None:
        """Bits a second; None: no limit."""
        return self.download_mbps * 1e6 or None


def default_path() -> Path:
    """The platform's place for a user's settings."""
    return platformdirs.user_config_path("manyhands") / "worker.toml"


def load_preferences(path: Path) -> Preferences:
    """Read worker.toml; a missing file is all defaults. Raises ConfigError that names file, key and what is allowed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Preferences()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_preferences(text, where=str(path))


def parse_preferences(text: str, where: str = "worker.toml") -> Preferences:
    """Check the text of a worker.toml. Raises ConfigError as `load_preferences` does."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: {error}") from error
    return check_preferences(table, where)


def check_preferences(table: dict[str, Any], where: str) -> Preferences:
    """Check a parsed worker.toml. Raises ConfigError as `load_preferences` does."""
    try:
        return Preferences.model_validate(table)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        field = Preferences.model_fields.get(key)
        if field is None:
            raise ConfigError(f"{where}: {describe(error, Preferences)}") from error
        told = error.errors()[0]
        why = f"{told['ctx']['error']}; " if told["type"] == "value_error" else ""
        raise ConfigError(f"{where}: {key} = {_show_input(told['input'])}: {why}it takes {allowed(field)}") from error


def allowed(field: FieldInfo) -> str:
    """What a key takes, in words."""
    kind = field.annotation
    if kind is bool:
        return "true or false"
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if kind is not int and kind is not float:
        return f"windows such as {EXAMPLE}"
    low = next((f"above {m.gt:g}" for m in field.metadata if isinstance(m, Gt)), None) or next(
        f"from {m.ge:g}" for m in field.metadata if isinstance(m, Ge)
    )
    high = next(m.le for m in field.metadata if isinstance(m, Le))
    return f"a {'whole ' if kind is int else ''}number {low} to {high:g}"


def _show_input(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
