"""Charts as inline SVG: lines, stacked areas, spans and bars. Colours are CSS classes: dark and light both work.

Every chart is 720 wide in its own units and scales with its card. Text is escaped here, nowhere else.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 14.0, 10.0, 34.0
NUM_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line or area; `colour` is a class of the style sheet, c1 to c7. A y of None is a gap."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A bar of a waterfall: its row and its parts (start, end, colour, name)."""

    label: str
    parts: Sequence[tuple[float, float, str, str]]


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = NUM_TICKS) -> list[float]:
    """About `count` round numbers that cover low to high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 1.2 k, 3.4 M."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}" if limit > 1e4 else f"{value / 1e3:.3g} k"
    return f"{value:.4g}"


def line_chart(series: Sequence[Series], *, x_name: str, y_name: str, shade: Sequence[tuple[float, float]] = ()) -> str:
    """Lines over one axis; `shade`: stretches of x that are marked, such as outages."""
    values = [y for one in series for y in one.y if y is not None]
    xs = [x for one in series for x in one.x]
    if not values:
        return _nothing()
    zero = min(values) >= 0.0 and min(values) < 0.5 * max(values)
    ticks = nice_ticks(0.0 if zero else min(values), max(values))
    x, y = _x_scale(xs), _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    body = [_shade(shade, x), _axes(x, y, ticks, x_name, y_name)]
    for one in series:
        points = [(x(a), y(b)) for a, b in zip(one.x, one.y, strict=True) if b is not None]
        path = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points)
        body.append(f'<path class="line {one.colour}" d="{path}"/>')
        if one.dots:
            body += [f'<circle class="dot {one.colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
    return _svg(body, _hover(series, x))


def area_chart(series: Sequence[Series], *, x_name: str, y_name: str, shade: Sequence[tuple[float, float]] = ()) -> str:
    """Areas stacked on each other, the first one below; all have the same x."""
    if not series or not series[0].x:
        return _nothing()
    xs = series[0].x
    top = max(sum(one.y[index] or 0.0 for one in series) for index in range(len(xs)))
    ticks = nice_ticks(0.0, max(top, 1e-9))
    x, y = _x_scale(xs), _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    body, below = [], [0.0] * len(xs)
    for one in series:
        above = [low + (value or 0.0) for low, value in zip(below, one.y, strict=True)]
        upper = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, above, strict=True)]
        lower = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, below, strict=True)]
        body.append(f'<path class="area {one.colour}" d="M{"L".join(upper)}L{"L".join(reversed(lower))}Z"/>')
        below = above
    return _svg([*body, _shade(shade, x), _axes(x, y, ticks, x_name, y_name)], _hover(series, x))


def waterfall(spans: Sequence[Span], *, x_name: str) -> str:
    """One row a span, in order from the top."""
    if not spans:
        return _nothing()
    row, gap = 14.0, 4.0
    height = TOP + len(spans) * (row + gap) + BOTTOM
    edges = [edge for span in spans for part in span.parts for edge in part[:2]]
    ticks = nice_ticks(min(edges), max(edges))
    x = _Scale(min(edges), max(edges), LEFT, WIDTH - RIGHT)
    body = []
    for tick in ticks:
        if min(edges) <= tick <= max(edges):
            at = x(tick)
            body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM:.1f}"/>')
            body.append(_text(at, height - BOTTOM + 14, short(tick), "middle"))
    for number, span in enumerate(spans):
        y = TOP + number * (row + gap)
        body.append(_text(LEFT - 8, y + row - 3, span.label, "end"))
        for start, end, colour, name in span.parts:
            width = max(x(end) - x(start), 0.5)
            tip = f"<title>{escape(name)}</title>"
            box = f'x="{x(start):.1f}" y="{y:.1f}" width="{width:.1f}" height="{row}"'
            body.append(f'<rect class="bar {colour}" rx="2" {box}>{tip}</rect>')
    body.append(_text((LEFT + WIDTH) / 2, height - 4, x_name, "middle"))
    return _svg(body, "", height)


def share_bars(rows: Sequence[tuple[str, Sequence[tuple[float, str, str]]]]) -> str:
    """Rows of two or more thin bars as shares of 1: (label, [(share, colour, what)])."""
    if not rows:
        return _nothing()
    bar, gap, left = 11.0, 14.0, 130.0
    body, y = [], TOP
    for label, bars in rows:
        body.append(_text(left - 8, y + len(bars) * bar / 2 + 4, label, "end"))
        for share, colour, what in bars:
            width = max((WIDTH - RIGHT - left - 60) * share, 1.0)
            box = f'x="{left}" y="{y:.1f}" width="{width:.1f}" height="{bar - 1}"'
            body.append(f'<rect class="bar {colour}" rx="2" {box}><title>{escape(what)}</title></rect>')
            body.append(_text(left + width + 6, y + bar - 2, f"{share:.1%}", "start"))
            y += bar
        y += gap
    return _svg(body, "", y)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(name, colour) as a row above a chart."""
    items = "".join(f'<span><i class="{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<div class="legend">{items}</div>'


def _x_scale(xs: Sequence[float]) -> _Scale:
    return _Scale(min(0.0, min(xs)), max(max(xs), 1e-9), LEFT, WIDTH - RIGHT)


def _axes(x: _Scale, y: _Scale, ticks: Sequence[float], x_name: str, y_name: str) -> str:
    parts = []
    for tick in ticks:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 8, at + 4, short(tick), "end"))
    inside = [tick for tick in nice_ticks(x.low, x.high, 8) if x.low <= tick <= x.high]
    parts += [_text(x(tick), HEIGHT - BOTTOM + 16, short(tick), "middle") for tick in inside]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 3, x_name, "middle"))
    parts.append(f'<text class="name" transform="translate(12,{HEIGHT / 2:.0f}) rotate(-90)">{escape(y_name)}</text>')
    return "".join(parts)


def _shade(stretches: Sequence[tuple[float, float]], x: _Scale) -> str:
    boxes = []
    for start, end in stretches:
        left, right = x(max(start, x.low)), x(min(end, x.high))
        if right > left:
            box = f'x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" height="{HEIGHT - TOP - BOTTOM}"'
            boxes.append(f'<rect class="fault" {box}><title>fault</title></rect>')
    return "".join(boxes)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _hover(series: Sequence[Series], x: _Scale) -> str:
    """What the page's script shows under the pointer."""
    data = {
        "low": x.low,
        "high": x.high,
        "start": x.start,
        "end": x.end,
        "series": [{"name": one.name, "x": list(one.x), "y": list(one.y)} for one in series],
    }
    return f' data-hover="{escape(json.dumps(data), quote=True)}"'


def _svg(body: Sequence[str], attributes: str, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img"{attributes}>{"".join(body)}</svg>'


def _nothing() -> str:
    return '<p class="muted">nothing to show</p>'
