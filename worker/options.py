"""The options that several worker commands share, and what they stand for."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import ConfigError, InviteError

if TYPE_CHECKING:
    from worker.home import RunHome

InviteArgument = Annotated[str, typer.Argument(help="The invite, or a file that holds it.")]
RunArgument = Annotated[str | None, typer.Argument(help="One of several runs: its name, or how its id begins.")]
NameOption = Annotated[str | None, typer.Option(help="The name that the leaderboard shows.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core.")]
ThrottleOption = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the time to compute.")]
SeedOption = Annotated[
    bool,
    typer.Option(
        "--seed", help="Serve everybody's payloads: for machines with a public address and bandwidth to spare."
    ),
]
CheckpointOption = Annotated[
    int,
    typer.Option(min=0, help="Save the work in hand every so many inner steps; 0: at the end of a lease, of minutes."),
]
AlwaysOption = Annotated[
    bool, typer.Option("--always", help="Compute always: no settings, no sensors, no pauses. For servers and trials.")
]
SettingsOption = Annotated[
    Path | None, typer.Option(help="The settings file; see `worker settings`. Default: the platform's place.")
]
HomeOption = Annotated[Path | None, typer.Option(help="Where the worker keeps its key and data.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def open_run(invite: str, home: Path | None) -> "tuple[str, RunHome]":
    """The invite's text, and where its run lives on this machine. Raises InviteError."""
    from protocol.invite import decode_invite
    from worker.home import RunHome, default_home

    text = read_invite(invite)
    document, _ = decode_invite(text, now_unix_s=time.time())
    return text, RunHome((home or default_home()).absolute(), document.run_id)


def start_options(
    name: str,
    device: str,
    threads: int | None,
    throttle: float,
    seed: bool,
    checkpoint_steps: int,
    always: bool,
    settings: Path | None,
) -> list[str]:
    """The options of another `worker start` that does the same."""
    options = ["--name", name, "--device", device, "--throttle", str(throttle)]
    options += ["--threads", str(threads)] if threads is not None else []
    options += ["--settings", str(settings.absolute())] if settings is not None else []
    options += ["--seed"] if seed else []
    options += ["--checkpoint-steps", str(checkpoint_steps)] if checkpoint_steps else []
    return [*options, "--always"] if always else options


def read_invite(text: str) -> str:
    if text.startswith("mh1."):
        return text
    path = Path(text)
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InviteError(f"{text[:40]!r} is neither an invite (mh1.…) nor a file that holds one") from error


def default_name() -> str:
    import getpass
    import platform

    try:
        return f"{getpass.getuser()}@{platform.node()}"[:64]
    except OSError as error:
        raise ConfigError("this account has no name; give one with --name") from error
