"""worker.toml: what it takes, how it is changed, and what is said about a mistake."""

import tomllib
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from worker.governor.preferences import Preferences, load_preferences
from worker.governor.schedule import parse_window
from worker.governor.settings_file import default_text, set_preference


def test_missing_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_preferences(tmp_path / "worker.toml") == Preferences()


def test_template_names_every_key_and_parses_to_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(default_text())
    assert load_preferences(path) == Preferences()
    lines = [line for line in default_text().splitlines() if " = " in line]
    active = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines))
    assert list(active) == list(Preferences.model_fields)
    assert Preferences.model_validate(active) == Preferences()


def test_setting_keeps_comments_and_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text("# mine\nniceness = 3  # as the fan is loud\n\n# later\ncompute_share = 0.5\n")
    assert set_preference(path, "niceness", "5").niceness == 5
    assert path.read_text() == "# mine\nniceness = 5  # as the fan is loud\n\n# later\ncompute_share = 0.5\n"
    assert set_preference(path, "pause_on_metered", "off") == Preferences(
        niceness=5, compute_share=0.5, pause_on_metered=False
    )


def test_first_setting_writes_the_template_with_one_line_active(tmp_path: Path) -> None:
    path = tmp_path / "new" / "worker.toml"
    set_preference(path, "compute_share", "0.5")
    before, after = default_text().splitlines(), path.read_text().splitlines()
    assert [line for line in after if line not in before] == ["compute_share = 0.5"]
    assert len(after) == len(before)
    assert [file.name for file in path.parent.iterdir()] == ["worker.toml"]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("pause_when_user_active", "on", True),
        ("pause_on_battery", "No", False),
        ("monthly_traffic_gb", "off", 0.0),
        ("monthly_traffic_gb", "12", 12.0),
        ("cpu_threads", "4", 4),
        ("schedule", "mon-fri 22:00-07:00, sat-sun", ("mon-fri 22:00-07:00", "sat-sun")),
        ("schedule", '["tue thu 12:00-13:30"]', ("tue thu 12:00-13:30",)),
        ("schedule", "always", ()),
        ("io_priority", "idle", "idle"),
        ("compile", "on", "on"),
        ("compile", "off", "off"),
    ],
)
def test_what_people_type_is_understood(tmp_path: Path, key: str, text: str, value: object) -> None:
    path = tmp_path / "worker.toml"
    assert getattr(set_preference(path, key, text), key) == value
    assert getattr(load_preferences(path), key) == value


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("compute_shere", "1", "unknown key `compute_shere`; did you mean `compute_share`? It takes a number above 0"),
        ("compute_share", "0", "compute_share = 0: it takes a number above 0 to 1"),
        ("compute_share", "half", "compute_share = 'half': it takes a number above 0 to 1"),
        ("compute_share", "nan", "compute_share = nan: it takes a number above 0 to 1"),
        ("niceness", "1.5", "niceness = 1.5: it takes a whole number from 0 to 19"),
        ("pause_on_battery", "maybe", "pause_on_battery = 'maybe': it takes true or false"),
        ("io_priority", "fast", "io_priority = 'fast': it takes normal or low or idle"),
        ("compile", "yes", "compile = 'yes': it takes off or auto or on"),
        ("schedule", "mon-fry", "'mon-fry' is neither a day nor a time"),
        ("schedule", "9:00-9:00", "ends when it begins"),
        ("schedule", "25:00-26:00", "times go from 00:00 to 24:00"),
    ],
)
def test_mistake_is_named_with_what_is_allowed_and_changes_nothing(
    tmp_path: Path, key: str, text: str, said: str
) -> None:
    path = tmp_path / "worker.toml"
    path.write_text("niceness = 3\n")
    with pytest.raises(ConfigError) as error:
        set_preference(path, key, text)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert path.read_text() == "niceness = 3\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nicenes = 3", "unknown key `nicenes`; did you mean `niceness`?"),
        ("niceness = '3'", "niceness = '3': it takes a whole number from 0 to 19"),
        ("pause_on_battery = 1", "pause_on_battery = 1: it takes true or false"),
        ("schedule = 'sat'", "schedule = 'sat': it takes windows such as"),
        ("niceness = ", "Invalid value"),
        ("[network]\nmetered = true", "unknown key `network`"),
    ],
)
def test_file_with_a_mistake_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_preferences(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):  # nor does `set` make a good file of it, or lose what it says
        set_preference(path, "cpu_threads", "2")
    assert path.read_text() == text


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        set_preference(tmp_path / "file" / "worker.toml", "niceness", "1")


def test_days_may_wrap_around_the_week() -> None:
    assert parse_window("fri-mon").days == {4, 5, 6, 0}
    assert parse_window("tue thu").days == {1, 3}
    assert parse_window("22:00-07:00").days == set(range(7))
