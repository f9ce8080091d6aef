"""`manyhands simulate …`: parse, run, print."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from protocol.errors import ConfigError
from simulations.scenario import Scenario, list_scenarios, load_scenario

FOLDER = Path("manyhands-simulations")
RUN = "run"
Row = dict[str, Any]


class ScenarioGroup(TyperGroup):
    """`simulate SCENARIO …` is `simulate run SCENARIO …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ScenarioGroup,
    no_args_is_help=True,
    help="Run a scenario with virtual peers: `manyhands simulate laptops`.",
    epilog="manyhands simulate mixed-home --set hours=2 --sweep run.round.inner_steps=20,50,100",
)


@app.command(RUN, hidden=True)
def run(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="A name from `simulate list`, or a TOML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, such as population.phones.count=50")
    ] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="key=a,b,c: one run for each value")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the scenario's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the results go. Default: manyhands-simulations/NAME.")] = None,
    short: Annotated[bool, typer.Option("--short", help="A small run of it: the values of its table [short].")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last snapshot.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Simulate a scenario; write results.parquet, the trace and report.html; print a short table."""
    from simulations.simulate import simulate

    overrides = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    variants = _spread(sweep or [])
    runs = [
        (load_scenario(scenario, [*overrides, *variant], short=short), variant) for variant in variants
    ]  # all checked first
    summaries = []
    for loaded, variant in runs:
        folder = out or FOLDER / loaded.name
        folder = folder / ",".join(variant).replace("/", "_") if variant else folder
        with _progress(loaded, quiet=as_json) as progress:
            results = simulate(loaded, folder, resume=resume, on_progress=_follow(progress, loaded))
        summaries.append({"folder": str(folder), **results.summary})
    if as_json:
        typer.echo(json.dumps(summaries if sweep else summaries[0]))
        return
    _print(summaries)
    for summary in summaries:
        typer.echo(f"report  {summary['folder']}/report.html")


@app.command("list")
def list_() -> None:
    """The scenarios that come with manyhands."""
    table = Table("scenario", "peers", "hours", "fidelity", "what it is about", box=None)
    for path in list_scenarios():
        scenario = load_scenario(path.stem)
        hours = f"{scenario.hours:g}"
        table.add_row(scenario.name, f"{scenario.num_peers:,}", hours, scenario.fidelity, scenario.description)
    Console(highlight=False).print(table)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished simulations.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put the figures of several simulations beside each other."""
    from simulations.results import read_summaries

    summaries = read_summaries(folders)
    if as_json:
        typer.echo(json.dumps(summaries))
    else:
        _print(summaries)


@app.command(epilog="manyhands simulate calibrate manyhands-runs/my-run --out my-run.toml")
def calibrate(
    run_folder: Annotated[Path, typer.Argument(help="The folder of a run, which may be running.")],
    out: Annotated[Path | None, typer.Option(help="The scenario to write. Default: RUN-as-run.toml.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Make a scenario of a real run: its peers' speeds, links and sessions, its overheads, its settings."""
    from simulations.calibrate import calibrate as fit_run
    from simulations.calibration.scenario_file import name_scenario
    from simulations.calibration.table import print_calibration

    calibration = fit_run(run_folder)
    path = out or Path(f"{name_scenario(calibration.facts.spec)}.toml")
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; --force replaces it, --out writes another")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(calibration.text, encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"scenario": str(path), **calibration.to_json()}))
        return
    print_calibration(calibration)
    typer.echo(f"wrote {path}; `manyhands simulate {path}` simulates it, with `--set fidelity=learn` the training too")


@app.command()
def question(
    out: Annotated[Path, typer.Option(help="The page; its pictures are put beside it.")] = Path(
        "docs/every-phone-and-computer.md"
    ),
) -> None:
    """Write what all phones and computers could train: which model, in how many days, and what limits it."""
    from simulations.question import write_question

    for path in write_question(out):
        typer.echo(path)


def _spread(sweeps: Sequence[str]) -> list[list[str]]:
    """One list of overrides for each combination of the swept values."""
    choices = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not all(values.split(",")):
            raise ConfigError(f"--sweep {sweep}: write key=a,b,c")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [list(combination) for combination in itertools.product(*choices)]


def _progress(scenario: Scenario, *, quiet: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn(scenario.name),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def _follow(progress: Progress, scenario: Scenario) -> Any:
    task = progress.add_task("", total=scenario.hours, told="")

    def follow(now_s: float, rounds: int) -> None:
        told = f"{now_s / 3600.0:.1f} of {scenario.hours:g} virtual hours, {rounds} rounds"
        progress.update(task, completed=now_s / 3600.0, told=told)

    return follow


_LINES: tuple[tuple[str, str, str], ...] = (
    ("fidelity", "fidelity", "{}"),
    ("peers", "peers", "{:,}"),
    ("peers online, on average", "peers_online", "{:,.0f}"),
    ("virtual hours", "virtual_hours", "{:,.2f}"),
    ("rounds", "rounds", "{:,}"),
    ("rounds void", "rounds_void", "{:,}"),
    ("seconds a round", "round_s", "{:,.1f}"),
    ("tokens credited", "tokens", "{:,}"),
    ("tokens a second", "tokens_per_s", "{:,.0f}"),
    ("utilisation", "utilisation", "{:.1%}"),
    ("contributions refused", "refused", "{:,}"),
    ("held-out loss at the start", "held_out_loss_start", "{:.3f}"),
    ("held-out loss", "held_out_loss", "{:.3f}"),
    ("sent by a peer, MB", "sent_bytes_per_peer", "MB"),
    ("sent by the coordinator, MB", "coordinator_sent_bytes", "MB"),
    ("energy, kWh", "energy_kwh", "{:,.2f}"),
    ("computed in, s", "wall_s", "{:,.1f}"),
)


def _print(summaries: Sequence[Row]) -> None:
    table = Table("", *[Path(summary["folder"]).name for summary in summaries], box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, key, form in _LINES:
        values = [summary.get(key) for summary in summaries]
        if any(value is not None for value in values):
            table.add_row(label, *[_show(value, form) for value in values])
    Console(highlight=False).print(table)


def _show(value: Any, form: str) -> str:
    if value is None:
        return "–"  # noqa: RUF001 - a dash for no figure
    return f"{value / 1e6:,.1f}" if form == "MB" else form.format(value)
