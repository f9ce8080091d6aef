"""Every rung of the ladder, from readings to the decision: what pauses, what does not, and when it ends."""

import math
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from worker.governor.ladder import Decision, LadderState, decide
from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.reasons import PauseReason
from worker.governor.rungs import GB, LADDER

HOME = ZoneInfo("Europe/Berlin")
START = datetime(2026, 11, 23, 12, 0, tzinfo=HOME)  # a Monday


class Clocked:
    """The ladder with a clock that the test moves."""

    def __init__(self, local: datetime = START, **preferences: object) -> None:
        self.preferences = Preferences.model_validate(preferences)
        self.local = local
        self.state = LadderState()

    def see(self, after_s: float = 0.0, **readings: object) -> Decision:
        now = self.local.timestamp() + after_s
        self.local = datetime.fromtimestamp(now, self.local.tzinfo)
        self.state, decision = decide(
            self.preferences,
            Readings(**readings),  # type: ignore[arg-type]  # each test names the fields that it sets
            self.state,
            now,
            self.local,
        )
        return decision


# For every rung: preferences, readings that pause, readings that let it go on, when the dwell is over.
RUNGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "user_pause": ({}, {"user_pause_until_unix_s": math.inf}, {}),
    "battery": ({}, {"on_battery": True, "battery_percent": 80.0}, {"on_battery": False, "battery_percent": 80.0}),
    "user_active": ({"pause_when_user_active": True}, {"user_idle_s": 2.0}, {"user_idle_s": 301.0}),
    "other_programs": ({"other_programs_max_percent": 25.0}, {"other_cpu_share": 0.5}, {"other_cpu_share": 0.1}),
    "temperature": ({}, {"cpu_celsius": 91.0}, {"cpu_celsius": 60.0}),
    "metered": ({}, {"metered": True}, {"metered": False}),
    "traffic_cap": ({"monthly_traffic_gb": 10.0}, {"traffic_bytes": 10**10}, {"traffic_bytes": 10**10 - 1}),
    "memory": ({}, {"free_memory_bytes": int(0.4 * GB)}, {"free_memory_bytes": int(2 * GB)}),
    "disk": ({}, {"free_disk_bytes": int(1.9 * GB)}, {"free_disk_bytes": int(5 * GB)}),
}


@pytest.mark.parametrize("name", RUNGS)
def test_rung_pauses_and_goes_on_when_its_reading_says_so(name: str) -> None:
    preferences, pausing, resuming = RUNGS[name]
    ladder = Clocked(**preferences)
    ladder.see(**pausing)
    paused = ladder.see(10.0, **pausing)
    assert paused.reason == name
    assert paused.detail
    assert ladder.see(600.0, **pausing).reason == name
    assert ladder.see(1.0, **resuming).reason is None


@pytest.mark.parametrize("name", RUNGS)
def test_rung_says_nothing_when_its_sensor_is_unknown(name: str) -> None:
    ladder = Clocked(**RUNGS[name][0])
    assert ladder.see().reason is None
    assert ladder.see(600.0).reason is None


@pytest.mark.parametrize(
    ("off", "name"),
    [
        ({"pause_on_battery": False, "battery_min_percent": 0.0}, "battery"),
        ({"pause_when_user_active": False}, "user_active"),
        ({"other_programs_max_percent": 0.0}, "other_programs"),
        ({"cpu_max_celsius": 0.0}, "temperature"),
        ({"pause_on_metered": False}, "metered"),
        ({"monthly_traffic_gb": 0.0}, "traffic_cap"),
        ({"memory_min_free_gb": 0.0}, "memory"),
        ({"disk_min_free_gb": 0.0}, "disk"),
    ],
)
def test_pause_ends_at_once_when_the_volunteer_turns_its_rung_off(off: dict[str, object], name: str) -> None:
    preferences, pausing, _ = RUNGS[name]
    ladder = Clocked(**preferences)
    ladder.see(**pausing)
    assert ladder.see(10.0, **pausing).reason == name
    ladder.preferences = Preferences.model_validate(preferences | off)
    assert ladder.see(0.5, **pausing).reason is None


