"""What holds for every machine, every volunteer and every course of readings."""

import math
import tempfile
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigError
from worker.governor.ladder import Decision, LadderState, decide
from worker.governor.preferences import Preferences, load_preferences
from worker.governor.readings import Readings
from worker.governor.rungs import LADDER
from worker.governor.schedule import Window, find_next_change, is_open
from worker.governor.settings_file import set_preference, show_value

START = datetime(2026, 11, 23, tzinfo=UTC)
SIZES = st.none() | st.integers(0, 10**11)

READINGS = st.builds(
    Readings,
    user_pause_until_unix_s=st.none() | st.just(math.inf) | st.floats(0.0, 4e9),
    on_battery=st.none() | st.booleans(),
    battery_percent=st.none() | st.floats(0.0, 100.0),
    user_idle_s=st.none() | st.floats(0.0, 1e5),
    other_cpu_share=st.none() | st.floats(0.0, 1.0),
    cpu_celsius=st.none() | st.floats(0.0, 120.0),
    gpu_celsius=st.none() | st.floats(0.0, 120.0),
    metered=st.none() | st.booleans(),
    traffic_bytes=SIZES,
    free_memory_bytes=SIZES,
    free_disk_bytes=SIZES,
    store_bytes=SIZES,
)
TIMES = st.integers(0, 1439).map(lambda minute: f"{minute // 60:02d}:{minute % 60:02d}")
DAYS = st.sampled_from(["mon", "tue", "wed", "thu", "fri", "sat", "sun"])


@st.composite
def windows(draw: st.DrawFn) -> str:
    start, end = draw(st.lists(TIMES, min_size=2, max_size=2, unique=True))
    return f"{draw(DAYS)}-{draw(DAYS)} {start}-{end}"


PREFERENCES = st.builds(
    Preferences,
    pause_on_battery=st.booleans(),
    battery_min_percent=st.floats(0.0, 100.0),
    pause_when_user_active=st.booleans(),
    user_idle_minutes=st.floats(0.1, 60.0),
    other_programs_max_percent=st.floats(0.0, 100.0),
    cpu_max_celsius=st.floats(0.0, 150.0),
    gpu_max_celsius=st.floats(0.0, 150.0),
    schedule=st.lists(windows(), max_size=3).map(tuple),
    pause_on_metered=st.booleans(),
    monthly_traffic_gb=st.floats(0.0, 100.0),
    memory_min_free_gb=st.floats(0.0, 100.0),
    disk_min_free_gb=st.floats(0.0, 100.0),
    store_max_gb=st.floats(0.0, 100.0),
    compute_share=st.floats(0.01, 1.0),
)
COURSES = st.lists(st.tuples(st.floats(0.0, 200.0), READINGS), min_size=1, max_size=20)


def follow(preferences: Preferences, course: list[tuple[float, Readings]]) -> list[tuple[float, LadderState, Decision]]:
    state, local, seen = LadderState(), START, []
    for after_s, readings in course:
        local += timedelta(seconds=after_s)
        state, decision = decide(preferences, readings, state, local.timestamp(), local)
        seen.append((local.timestamp(), state, decision))
    return seen


@given(preferences=PREFERENCES, course=COURSES)
def test_deciding_is_a_function_of_its_arguments(
    preferences: Preferences, course: list[tuple[float, Readings]]
) -> None:
    assert follow(preferences, course) == follow(preferences, course)


@given(preferences=PREFERENCES, course=COURSES)
def test_what_is_unknown_never_starts_a_pause(preferences: Preferences, course: list[tuple[float, Readings]]) -> None:
    always = preferences.model_copy(update={"schedule": ()})
    assert all(d.reason is None for _, _, d in follow(always, [(after_s, Readings()) for after_s, _ in course]))


@given(preferences=PREFERENCES, course=COURSES)
def test_reason_is_the_first_that_holds_and_is_explained(
    preferences: Preferences, course: list[tuple[float, Readings]]
) -> None:
    for now_unix_s, state, decision in follow(preferences, course):
        held = [rung.reason for rung in LADDER if rung.reason in state.latches and state.latches[rung.reason].holds]
        assert decision.reason == (held[0] if held else None)
        assert bool(decision.detail) == (decision.reason is not None)
        assert decision.throttle == preferences.compute_share
        assert decision.until_unix_s is None or decision.reason is not None or decision.until_unix_s > now_unix_s


@given(preferences=PREFERENCES, course=COURSES)
def test_no_pause_is_shorter_than_its_dwell(preferences: Preferences, course: list[tuple[float, Readings]]) -> None:
    began: dict[str, float] = {}
    for now_unix_s, state, _ in follow(preferences, course):
        for rung in LADDER:
            latch = state.latches.get(rung.reason)
            if latch is not None and latch.holds:
                began.setdefault(rung.reason, now_unix_s)
            elif rung.reason in began and latch is not None:  # None: the volunteer's own pause was taken back
                assert now_unix_s - began.pop(rung.reason) >= rung.dwell_s
            else:
                began.pop(rung.reason, None)


@given(
    preferences=PREFERENCES,
    known=READINGS,
    hidden=st.sampled_from([field.name for field in fields(Readings)]),
)
def test_hiding_a_reading_never_adds_a_reason(preferences: Preferences, known: Readings, hidden: str) -> None:
    def held(readings: Readings) -> set[str]:
        state, _ = decide(preferences, readings, LadderState(), START.timestamp(), START)
        return {reason for reason, latch in state.latches.items() if latch.holds}

    assert held(replace(known, **{hidden: None})) <= held(known)


@given(
    texts=st.lists(
        st.builds(
            lambda days, start, length: Window(days=days, start_minute=start, end_minute=start + length),
            st.frozensets(st.integers(0, 6), min_size=1),
            st.integers(0, 1439),
            st.integers(1, 1440),
        ),
        min_size=1,
        max_size=3,
    ),
    minute=st.integers(0, 7 * 1440 - 1),
)
def test_next_change_is_the_first_minute_that_differs(texts: list[Window], minute: int) -> None:
    local = datetime(2026, 11, 23) + timedelta(minutes=minute)
    change = find_next_change(texts, local)
    now_open = is_open(texts, local)
    minutes = range(1, 8 * 1440)
    expected = next((m for m in minutes if is_open(texts, local + timedelta(minutes=m)) != now_open), None)
    assert change == (None if expected is None else local + timedelta(minutes=expected))


@settings(max_examples=60)
@given(preferences=PREFERENCES)
def test_settings_survive_being_typed_and_read_again(preferences: Preferences) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "worker.toml"
        for key in Preferences.model_fields:
            set_preference(path, key, show_value(getattr(preferences, key)))
        assert load_preferences(path) == preferences


@settings(max_examples=200)
@given(key=st.sampled_from(sorted(Preferences.model_fields)) | st.text(max_size=20), text=st.text(max_size=30))
def test_whatever_is_typed_is_taken_or_refused_in_one_line(key: str, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "worker.toml"
        said = ""
        try:
            set_preference(path, key, text)
        except ConfigError as error:
            said = str(error)
        assert path.exists() == (not said)
        assert len(said.splitlines()) == (1 if said else 0)
        assert said.startswith(str(path) if said else "")
        load_preferences(path)
