"""`manyhands coordinator …`: parse, build, run."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from protocol.documents import Verb
from protocol.errors import ConfigError, ManyhandsError

app = typer.Typer(help="Start a run and look after it.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(help="A run.toml, or a run folder to go on with.")]
FolderArgument = Annotated[Path | None, typer.Argument(help="The run folder; found by itself when only one runs.")]
PeerArgument = Annotated[
    str, typer.Argument(help="Its name, or the beginning of its peer id; `coordinator status` lists both.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
RUNS = Path("manyhands-runs")


@app.command()
def start(
    run: RunArgument = Path("run.toml"),
    folder: Annotated[Path | None, typer.Option(help="Where the run is kept. Default: manyhands-runs/NAME.")] = None,
    validator: Annotated[bool, typer.Option(help="Start the validator, which evaluates and checkpoints.")] = True,
    exit_when_finished: Annotated[bool, typer.Option(help="End when all tokens are trained.")] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Write the rounds there for TensorBoard, too; needs the extra `tensorboard`."),
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option(help="Write the rounds to this Weights & Biases project, too; needs the extra `wandb`."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a coordinator, or go on with an earlier run. Prints the invite that volunteers need.

    Examples:

      manyhands init && manyhands coordinator start run.toml

      manyhands coordinator start manyhands-runs/my-run      # goes on where it stopped
    """
    from coordinator.records.writers import add_writers
    from coordinator.run_folder import RunFolder, find_genesis, prepare
    from coordinator.server import Server, check_addresses

    place = _choose_folder(run, folder)
    home = RunFolder(place)
    running = home.read_running()
    if running is not None:
        raise ManyhandsError(f"a coordinator runs on {place} already (process {running['pid']})")
    spec = home.create(run / "run.toml" if run.is_dir() else run)
    database = home.open_database(spec)
    genesis = find_genesis(database)
    check_addresses(spec)
    if genesis is None:
        with _shard_progress(quiet=as_json) as progress:
            genesis = prepare(home, spec, database, lambda size: _start_model_process(home, size), progress)
    server = Server(
        home,
        database,
        genesis,
        validator_command=(lambda invite: _validator_command(home, invite)) if validator else None,
        exit_when_finished=exit_when_finished,
    )
    if tensorboard is not None or wandb is not None:
        server.keep_writing = add_writers(
            database.readers,
            name=server.run.spec.name,
            run_id=server.run.run_id,
            tensorboard=tensorboard,
            wandb=wandb,
        )
    asyncio.run(_serve(server, lambda invite: _announce(server, invite, as_json)))


