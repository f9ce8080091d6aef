"""`manyhands worker …`: parse, build, run. torch is loaded by what runs, not by what parses."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from protocol.errors import ConfigError, InviteError

app = typer.Typer(help="Lend this machine to a run.", no_args_is_help=True)

HomeOption = Annotated[Path | None, typer.Option(help="Where the worker keeps its key and data.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def start(
    invite: Annotated[str, typer.Argument(help="The invite, or a file that holds it.")],
    name: Annotated[str | None, typer.Option(help="The name that the leaderboard shows.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core.")] = None,
    throttle: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the time to compute.")] = 1.0,
    home: HomeOption = None,
    loopback: Annotated[bool, typer.Option("--loopback", help="Serve other workers on this machine only.")] = False,
    seed: Annotated[
        bool,
        typer.Option(
            "--seed", help="Serve everybody's payloads: for machines with a public address and bandwidth to spare."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Join a run and compute until Ctrl-C. All that a volunteer types is this and the invite.

    Examples:

      manyhands worker start mh1.Q2x…

      manyhands worker start mh1.Q2x… --name kitchen-laptop --throttle 0.5
    """
    from protocol.invite import decode_invite
    from worker.home import RunHome, default_home

    text = _read_invite(invite)
    document, _ = decode_invite(text, now_unix_s=time.time())
    run_home = RunHome(home or default_home(), document.run_id)
    run_home.lock()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is loaded, below
    from worker.daemon import Worker, WorkerOptions
    from worker.device import set_threads
    from worker.live_view import LiveView

    set_threads(threads)
    options = WorkerOptions(
        name=name or _default_name(), device=device, throttle=throttle, public=not loopback, seed=seed
    )
    with LiveView(run_home, as_json=as_json) as view:
        worker = Worker(text, run_home, options, on_status=view.update)
        asyncio.run(_run_until_stopped(worker))
    view.summarize()


@app.command()
def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What the workers on this machine are doing."""
    from worker.home import default_home, is_running, list_runs
    from worker.live_view import render_statuses

    statuses = []
    for run in list_runs(home or default_home()):
        state = run.read_status()
        if state:
            statuses.append({**state, "run_id": run.run_id, "running": is_running(state.get("pid"))})
    if as_json:
        typer.echo(json.dumps(statuses))
    else:
        render_statuses(statuses)


@app.command()
def stop(home: HomeOption = None) -> None:
    """Stop the workers on this machine; they hand their leases back first."""
    from worker.home import default_home, is_running, list_runs

    pids = [
        int(str(s["pid"]))
        for run in list_runs(home or default_home())
        if is_running((s := run.read_status()).get("pid"))
    ]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 30.0
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    typer.echo(f"{len(pids)} stopped" if pids else "no worker runs here")


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
    validator = Validator(_read_invite(str(invite_path)), home, blobs, checkpoints)
    asyncio.run(_run_until_stopped(validator))


async def _run_until_stopped(runner: Any) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runner.stopping.set)
    await runner.run()


def _read_invite(text: str) -> str:
    if text.startswith("mh1."):
        return text
    path = Path(text)
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InviteError(f"{text[:40]!r} is neither an invite (mh1.…) nor a file that holds one") from error


def _default_name() -> str:
    import getpass
    import platform

    try:
        return f"{getpass.getuser()}@{platform.node()}"[:64]
    except OSError as error:
        raise ConfigError("this account has no name; give one with --name") from error