def test_first_reason_of_the_order_wins_when_all_hold() -> None:
    preferences = {key: value for change, _, _ in RUNGS.values() for key, value in change.items()}
    readings = {key: value for _, pausing, _ in RUNGS.values() for key, value in pausing.items()}
    ladder = Clocked(**preferences, schedule=["tue"])
    ladder.see(**readings)
    order = [
        ("user_pause", "user_pause_until_unix_s"),
        ("battery", "on_battery"),
        ("user_active", "user_idle_s"),
        ("other_programs", "other_cpu_share"),
        ("temperature", "cpu_celsius"),
    ]
    for name, key in order:
        assert ladder.see(100.0, **readings).reason == name
        readings[key] = None
    assert ladder.see(100.0, **readings).reason == "schedule"
    ladder.preferences = Preferences.model_validate(preferences)
    for name, key in [("metered", "metered"), ("traffic_cap", "traffic_bytes"), ("memory", "free_memory_bytes")]:
        assert ladder.see(100.0, **readings).reason == name
        readings[key] = None
    assert ladder.see(100.0, **readings).reason == "disk"
    assert [rung.reason for rung in LADDER] == list(PauseReason)


def test_user_pause_ends_by_itself_when_its_time_is_over() -> None:
    ladder = Clocked()
    until = START.timestamp() + 7200.0
    decision = ladder.see(user_pause_until_unix_s=until)
    assert (decision.reason, decision.until_unix_s) == ("user_pause", until)
    assert ladder.see(7199.0, user_pause_until_unix_s=until).reason == "user_pause"
    assert ladder.see(1.0, user_pause_until_unix_s=until).reason is None


def test_low_battery_pauses_until_it_is_charged_above_the_level_when_plugged_in() -> None:
    ladder = Clocked(battery_min_percent=30.0)
    levels = [31.0, 29.0, 31.0, 34.0, 35.0, 31.0]
    reasons = [ladder.see(60.0, on_battery=False, battery_percent=level).reason for level in levels]
    assert reasons == [None, "battery", "battery", "battery", None, None]


def test_computes_on_battery_down_to_the_level_when_allowed_to() -> None:
    ladder = Clocked(pause_on_battery=False, battery_min_percent=50.0)
    assert ladder.see(on_battery=True, battery_percent=51.0).reason is None
    assert ladder.see(60.0, on_battery=True, battery_percent=49.0).reason == "battery"


def test_other_programs_pause_only_when_they_stay_busy() -> None:
    ladder = Clocked(other_programs_max_percent=20.0)
    shares = [(0.9, None), (0.1, None), (0.9, None), (0.9, None), (0.9, "other_programs")]
    for share, expected in shares:
        assert ladder.see(2.5, other_cpu_share=share).reason == expected
    assert ladder.see(59.0, other_cpu_share=0.0).reason == "other_programs"  # the dwell
    assert ladder.see(30.0, other_cpu_share=0.16).reason == "other_programs"  # under the limit, over what ends it
    assert ladder.see(1.0, other_cpu_share=0.13).reason is None


def test_hot_machine_goes_on_only_when_it_is_some_degrees_cooler() -> None:
    ladder = Clocked(cpu_max_celsius=90.0, gpu_max_celsius=80.0)
    assert ladder.see(cpu_celsius=89.0, gpu_celsius=80.0).reason is None
    assert ladder.see(1.0, cpu_celsius=70.0, gpu_celsius=81.0).reason == "temperature"
    assert ladder.see(60.0, cpu_celsius=70.0, gpu_celsius=73.0).reason == "temperature"
    decision = ladder.see(60.0, cpu_celsius=90.0, gpu_celsius=70.0)
    assert decision.reason == "temperature"
    assert "CPU" in decision.detail
    assert ladder.see(60.0, cpu_celsius=82.0, gpu_celsius=72.0).reason is None


def test_temperature_pause_ends_when_its_sensor_stops_answering() -> None:
    ladder = Clocked()
    assert ladder.see(cpu_celsius=95.0).reason == "temperature"
    assert ladder.see(119.0).reason == "temperature"
    assert ladder.see(1.0).reason is None


def test_pause_does_not_last_longer_when_the_clock_is_set_back() -> None:
    ladder = Clocked()
    assert ladder.see(cpu_celsius=95.0).reason == "temperature"
    assert ladder.see(-86_400.0, cpu_celsius=40.0).reason == "temperature"
    assert ladder.see(120.0, cpu_celsius=40.0).reason is None


