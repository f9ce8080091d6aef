"""24 simulated hours of a household through the governor's ladder: who pauses the worker, when, and how often.

    python -m benchmarks.household [--quick] [--json FILE]

A laptop is used in the morning, at noon and in the evening, taken along unplugged, runs other programs, and has a
schedule and a traffic cap; the worker heats it and spends traffic only while it computes. Readings are made up from a
seed, the decisions are those of worker.governor.ladder at steps of 30 s. Writes docs/household.svg, unless --quick.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path

from benchmarks.figures import Figure, parse_options, write_figures
from simulations.charts import nice_ticks
from worker.governor.ladder import Decision, LadderState, decide
from worker.governor.preferences import Preferences
from worker.governor.readings import Readings
from worker.governor.reasons import PauseReason
from worker.governor.rungs import GB

SEED = 5
STEP_S = 30.0
START = datetime(2026, 11, 30, 6, 0, tzinfo=UTC)  # a Monday; at midnight a new month begins
PICTURE = Path(__file__).parent.parent / "docs" / "household.svg"
PREFERENCES = Preferences(
    pause_when_user_active=True,
    user_idle_minutes=5.0,
    battery_min_percent=30.0,
    other_programs_max_percent=30.0,
    cpu_max_celsius=80.0,
    schedule=("20:00-17:00",),  # power is dear from five to eight
    monthly_traffic_gb=20.0,
)
SESSIONS = ((7.0, 8.2), (12.1, 13.0), (18.5, 22.2))  # somebody sits at it, in hours of the day
UNPLUGGED = ((9.0, 10.5),)
HOTSPOT = ((8.5, 8.9),)
USER_PAUSE = (15.0, 16.0)
BUSY = ((13.6, 14.1, 0.6), (2.0, 2.5, 0.45))  # a video is converted, a backup runs: from, to, share of the CPU
TRAFFIC_AT_START_GB = 16.9
TRAFFIC_BPS = 1.2e6  # of the worker, while it computes


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    hour: float  # since the start
    readings: Readings
    decision: Decision


class Household:
    """Makes up readings; what the worker does shows in temperature and traffic."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # a simulation
        self._idle_s = 3600.0
        self._battery_percent = 100.0
        self._cpu_celsius = 45.0
        self._traffic_bytes = TRAFFIC_AT_START_GB * GB
        self._month = START.month

    def step(self, local: datetime, computing: bool) -> Readings:
        """What the sensors say at `local`, when the worker computed (or not) for the last step."""
        hour = local.hour + local.minute / 60 + local.second / 3600
        unplugged = _within(hour, UNPLUGGED)
        used = _within(hour, SESSIONS)
        others = self._others_share(hour, used)
        self._idle_s = self._random.uniform(0, 90) if used else self._idle_s + STEP_S
        self._battery_percent += -0.27 if unplugged else 0.35
        self._battery_percent = min(max(self._battery_percent, 0.0), 100.0)
        room = 22.0 + (9.0 if 11.0 <= hour < 16.5 else 0.0)  # the sun is on the desk
        target = room + 18.0 + (35.0 if computing else 0.0) + 20.0 * others
        self._cpu_celsius += (target - self._cpu_celsius) * 0.12 + self._random.gauss(0.0, 0.6)
        if local.month != self._month:
            self._month, self._traffic_bytes = local.month, 0.0
        self._traffic_bytes += TRAFFIC_BPS / 8 * STEP_S * computing
        pause_end = local.replace(hour=0, minute=0, second=0) + timedelta(hours=USER_PAUSE[1])
        return Readings(
            user_pause_until_unix_s=pause_end.timestamp() if hour >= USER_PAUSE[0] else None,
            on_battery=unplugged,
            battery_percent=self._battery_percent,
            user_idle_s=self._idle_s,
            other_cpu_share=others,
            cpu_celsius=self._cpu_celsius,
            metered=_within(hour, HOTSPOT),
            traffic_bytes=int(self._traffic_bytes),
            free_memory_bytes=int(6 * GB),
            free_disk_bytes=int(80 * GB),
        )

    def _others_share(self, hour: float, used: bool) -> float:
        busy = next((share for start, end, share in BUSY if start <= hour < end), 0.0)
        return min(max(busy + (0.12 if used else 0.03) + self._random.gauss(0.0, 0.03), 0.0), 1.0)


