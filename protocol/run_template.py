"""The commented run.toml that `manyhands init` writes: every section, its defaults, and what each key means."""

import json
import textwrap

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protocol.run_spec import AUTO, RunSpec, Section

_HEADER = """\
# A manyhands run. `manyhands coordinator start run.toml` starts it and prints the invite for volunteers.
# Every key is optional; what is commented out is the default. `manyhands demo` shows a whole run in minutes.
"""
_COLUMN = 44
# What most people change first stands without a comment sign.
_ACTIVE = {"name", "data.source", "train.tokens", "coordinator.listen"}
# What new runs should have (docs/convergence.md). They are not the defaults, with which other runs were made.
_RECOMMENDED: dict[str, object] = {
    "train.optimizer": AUTO,
    "train.learning_rate": AUTO,
    "exchange.codec": AUTO,
    "round.inner_steps": AUTO,
    "outer.optimizer": "average",
    "outer.learning_rate": 1.0,
    "outer.momentum": 0.0,
}


def render_template() -> str:
    """A run.toml with every key in it; but for what is recommended it parses to the default RunSpec."""
    lines = [_HEADER]
    tables = []
    for name, field in RunSpec.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            tables += ["", *_render_section(name, section)]
        else:
            lines.append(_render_key(name, name, field.get_default(), field))
    return "\n".join([*lines, *tables]) + "\n"


def render_spec(spec: RunSpec) -> str:
    """A run.toml that parses to `spec`; only what differs from the default is in it."""
    lines, tables = [], []
    for name, value in spec.model_dump(mode="json", exclude_defaults=True, exclude_none=True).items():
        if isinstance(value, dict):
            tables += ["", f"[{name}]", *(f"{key} = {_to_toml(item)}" for key, item in value.items())]
        else:
            lines.append(f"{name} = {_to_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _render_section(name: str, section: type[BaseModel]) -> list[str]:
    heading = textwrap.wrap((section.__doc__ or "").strip(), 110)
    lines = [*(f"# {line}" for line in heading), f"[{name}]"]
    for key, field in section.model_fields.items():
        lines.append(_render_key(f"{name}.{key}", key, field.get_default(call_default_factory=True), field))
    return lines


def _render_key(path: str, key: str, value: object, field: FieldInfo) -> str:
    value = _RECOMMENDED.get(path, value)
    text = f"{key} = {_to_toml(value)}" if value is not None else f'{key} = ""'
    text = text if path in _ACTIVE | _RECOMMENDED.keys() else f"# {text}"
    return f"{text.ljust(_COLUMN)}  # {field.description}" if field.description else text


def _to_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_to_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_to_toml(item) for item in value) + "]"
    return json.dumps(value)