def test_store_over_its_cap_pauses() -> None:
    ladder = Clocked(store_max_gb=3.0)
    decision = ladder.see(store_bytes=int(3.1 * GB), free_disk_bytes=int(100 * GB))
    assert decision.reason == "disk"
    assert "3.1 GB" in decision.detail
    assert ladder.see(60.0, store_bytes=int(2.9 * GB), free_disk_bytes=int(100 * GB)).reason is None


def test_schedule_is_followed_over_midnight_and_over_the_weekend() -> None:
    ladder = Clocked(schedule=["mon-fri 22:00-07:00", "sat-sun"])
    decision = ladder.see()
    assert decision.reason == "schedule"
    assert decision.until_unix_s == datetime(2026, 11, 23, 22, 0, tzinfo=HOME).timestamp()
    expected = [
        (datetime(2026, 11, 23, 21, 59, 59), "schedule"),
        (datetime(2026, 11, 23, 22, 0), None),
        (datetime(2026, 11, 24, 6, 59), None),
        (datetime(2026, 11, 24, 7, 0), "schedule"),
        (datetime(2026, 11, 27, 23, 0), None),
        (datetime(2026, 11, 28, 12, 0), None),
        (datetime(2026, 11, 29, 23, 59), None),
        (datetime(2026, 11, 30, 0, 0), "schedule"),  # Sunday's window was not one over midnight
    ]
    for clock, reason in expected:
        ladder.local = clock.replace(tzinfo=HOME)
        assert ladder.see().reason == reason, clock


def test_running_says_until_when_the_schedule_lets_it() -> None:
    ladder = Clocked(datetime(2026, 11, 27, 23, 0, tzinfo=HOME), schedule=["mon-fri 22:00-07:00", "sat-sun"])
    # Friday night runs into Saturday; the open time ends with Sunday
    assert ladder.see() == Decision(until_unix_s=datetime(2026, 11, 30, tzinfo=HOME).timestamp())
    assert Clocked().see().until_unix_s is None


@pytest.mark.parametrize(("day", "hours"), [(datetime(2026, 3, 28), 8.0), (datetime(2026, 10, 24), 10.0)])
def test_schedule_keeps_the_clock_on_the_wall_when_clocks_change(day: datetime, hours: float) -> None:
    opened = day.replace(hour=22, tzinfo=HOME)
    ladder = Clocked(opened, schedule=["22:00-07:00"])
    decision = ladder.see()
    assert decision.reason is None
    assert decision.until_unix_s == opened.timestamp() + 3600 * hours  # 9 hours by the clock on the wall
    assert ladder.see(3600 * hours - 1).reason is None
    assert ladder.see(1).reason == "schedule"


def test_traffic_cap_ends_with_the_month() -> None:
    ladder = Clocked(datetime(2026, 12, 5, 9, 30, tzinfo=HOME), monthly_traffic_gb=1.0)
    decision = ladder.see(traffic_bytes=2 * 10**9)
    assert decision.until_unix_s == datetime(2027, 1, 1, tzinfo=HOME).timestamp()


def test_returning_user_pauses_at_once_and_leaving_takes_the_idle_time() -> None:
    ladder = Clocked(pause_when_user_active=True, user_idle_minutes=10.0)
    assert ladder.see(user_idle_s=3600.0).reason is None
    decision = ladder.see(0.5, user_idle_s=0.1)
    assert decision.reason == "user_active"
    assert decision.until_unix_s == pytest.approx(ladder.local.timestamp() + 599.9)
    assert ladder.see(599.0, user_idle_s=599.1).reason == "user_active"
    assert ladder.see(1.0, user_idle_s=600.1).reason is None


def test_throttle_is_the_volunteers_share() -> None:
    assert Clocked(compute_share=0.25).see().throttle == 0.25


def test_deciding_changes_nothing_that_it_was_given() -> None:
    state = LadderState()
    readings = Readings(cpu_celsius=99.0)
    again = replace(readings)
    decide(Preferences(), readings, state, START.timestamp(), START)
    assert state == LadderState()
    assert readings == again


def test_local_time_without_a_zone_still_dates_the_schedule() -> None:
    naive = START.replace(tzinfo=None)
    _, decision = decide(Preferences(schedule=("22:00-07:00",)), Readings(), LadderState(), 1e9, naive)
    assert decision.until_unix_s == 1e9 + timedelta(hours=10).total_seconds()
