"""run.toml: what is wrong is told in one line that names the place, and the key that was probably meant."""

from pathlib import Path

import pytest

from protocol.errors import ConfigError
from protocol.run_spec import RunSpec, load_run_spec, parse_run_spec


def load(tmp_path: Path, text: str | bytes) -> RunSpec:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_run_spec(path)


def complaint(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    assert "run.toml" in message
    return message


def test_defaults_stand_when_the_file_is_empty(tmp_path: Path) -> None:
    assert load(tmp_path, "") == RunSpec()


def test_values_are_taken_when_they_are_given(tmp_path: Path) -> None:
    spec = load(tmp_path, 'name = "poems"\n[round]\ninner_steps = 7\n[data]\nsequence_length = 64\nshard_steps = 2\n')
    assert (spec.name, spec.round.inner_steps) == ("poems", 7)
    assert spec.shard_tokens == 2 * spec.step_tokens == 2 * 64 * spec.train.batch_sequences


@pytest.mark.parametrize(
    ("text", "place", "near"),
    [
        ("[round]\ninner_step = 5", "round.inner_step", "inner_steps"),
        ("[train]\nlr = 1.0\nlearning_rat = 1.0", "train.l", "learning_rate"),
        ("[rounds]\nmin_peers = 5", "rounds", "round"),
        ('nmae = "x"', "nmae", "name"),
        ('[coordinator]\nlsten = "x"', "coordinator.lsten", "listen"),
        ("[round.deep]\nx = 1", "round.deep", ""),
    ],
)
def test_nearest_key_is_named_when_a_key_is_unknown(tmp_path: Path, text: str, place: str, near: str) -> None:
    message = complaint(tmp_path, text)
    assert f"unknown key `{place}" in message
    assert f"did you mean `{near}" in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[round]\ninner_steps = "many"', "round.inner_steps"),
        ("[round]\ninner_steps = 1.5", "round.inner_steps"),
        ("[round]\ninner_steps = 0", "round.inner_steps"),
        ("[round]\nmin_peers = -1", "round.min_peers"),
        ("[round]\nquorum_fraction = 1.5", "round.quorum_fraction"),
        ("[round]\nexchange_s = nan", "round.exchange_s"),
        ("[train]\nlearning_rate = inf", "train.learning_rate"),
        ("[train]\nlearning_rate = 0.0", "train.learning_rate"),
        ("[train]\nlearning_rate = true", "train.learning_rate"),
        ('[train]\nlearning_rate = "automatic"', "train.learning_rate"),
        ("[train]\ntokens = []", "train.tokens"),
        ("name = 7", "name"),
        ('name = ""', "name"),
        ("round = 3", "round"),
        ("[[round]]\ninner_steps = 3", "round"),
        ('[outer]\noptimizer = "adam"', "outer.optimizer"),
        ("[exchange.codec_options]\ndensity = []", "exchange.codec_options.density"),
    ],
)
def test_place_is_named_when_a_value_is_of_the_wrong_kind(tmp_path: Path, text: str, place: str) -> None:
    assert f"run.toml: {place}" in complaint(tmp_path, text)


def test_number_of_further_problems_is_told_when_there_are_several(tmp_path: Path) -> None:
    assert "(and 2 more)" in complaint(tmp_path, "[round]\ninner_steps = 0\nmin_peers = 0\nexchange_s = 0.0")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('[outer]\noptimizer = "average"\nmomentum = 0.5', "use 'nesterov' or 'sgd'"),
        ('[train]\noptimizer = "auto"', "needs train.learning_rate = 'auto'"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_what_to_use_instead(
    tmp_path: Path, text: str, advice: str
) -> None:
    assert advice in complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["name = ", "[round", b"\xff\xfe", 'name = "a"\nname = "b"'])
def test_error_is_one_line_when_the_file_is_not_toml(tmp_path: Path, text: str | bytes) -> None:
    complaint(tmp_path, text)


def test_remedy_is_named_when_the_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="manyhands init"):
        load_run_spec(tmp_path / "run.toml")
    with pytest.raises(ConfigError):
        load_run_spec(tmp_path)  # a folder


def test_spec_is_the_same_when_it_went_through_the_genesis() -> None:
    spec = parse_run_spec({"round": {"inner_steps": 3}, "exchange": {"codec": "sparse", "codec_options": {"k": 16}}})
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    assert RunSpec.model_validate_json(spec.model_dump_json(), strict=True) == spec


def test_spec_cannot_be_changed_when_a_run_has_begun() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().round.inner_steps = 3  # type: ignore[misc] # what the test is about
