"""`manyhands worker …`: parse, build, run. torch is loaded by what runs, not by what parses."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protocol.errors import ConfigError, ManyhandsError
from worker import service_commands as services
from worker.governor import commands as governor
from worker.options import (
    AlwaysOption,
    CheckpointOption,
    DeviceOption,
    HomeOption,
    InviteArgument,
    JsonOption,
    NameOption,
    RunArgument,
    SeedOption,
    SettingsOption,
    ThreadsOption,
    ThrottleOption,
    default_name,
    open_run,
    read_invite,
    start_options,
)

if TYPE_CHECKING:
    from worker.home import RunHome

app = typer.Typer(help="Lend this machine to a run.", no_args_is_help=True)


@app.command()
def start(
    invite: InviteArgument,
    name: NameOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    throttle: ThrottleOption = 1.0,
    home: HomeOption = None,
    loopback: Annotated[bool, typer.Option("--loopback", help="Serve other workers on this machine only.")] = False,
    seed: SeedOption = False,
    checkpoint_steps: CheckpointOption = 0,
    always: AlwaysOption = False,
    settings: SettingsOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Compute in the background; return once joined.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log to the file only; see `worker logs`.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Join a run and compute until Ctrl-C. All that a volunteer types is this and the invite.

    It computes with what other programs leave over, and pauses when the settings say so: see `worker settings`.

    Examples:

      manyhands worker start mh1.Q2x…

      manyhands worker start mh1.Q2x… --name kitchen-laptop --throttle 0.5

      manyhands worker start mh1.Q2x… --detach        and then: manyhands worker status
    """
    text, run_home = open_run(invite, home)
    name = name or default_name()
    if detach:
        options = start_options(name, device, threads, throttle, seed, checkpoint_steps, always, settings)
        options += ["--loopback"] if loopback else []
        _start_in_background(run_home, text, [*options, *_home_option(home)], home)
        return
    run_home.lock()
    from worker.logs import log_to_file

    log_to_file(run_home.folder, quiet=quiet)
    from worker.governor.preferences import default_path, load_preferences

    preferences_path = None if always else settings or default_path()
    at_first = threads
    if preferences_path is not None:
        at_first = threads or load_preferences(preferences_path).cpu_threads or None
    if at_first is not None:
        os.environ["OMP_NUM_THREADS"] = str(at_first)  # read when torch is loaded, below
    from worker.daemon import Worker, WorkerOptions
    from worker.device import set_threads
    from worker.live_view import LiveView

    set_threads(at_first)
    worker_options = WorkerOptions(
        name=name,
        device=device,
        throttle=throttle,
        threads=threads,
        preferences_path=preferences_path,
        public=not loopback,
        seed=seed,
        checkpoint_steps=checkpoint_steps,
    )
    with _failures_logged(), LiveView(run_home, as_json=as_json) as view:
        worker = Worker(text, run_home, worker_options, on_status=view.update)
        asyncio.run(_run_until_stopped(worker))
    view.summarize()


