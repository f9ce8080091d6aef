"""The command line: one thin app that mounts coordinator, worker and simulations, each imported only when used."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup
from typer.main import get_command

_GROUPS = {
    "coordinator": ("coordinator.commands", "Start a run and look after it."),
    "worker": ("worker.commands", "Lend this machine to a run."),
    "simulate": ("simulations.commands", "Run a scenario with virtual peers: `manyhands simulate laptops`."),
}


class LazyGroup(TyperGroup):
    """Knows its sub-commands by name and help, and imports one only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_GROUPS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _GROUPS:
            return super().get_command(ctx, cmd_name)
        module, help_text = _GROUPS[cmd_name]
        if cmd_name not in sys.argv[1:2]:  # listed, not called
            return click.Group(cmd_name, help=help_text)
        return get_command(import_module(module).app)


app = typer.Typer(
    cls=LazyGroup,
    help="Train one model on many people's computers.",
    epilog="Try it on this machine: manyhands demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.toml"),
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented run.toml to start from."""
    from protocol.errors import ConfigError
    from protocol.run_template import render_template

    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; --force replaces it")
    path.write_text(render_template())
    typer.echo(f"wrote {path}; `manyhands coordinator start {path}` starts the run")


@app.command()
def demo(
    text: Annotated[str, typer.Option(help="A file, folder or glob to train on.")] = "stdlib",
    seconds: Annotated[float, typer.Option(min=10, help="Training time to aim for, about.")] = 100.0,
    folder: Annotated[Path | None, typer.Option(help="Where to keep the run. Default: manyhands-runs/demo-….")] = None,
    keep: Annotated[bool, typer.Option(help="Leave the page running at the end, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Several workers train one model together on this machine; one joins late, one is killed. Takes some minutes."""
    from simulations.demo import run_demo

    run_demo(text=text, seconds=seconds, folder=folder, keep=keep, as_json=as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check a run: its chain, signatures and credit, and, from the payloads, the parameters themselves, bit for bit."""
    from coordinator.verify import verify_run

    verify_run(folder, as_json=as_json)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Copy a checkpoint, checked, to a folder that Hugging Face transformers opens."""
    from worker.checkpoint import export_checkpoint, find_checkpoint

    card = export_checkpoint(find_checkpoint(source), target)
    typer.echo(f"{target}: round {card.round}, {card.tokens:,} tokens, held-out loss {card.held_out_loss}")


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(help="A run folder, a checkpoint or an exported model.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "The ",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Let a trained model write."""
    from worker.checkpoint import find_checkpoint
    from worker.generate import generate as write

    text = write(find_checkpoint(source), prompt, max_new_tokens, temperature, seed)
    typer.echo("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(f"manyhands {installed('manyhands')}")


def main() -> None:
    """Entry point: errors raised on purpose become one line and an exit code."""
    from protocol.errors import ManyhandsError
    from protocol.logs import configure_logging

    configure_logging()
    try:
        app(prog_name="manyhands")
    except ManyhandsError as error:
        typer.echo(f"manyhands: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
