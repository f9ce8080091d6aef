"""The commented run.toml is the default RunSpec but for what is recommended, and every commented line in it is true."""

import tomllib

from protocol.run_spec import RunSpec, parse_run_spec
from protocol.run_template import render_spec, render_template

RECOMMENDED = RunSpec.model_validate(
    {
        "train": {"optimizer": "auto", "learning_rate": "auto"},
        "exchange": {"codec": "auto"},
        "round": {"inner_steps": "auto"},
        "outer": {"optimizer": "average"},
    }
)


def test_template_is_the_default_and_what_is_recommended_when_it_is_parsed() -> None:
    assert parse_run_spec(tomllib.loads(render_template())) == RECOMMENDED


def test_template_is_the_default_when_every_key_is_uncommented() -> None:
    lines = []
    for line in render_template().splitlines():
        bare = line.removeprefix("# ")
        is_key = line.startswith("# ") and bare.split(" = ")[0].isidentifier() and '= ""' not in bare
        lines.append(bare if is_key else line)
    assert parse_run_spec(tomllib.loads("\n".join(lines))) == RECOMMENDED


def test_spec_survives_when_it_is_written_and_read() -> None:
    spec = RunSpec.model_validate(
        {"name": 'with "quotes"', "train": {"tokens": 5}, "data": {"source": "a/b c.txt"}, "round": {"min_peers": 3}}
    )
    assert parse_run_spec(tomllib.loads(render_spec(spec))) == spec
