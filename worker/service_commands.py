"""`manyhands worker install-service` and `uninstall`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import ConfigError
from worker.options import (
    AlwaysOption,
    CheckpointOption,
    DeviceOption,
    HomeOption,
    InviteArgument,
    NameOption,
    SeedOption,
    SettingsOption,
    ThreadsOption,
    ThrottleOption,
    default_name,
    open_run,
    start_options,
)


def install_service(
    invite: InviteArgument,
    name: NameOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    throttle: ThrottleOption = 1.0,
    seed: SeedOption = False,
    checkpoint_steps: CheckpointOption = 0,
    always: AlwaysOption = False,
    settings: SettingsOption = None,
    home: HomeOption = None,
) -> None:
    """Have this machine start the worker by itself: a systemd user unit, on macOS a launchd agent. Needs no root.

    The unit is sandboxed, and computes with what other programs leave over. The invite is kept in a file that only you
    can read.

    Examples:

      manyhands worker install-service mh1.Q2x…

      manyhands worker install-service mh1.Q2x… --name attic-server --throttle 0.5

      loginctl enable-linger        on Linux: compute also while nobody is logged in
    """
    from worker.background import running_pid, write_invite
    from worker.service import install

    text, run = open_run(invite, home)
    if running_pid(run) is not None:
        raise ConfigError("a worker of this run is running already; `manyhands worker stop`, then install the service")
    write_invite(run, text)
    name = name or default_name()
    service = install(run, start_options(name, device, threads, throttle, seed, checkpoint_steps, always, settings))
    typer.echo(f"{service.name} is enabled and started ({service.path}); `manyhands worker status` shows what it does")
    if service.path.suffix == ".service":
        typer.echo("`loginctl enable-linger` lets it compute while you are not logged in")


def uninstall(
    run: Annotated[str | None, typer.Argument(help="How the id of one of several runs begins.")] = None,
    purge: Annotated[bool, typer.Option("--purge", help="Remove data, logs, settings and the key, too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = None,
) -> None:
    """Stop and remove what `install-service` wrote; with --purge also everything that workers wrote on this machine.

    Credit belongs to the key: once that is gone, nobody can add to it.

    Examples:

      manyhands worker uninstall

      manyhands worker uninstall 1f2e3d4c

      manyhands worker uninstall --purge --yes
    """
    from worker.home import default_home
    from worker.service import find_services
    from worker.service import uninstall as remove

    if purge and run is not None:
        raise ConfigError("--purge removes what all runs share; leave the run out")
    services = find_services(run)
    if run is not None and not services:
        raise ConfigError(f"no service of a run {run!r} is installed here; `manyhands worker uninstall` removes all")
    homes = [home] if home is not None else sorted({default_home(), *(service.home for service in services)})
    if purge and not yes:
        _confirm_purge(homes)
    for service in services:
        remove(service)
        typer.echo(f"removed {service.path}")
    if not services:
        typer.echo("no service is installed here")
    if purge:
        _purge(homes)


def _confirm_purge(homes: Sequence[Path]) -> None:
    from worker.service import list_data

    found = {path for home in homes for path in list_data(home)}
    if found:
        typer.echo("This removes for good: " + ", ".join(map(str, sorted(found))))
        typer.confirm("Go on?", abort=True)


def _purge(homes: Sequence[Path]) -> None:
    from worker.background import stop_workers
    from worker.home import list_runs
    from worker.service import purge

    for home in homes:
        stop_workers(list_runs(home))
        for path in purge(home):
            typer.echo(f"removed {path}")