def live_a_day(seed: int) -> list[Moment]:
    """24 hours in steps of 30 s."""
    household, state, computing = Household(seed), LadderState(), False
    moments = []
    for number in range(int(24 * 3600 / STEP_S)):
        local = START + timedelta(seconds=number * STEP_S)
        readings = household.step(local, computing)
        state, decision = decide(PREFERENCES, readings, state, local.timestamp(), local)
        computing = decision.reason is None
        moments.append(Moment(hour=number * STEP_S / 3600, readings=readings, decision=decision))
    return moments


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time in one state; `reason` None: it computes."""

    reason: PauseReason | None
    start_hour: float
    end_hour: float


def find_stretches(moments: Sequence[Moment]) -> list[Stretch]:
    """The states one after the other."""
    stretches: list[Stretch] = []
    for moment in moments:
        end = moment.hour + STEP_S / 3600
        if stretches and stretches[-1].reason == moment.decision.reason:
            stretches[-1] = Stretch(moment.decision.reason, stretches[-1].start_hour, end)
        else:
            stretches.append(Stretch(moment.decision.reason, moment.hour, end))
    return stretches


def main() -> None:
    options = parse_options(__doc__ or "")
    moments = live_a_day(SEED)
    stretches = find_stretches(moments)
    states: list[PauseReason | None] = [None, *PauseReason]
    hours = {s: sum(x.end_hour - x.start_hour for x in stretches if x.reason == s) for s in states}
    print(f"{'state':16} {'share of the day':>16} {'times':>6} {'shortest':>9}")
    for state in states:
        lengths = [x.end_hour - x.start_hour for x in stretches if x.reason == state]
        if lengths:
            shortest = f"{60 * min(lengths):.1f} min"
            print(f"{_name(state):16} {hours[state] / 24:16.1%} {len(lengths):6} {shortest:>9}")
    print(f"{len(stretches) - 1} switches in 24 h")
    figures: dict[str, Figure] = {f"{_name(state)}_share": round(hours[state] / 24, 4) for state in states}
    write_figures(options.json, figures | {"switches": len(stretches) - 1})
    if not options.quick:
        PICTURE.write_text(draw(moments, stretches), encoding="utf-8")
        print(f"wrote {PICTURE}")


# ---- the picture

WIDTH, LEFT, RIGHT, TOP = 820.0, 146.0, 44.0, 40.0
ROW, PANEL, GAP = 19.0, 56.0, 22.0
STYLE = """<style>
svg { font: 12px system-ui, sans-serif; --ink: #1f2328; --soft: #59636e; --grid: #d8dee4; --paper: #ffffff;
  --run: #1a7f37; --wait: #bc4c00; --line: #0969da; --limit: #cf222e }
@media (prefers-color-scheme: dark) { svg { --ink: #f0f6fc; --soft: #9198a1; --grid: #2f353d; --paper: #0d1117;
  --run: #3fb950; --wait: #f0883e; --line: #4493f8; --limit: #ff7b72 } }
text { fill: var(--ink) } .soft { fill: var(--soft); font-size: 11px } .title { font-weight: 600; font-size: 15px }
.grid { stroke: var(--grid) } .line { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round }
.limit { stroke: var(--limit); stroke-dasharray: 5 3 } .run { fill: var(--run) } .wait { fill: var(--wait) }
.paused { fill: var(--wait); opacity: .09 }
</style>"""


@dataclass(frozen=True, slots=True)
class Panel:
    """A reading over the day, with the preference that it is compared with."""

    name: str
    unit: str
    read: Callable[[Readings], float]
    limit: float
    low: float
    top: float


PANELS = (
    Panel("battery", "%", lambda r: r.battery_percent or 0.0, PREFERENCES.battery_min_percent, 0.0, 100.0),
    Panel(
        "last touched",
        "min ago",
        lambda r: min((r.user_idle_s or 0.0) / 60, 20.0),
        PREFERENCES.user_idle_minutes,
        0.0,
        20.0,
    ),
    Panel(
        "other programs",
        "% CPU",
        lambda r: 100 * (r.other_cpu_share or 0.0),
        PREFERENCES.other_programs_max_percent,
        0.0,
        80,
    ),
    Panel("CPU", "°C", lambda r: r.cpu_celsius or 0.0, PREFERENCES.cpu_max_celsius, 30.0, 90.0),
    Panel("month's traffic", "GB", lambda r: (r.traffic_bytes or 0) / GB, PREFERENCES.monthly_traffic_gb, 0.0, 20.0),
)


def draw(moments: Sequence[Moment], stretches: Sequence[Stretch]) -> str:
    """States above, readings below, over one axis of hours."""
    states = [s for s in [None, *PauseReason] if any(x.reason == s for x in stretches)]
    rows_end = TOP + len(states) * ROW
    bottom = rows_end + len(PANELS) * (PANEL + GAP) + 4
    body = [_text(LEFT, 20, "24 hours of a household: when the worker computes, and why not", "start", "title")]
    body += [_box("paused", x, TOP, bottom - TOP) for x in stretches if x.reason is not None]
    for hour in range(0, 25, 3):
        at = _x(hour)
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>')
        body.append(_text(at, bottom + 16, f"{(START.hour + hour) % 24:02d}:00", "middle", "soft"))
    for number, state in enumerate(states):
        y = TOP + number * ROW
        share = sum(x.end_hour - x.start_hour for x in stretches if x.reason == state) / 24
        body.append(_text(LEFT - 8, y + 14, _name(state).replace("_", " "), "end"))
        body.append(_text(WIDTH - RIGHT + 8, y + 14, f"{share:.0%}", "start", "soft"))
        colour = "run" if state is None else "wait"
        body += [_box(colour, x, y + 3, ROW - 6) for x in stretches if x.reason == state]
    for number, panel in enumerate(PANELS):
        body.append(_draw_panel(panel, moments, rows_end + GAP + number * (PANEL + GAP)))
    size = f'viewBox="0 0 {WIDTH:.0f} {bottom + 28:.0f}"'
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{STYLE}{paper}{"".join(body)}</svg>\n'


def _draw_panel(panel: Panel, moments: Sequence[Moment], top: float) -> str:
    def y(value: float) -> float:
        return top + PANEL * (panel.top - min(value, panel.top)) / (panel.top - panel.low)

    parts = [
        _text(LEFT - 36, top + PANEL / 2, panel.name, "end"),
        _text(LEFT - 36, top + PANEL / 2 + 14, panel.unit, "end", "soft"),
    ]
    for tick in nice_ticks(panel.low, panel.top, 2):
        if panel.low <= tick <= panel.top:
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
            parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end", "soft"))
    points = "L".join(f"{_x(m.hour):.1f},{y(panel.read(m.readings)):.1f}" for m in moments[::4])
    parts.append(f'<path class="line" d="M{points}"/>')
    parts.append(
        f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(panel.limit):.1f}" y2="{y(panel.limit):.1f}"/>'
    )
    parts.append(_text(WIDTH - RIGHT + 6, y(panel.limit) + 4, f"{panel.limit:g}", "start", "soft"))
    return "".join(parts)


def _box(kind: str, stretch: Stretch, y: float, height: float) -> str:
    left, right = _x(stretch.start_hour), _x(stretch.end_hour)
    return f'<rect class="{kind}" x="{left:.2f}" y="{y:.1f}" width="{right - left:.2f}" height="{height:.1f}"/>'


def _x(hour: float) -> float:
    return LEFT + hour / 24 * (WIDTH - LEFT - RIGHT)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _name(state: PauseReason | None) -> str:
    return "computing" if state is None else state.value


def _within(hour: float, stretches: Sequence[tuple[float, float]]) -> bool:
    return any(start <= hour < end for start, end in stretches)


if __name__ == "__main__":
    main()
