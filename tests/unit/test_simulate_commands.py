"""`manyhands simulate`: what is typed, what is printed, what is written."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from protocol.errors import ConfigError
from simulations.commands import app

TINY = ("--set", "hours=0.05", "--set", "population.laptops.count=8", "--set", "run.round.min_peers=1")


def simulate(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_names_the_scenarios() -> None:
    printed = simulate("list")
    assert "laptops" in printed
    assert "internet-scale" in printed


def test_a_run_prints_a_table_and_names_its_report(tmp_path: Path) -> None:
    printed = simulate("laptops", *TINY, "--out", str(tmp_path / "run"))
    assert "tokens credited" in printed
    assert f"report  {tmp_path}/run/report.html" in printed
    assert (tmp_path / "run" / "report.html").is_file()


def test_json_has_the_figures(tmp_path: Path) -> None:
    figures = json.loads(simulate("laptops", *TINY, "--seed", "7", "--out", str(tmp_path), "--json"))
    assert figures["seed"] == 7
    assert figures["rounds"] > 0
    assert figures == {"folder": str(tmp_path), **json.loads((tmp_path / "summary.json").read_text())}


def test_a_sweep_runs_every_combination_and_compare_puts_them_side_by_side(tmp_path: Path) -> None:
    sweep = ("--sweep", "run.exchange.codec=sign,float32", "--sweep", "seed=1,2")
    figures = json.loads(simulate("laptops", *TINY, *sweep, "--out", str(tmp_path), "--json"))
    assert len(figures) == 4
    small, large = figures[0], figures[2]
    assert small["payload_bytes"] / small["contributions"] < large["payload_bytes"] / large["contributions"] / 10
    printed = simulate("compare", small["folder"], large["folder"])
    assert "seconds a round" in printed
    assert len(json.loads(simulate("compare", small["folder"], large["folder"], "--json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("laptop",), "did you mean `laptops`?"),
        (("laptops", "--set", "hurs=1"), "unknown key `hurs`; did you mean `hours`?"),
        (("laptops", "--sweep", "hours"), "write key=a,b,c"),
        (("laptops", "--sweep", "hours=1,-1"), "hours: "),
        (("compare", "nowhere"), "nowhere holds no finished simulation"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