@app.command()
def status(
    folder: FolderArgument = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C, every 2 seconds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Whether a running coordinator's run is healthy, and if not, why; phase, round, loss and peers."""
    from coordinator.status_view import render_status, watch_status

    show = (lambda answer: typer.echo(json.dumps(answer))) if as_json else render_status
    if watch:
        watch_status(lambda: _operate(folder, "status"), show if as_json else None)
    else:
        show(_operate(folder, "status"))


@app.command()
def stop(folder: FolderArgument = None) -> None:
    """Stop a coordinator. `coordinator start` on its folder goes on from there."""
    typer.echo(_operate(folder, "stop")["message"])


@app.command()
def pause(folder: FolderArgument = None) -> None:
    """Open no further round until `resume`; the current one is finished."""
    typer.echo(_operate(folder, "pause")["message"])


@app.command()
def resume(folder: FolderArgument = None) -> None:
    """Go on after `pause`."""
    typer.echo(_operate(folder, "resume")["message"])


@app.command()
def invite(
    folder: FolderArgument = None,
    uses: Annotated[int, typer.Option(min=1, help="How many machines may join with it.")] = 1000,
    hours: Annotated[float, typer.Option(min=0.01, help="How long it is valid.")] = 168.0,
) -> None:
    """Print a new invite."""
    typer.echo(_operate(folder, "invite", uses=uses, expires_hours=hours)["invite"])


@app.command()
def invites(folder: FolderArgument = None, as_json: JsonOption = False) -> None:
    """List the invites that were issued: how many machines joined with each, and whether it still works.

    Shown are their ids, for `revoke`, not the invites themselves: those are not kept.
    """
    from coordinator.status_view import render_invites

    answer = _operate(folder, "invites")["invites"]
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        render_invites(answer)


@app.command()
def revoke(
    invite: Annotated[str, typer.Argument(help="The id of an invite, or its beginning; `invites` lists them.")],
    folder: FolderArgument = None,
) -> None:
    """Let nobody new join with an invite. Who has joined with it stays, and may come back; `ban` ends that."""
    typer.echo(_operate(folder, "revoke", invite=invite)["message"])


@app.command()
def ban(
    peer: PeerArgument,
    folder: FolderArgument = None,
    reason: Annotated[str, typer.Option(help="What its owner is told.")] = "",
) -> None:
    """End a peer's session, lease its work to others, and refuse it from now on.

    What it contributed and was accepted stays. It is known by its key: whoever has an invite can make another key and
    join anew, so consider `revoke` too, or `invite.approval = true` in run.toml.

    Examples:

      manyhands coordinator ban attic

      manyhands coordinator ban 12D3KooWQ7xB --reason "its contributions are noise"
    """
    typer.echo(_operate(folder, "ban", peer=peer, reason=reason)["message"])


@app.command()
def unban(peer: PeerArgument, folder: FolderArgument = None) -> None:
    """Let a banned peer join again. Its worker has ended: its owner starts it."""
    typer.echo(_operate(folder, "unban", peer=peer)["message"])


@app.command()
def approve(peer: PeerArgument, folder: FolderArgument = None) -> None:
    """Let a worker in that waits for it: with `invite.approval = true` in run.toml, every new one does.

    Until then it gets neither leases nor the model nor the text. `ban` turns it away for good.
    """
    typer.echo(_operate(folder, "approve", peer=peer)["message"])


@app.command()
def round_time(
    seconds: Annotated[float, typer.Argument(min=0.0, help="1 to 3600; 0: inner steps as run.toml says.")],
    folder: FolderArgument = None,
) -> None:
    """Set how long a round should take, from the next one on.

    The inner steps follow from it, at the observed speed of a typical worker and beside the time for the exchange; the
    log, the page and `coordinator status` show both. It holds over restarts, until it is set again.

    Examples:

      manyhands coordinator round-time 60

      manyhands coordinator round-time 0      # as run.toml says
    """
    typer.echo(_operate(folder, "round-time", seconds=seconds)["message"])


def _operate(folder: Path | None, verb: Verb, **options: Any) -> dict[str, Any]:
    from coordinator.operator import operate
    from coordinator.run_folder import RunFolder

    return asyncio.run(operate(RunFolder(folder or _find_running()), verb, **options))


def _find_running() -> Path:
    from coordinator.run_folder import RunFolder

    running = [path.parent for path in sorted(RUNS.glob("*/running.json")) if RunFolder(path.parent).read_running()]
    if len(running) != 1:
        found = f"{len(running)} coordinators run below {RUNS}" if running else f"no coordinator runs below {RUNS}"
        raise ConfigError(f"{found}; name the run folder")
    return running[0]


def _choose_folder(run: Path, folder: Path | None) -> Path:
    from protocol.run_spec import load_run_spec

    if run.is_dir():
        return run
    return folder or RUNS / "-".join(load_run_spec(run).name.split())


async def _serve(server: Any, on_ready: Callable[[str], None]) -> None:
    import signal

    from coordinator.dashboard.page import serve_page

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop.set)
    await server.serve(on_ready, page=serve_page)


def _start_model_process(home: Any, vocabulary_size: int) -> Callable[[], Any]:
    """Have the initial model made by a process that may load torch; returns what waits for its answer."""
    from coordinator.run_folder import InitialModel

    command = [sys.executable, "-m", "manyhands", "worker", "initialize-model", str(home.spec_path)]
    command += ["--vocabulary-size", str(vocabulary_size), "--blobs", str(home.store.folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish() -> InitialModel:
        output, errors = process.communicate()
        if process.returncode != 0:
            last = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}"
            raise ConfigError(last.removeprefix("manyhands: "))
        return InitialModel(**json.loads(output))

    return finish


def _validator_command(home: Any, invite: str) -> Sequence[str]:
    place = home.path / "validator"
    place.mkdir(exist_ok=True)
    invite_path = place / "invite"
    invite_path.touch(mode=0o600)
    invite_path.write_text(invite)
    command = [sys.executable, "-m", "manyhands", "worker", "validate", str(invite_path), "--home", str(place)]
    return [*command, "--blobs", str(home.store.folder), "--checkpoints", str(home.checkpoints)]


def _shard_progress(*, quiet: bool) -> Any:
    from coordinator.status_view import shard_progress

    return shard_progress(quiet)


def _announce(server: Any, invite: str, as_json: bool) -> None:
    from coordinator.status_view import render_announcement

    facts = {
        "invite": invite,
        "run_id": server.run.run_id,
        "folder": str(server.folder.path),
        "address": server.address,
        "page": f"http://{server.spec.coordinator.http}",
        "operator_token": server.operator_token,
        "round": server.state.rounds_merged,
    }
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        render_announcement(facts, server.run.spec.name)
