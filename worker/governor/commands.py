"""`manyhands worker pause | resume | set | settings`."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

HomeOption = Annotated[Path | None, typer.Option(help="Where the worker keeps its key and data.")]
FileOption = Annotated[Path | None, typer.Option("--file", help="The settings file. Default: the platform's place.")]


def pause(
    for_: Annotated[str | None, typer.Option("--for", help="30m, 2h, 1h30m, 2d. Default: until `resume`.")] = None,
    home: HomeOption = None,
) -> None:
    """Stop computing for now. Workers stay in their run, lose nothing, and go on by themselves or with `resume`.

    Examples:

      manyhands worker pause

      manyhands worker pause --for 2h
    """
    from worker.governor import control
    from worker.home import default_home

    seconds = control.parse_duration(for_) if for_ is not None else None
    now_unix_s = time.time()
    control.pause(home or default_home(), now_unix_s, seconds)
    if seconds is None:
        typer.echo("paused until `manyhands worker resume`")
    else:
        typer.echo(f"paused until {datetime.fromtimestamp(now_unix_s + seconds):%a %d %b %H:%M}")


def resume(home: HomeOption = None) -> None:
    """End a pause. Workers compute again when nothing else holds them; `manyhands worker status` says what does.

    Example:

      manyhands worker resume
    """
    from worker.governor import control
    from worker.home import default_home

    there = control.resume(home or default_home())
    typer.echo("resumed" if there else "it was not paused; `manyhands worker status` says what workers are doing")


def set_(
    key: Annotated[str, typer.Argument(help="A key of `manyhands worker settings`.")],
    value: Annotated[str, typer.Argument(help="on, off, a number, or text.")],
    file: FileOption = None,
) -> None:
    """Change one setting. A running worker takes it up at once.

    Examples:

      manyhands worker set pause_when_user_active on

      manyhands worker set compute_share 0.5

      manyhands worker set schedule "mon-fri 22:00-07:00, sat-sun"
    """
    from worker.governor.preferences import default_path
    from worker.governor.settings_file import set_preference, show_value

    path = file or default_path()
    preferences = set_preference(path, key, value)
    typer.echo(f"{key} = {show_value(getattr(preferences, key))}  ({path})")


def settings(
    file: FileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Show every setting: its value, its default, and what it does.

    Examples:

      manyhands worker settings

      manyhands worker settings --json
    """
    from worker.governor.preferences import Preferences, allowed, default_path, load_preferences
    from worker.governor.settings_file import show_value

    path = file or default_path()
    preferences = load_preferences(path)
    entries = [
        {
            "key": key,
            "value": getattr(preferences, key),
            "default": field.get_default(),
            "description": field.description or "",
            "allowed": allowed(field),
        }
        for key, field in Preferences.model_fields.items()
    ]
    if as_json:
        typer.echo(json.dumps({"file": str(path), "settings": entries}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=f"{path}{'' if path.exists() else ' (not there: all defaults)'}", caption_justify="left")
    for heading in ("key", "value", "default", "what it does"):
        table.add_column(heading, no_wrap=heading == "key", overflow="fold")
    for entry in entries:
        changed = entry["value"] != entry["default"]
        value, default = show_value(entry["value"]), show_value(entry["default"])
        table.add_row(
            str(entry["key"]), Text(value, style="bold" if changed else ""), Text(default), entry["description"]
        )
    Console().print(table)