@app.command()
def status(run: RunArgument = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What the workers on this machine are doing.

    Examples:

      manyhands worker status

      manyhands worker status my-run --json
    """
    from worker.background import find_runs, running_pid
    from worker.home import default_home
    from worker.live_view import render_statuses

    statuses = []
    for found in find_runs(home or default_home(), run):
        state = found.read_status()
        if state:
            statuses.append({**state, "run_id": found.run_id, "running": running_pid(found) is not None})
    if as_json:
        typer.echo(json.dumps(statuses))
    else:
        render_statuses(statuses)


@app.command()
def stop(run: RunArgument = None, home: HomeOption = None) -> None:
    """Stop the workers on this machine, or that of one run; they hand their leases back first.

    Examples:

      manyhands worker stop

      manyhands worker stop my-run
    """
    from worker.background import find_runs, stop_workers
    from worker.home import default_home

    stopped = stop_workers(find_runs(home or default_home(), run))
    typer.echo(f"{len(stopped)} stopped" if stopped else "no worker runs here")


@app.command()
def logs(
    run: RunArgument = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on showing what is written, until Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines to begin with.")] = 50,
    home: HomeOption = None,
) -> None:
    """Show what a worker wrote: when it joined, what it was refused, why it stopped.

    Examples:

      manyhands worker logs

      manyhands worker logs my-run -f

      manyhands worker logs --lines 500 | grep warning
    """
    from worker.background import find_one_run
    from worker.home import default_home
    from worker.logs import follow as follow_log
    from worker.logs import is_terminal, render, tail

    folder = find_one_run(home or default_home(), run).folder
    colour = is_terminal()
    try:
        for line in follow_log(folder, lines) if follow else tail(folder, lines):
            typer.echo(render(line, colour=colour))
    except KeyboardInterrupt:
        typer.echo()  # that is how following ends


@app.command()
def doctor(
    invite: Annotated[
        str | None, typer.Argument(help="An invite, or a file that holds one. Default: this machine alone.")
    ] = None,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Join for some seconds, without taking work, to measure the run's model and the download. "
            "A machine that is new to the run uses the invite once more.",
        ),
    ] = False,
    page: Annotated[
        str | None, typer.Option(help="The run's page, http://…, where it is not at the usual port.")
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine and, with an invite, at the way to the coordinator; say what to do where something is amiss.

    Nothing is written here. Ends with 1 when a problem keeps this machine from computing.

    Examples:

      manyhands worker doctor

      manyhands worker doctor mh1.Q2x…

      manyhands worker doctor mh1.Q2x… --join
    """
    text = read_invite(invite) if invite is not None else None
    if join and text is None:
        raise ConfigError("--join needs an invite: `manyhands worker doctor INVITE --join`")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is loaded, below
    from rich.console import Console

    from worker.device import set_threads
    from worker.doctor.checkup import Checkup
    from worker.doctor.findings import can_compute, render_json, show
    from worker.home import default_home

    set_threads(threads)
    with Console(stderr=True).status("looking") as progress:
        checkup = Checkup(
            home=home or default_home(),
            name=default_name(),
            device_name=device,
            page=page,
            join=join,
            on_progress=progress.update,
        )
        chosen = checkup.look_at_machine()
        if text is not None:
            checkup.look_at_run(text, chosen)
    if as_json:
        typer.echo(render_json(checkup.findings))
    else:
        show(checkup.findings, Console())
    if not can_compute(checkup.findings):
        raise typer.Exit(1)


app.command()(governor.pause)
app.command()(governor.resume)
app.command("set")(governor.set_)
app.command()(governor.settings)
app.command("install-service")(services.install_service)
app.command()(services.uninstall)


@app.command("initialize-model", hidden=True)
def initialize_model(
    spec_path: Path, vocabulary_size: Annotated[int, typer.Option()], blobs: Annotated[Path, typer.Option()]
) -> None:
    """Make a run's initial state; the coordinator calls this."""
    from protocol.run_spec import load_run_spec
    from worker.initialize import initialize_model as initialize

    typer.echo(json.dumps(initialize(load_run_spec(spec_path), vocabulary_size, blobs)))


@app.command(hidden=True)
def validate(
    invite_path: Path,
    home: Annotated[Path, typer.Option()],
    blobs: Annotated[Path, typer.Option()],
    checkpoints: Annotated[Path, typer.Option()],
) -> None:
    """Evaluate and checkpoint a run; the coordinator starts this beside itself."""
    from worker.device import set_threads
    from worker.validator import Validator

    set_threads(1)
    validator = Validator(read_invite(str(invite_path)), home, blobs, checkpoints)
    asyncio.run(_run_until_stopped(validator))


def _home_option(home: Path | None) -> list[str]:
    return ["--home", str(home.absolute())] if home is not None else []


def _start_in_background(run: "RunHome", invite_text: str, options: Sequence[str], home: Path | None) -> None:
    import shlex

    from worker.background import start_in_background

    pid = start_in_background(run, invite_text, options)
    more = shlex.join(["", *_home_option(home)]).removeprefix("''")
    see = ", ".join(f"`manyhands worker {command}{more}`" for command in ("status", "logs -f", "stop"))
    typer.echo(
        f"joined {run.read_status()['run']} (run {run.run_id[:8]}) as process {pid}, in the background; see {see}"
    )


@contextmanager
def _failures_logged() -> Iterator[None]:
    """Have whatever ends the worker in its log, too."""
    import structlog

    log = structlog.get_logger()
    try:
        yield
    except ManyhandsError as error:
        log.error("the worker ended", error=str(error))
        raise
    except Exception:
        log.exception("the worker ended")
        raise
    log.info("the worker stopped")


async def _run_until_stopped(runner: Any) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runner.stopping.set)
    await runner.run()
