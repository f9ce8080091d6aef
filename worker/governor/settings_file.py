"""Writing worker.toml: the commented template, and one key changed with all comments kept."""

import difflib
import json
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from protocol.errors import ConfigError
from worker.governor.files import replace_file
from worker.governor.preferences import Preferences, allowed, check_preferences, parse_preferences

_HEADER = """\
# When, and how much of, this computer a manyhands worker may use. A running worker reads changes at once.
# `manyhands worker set KEY VALUE` changes a line here; what is commented out is the default.
"""
_HEADINGS = {
    "pause_on_battery": "When to pause",
    "pause_on_metered": "Network, memory and disk",
    "compute_share": "How much to use",
}
_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def default_text() -> str:
    """A worker.toml that parses to the defaults, with every key and what it does."""
    lines = [_HEADER]
    for key, field in Preferences.model_fields.items():
        if key in _HEADINGS:
            lines.append(f"\n# ---- {_HEADINGS[key]}\n")
        lines += [f"# {field.description}", _default_line(key), ""]
    return "\n".join(lines)


def set_preference(path: Path, key: str, value_text: str) -> Preferences:
    """Change one key of worker.toml (written when it is missing), and return what now holds.

    value_text: as typed: on, off, 0.5, "mon-fri 22:00-07:00, sat-sun". Comments and all other lines stay. Raises
    ConfigError that names the file, the key and what is allowed; the file is then as it was.
    """
    field = Preferences.model_fields.get(key)
    if field is None:
        near = difflib.get_close_matches(key, list(Preferences.model_fields), n=1, cutoff=0.0)[0]
        raise ConfigError(f"{path}: unknown key `{repr(key)[1:-1]}`; did you mean `{near}`? It takes {_allowed(near)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = default_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    value = _parse_value(key, value_text)
    check_preferences({key: value}, str(path))
    changed = _replace(text, key, value, str(path))
    preferences = parse_preferences(changed, where=str(path))
    replace_file(path, changed)
    return preferences


def show_value(value: object) -> str:
    """A setting's value as it stands in the file."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _replace(text: str, key: str, value: object, where: str) -> str:
    try:
        document = tomlkit.parse(text)
        if key not in document:  # its commented default becomes the line that counts
            marked = text.replace(f"\n{_default_line(key)}\n", f"\n{_default_line(key)[2:]}\n", 1)
            document = tomlkit.parse(marked)
        document[key] = value
    except TOMLKitError as error:
        raise ConfigError(f"{where}: {error}") from error
    return tomlkit.dumps(document)


def _parse_value(key: str, text: str) -> object:
    """What was typed, as the type of the key; as text where it is none, for the check to name."""
    kind, text = Preferences.model_fields[key].annotation, text.strip()
    if kind is bool:
        return _WORDS.get(text.lower(), text)
    if kind is int or kind is float:
        text = "0" if text.lower() == "off" else text
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
        return text
    if key == "schedule":
        parts = text.strip("[]").split(",") if text.lower() != "always" else []
        return [part.strip(" \"'") for part in parts if part.strip(" \"'")]
    return text.strip("\"'")


def _default_line(key: str) -> str:
    return f"# {key} = {show_value(Preferences.model_fields[key].get_default())}"


def _allowed(key: str) -> str:
    return allowed(Preferences.model_fields[key])
