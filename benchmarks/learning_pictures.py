"""Two pictures of benchmarks.learning as SVG files: loss over a logarithmic axis of bytes or of virtual time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

WIDTH, HEIGHT = 820.0, 440.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 190.0, 16.0, 44.0
LABEL_HEIGHT = 15.0
STYLE = """<style>
svg { font: 12px system-ui, sans-serif; --ink: #1f2328; --soft: #59636e; --grid: #d8dee4; --paper: #ffffff;
  --ours: #1a7f37; --other: #0969da }
@media (prefers-color-scheme: dark) { svg { --ink: #f0f6fc; --soft: #9198a1; --grid: #2f353d; --paper: #0d1117;
  --ours: #3fb950; --other: #4493f8 } }
text { fill: var(--ink) } .soft { fill: var(--soft) } .grid { stroke: var(--grid) }
.level { stroke: var(--soft); stroke-dasharray: 5 3 }
.line { fill: none; stroke: var(--other); stroke-width: 1.5; stroke-linejoin: round } .line.ours { stroke: var(--ours) }
.dot { fill: var(--other) } .dot.ours { fill: var(--ours) } .tie { stroke: var(--soft); stroke-width: .6 }
</style>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One arm's end."""

    name: str
    x: float
    y: float
    ours: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One arm's course; its x are above 0."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ours: bool


def write_picture(
    path: Path,
    *,
    x_name: str,
    dots: Sequence[Dot] = (),
    lines: Sequence[Line] = (),
    levels: Sequence[tuple[str, float]] = (),
) -> None:
    """Write an SVG of losses in nats a token over a logarithmic x. levels: arms that send nothing, across it."""
    xs = [dot.x for dot in dots] + [x for line in lines for x in line.x]
    ys = [dot.y for dot in dots] + [line.y[-1] for line in lines] + [level for _, level in levels]
    axes = _Axes(xs, ys, top=max(ys) if dots else max(ys) + 0.6 * (max(ys) - min(ys)))
    body = [axes.draw(x_name)]
    for _, level in levels:
        body.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.y(level):.1f}" y2="{axes.y(level):.1f}"/>'
        )
    for line in lines:
        points = " ".join(
            f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True) if y <= axes.top
        )
        body.append(f'<polyline class="line{_ours(line.ours)}" points="{points}"/>')
    body += [
        f'<circle class="dot{_ours(dot.ours)}" cx="{axes.x(dot.x):.1f}" cy="{axes.y(dot.y):.1f}" r="4"/>'
        for dot in dots
    ]
    ends = [(axes.x(dot.x), axes.y(dot.y), dot.name) for dot in dots]
    ends += [(axes.x(line.x[-1]), axes.y(line.y[-1]), line.name) for line in lines]
    ends += [(WIDTH - RIGHT, axes.y(level), name) for name, level in levels]
    body += _label(ends)
    size = f'viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}"'
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{STYLE}{paper}{"".join(body)}</svg>\n'
    path.write_text(svg, encoding="utf-8")


class _Axes:
    """x is logarithmic over whole powers of ten, y linear."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], top: float) -> None:
        self._first, self._last = floor(log10(min(xs))), ceil(log10(max(xs)) + 1e-9)
        self._low, self.top = floor(min(ys) * 10) / 10, ceil(top * 10) / 10

    def x(self, value: float) -> float:
        share = (log10(value) - self._first) / (self._last - self._first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.top - value) / (self.top - self._low) * (HEIGHT - TOP - BOTTOM)

    def draw(self, x_name: str) -> str:
        parts = []
        for power in range(self._first, self._last + 1):
            at = self.x(10.0**power)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(_text(at, HEIGHT - BOTTOM + 16, f"{10.0**power:g}", "middle"))
        for tenth in range(round(self._low * 10), round(self.top * 10) + 1):
            at = self.y(tenth / 10)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(_text(LEFT - 8, at + 4, f"{tenth / 10:.1f}", "end"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_name, "middle"))
        turned = f'transform="translate(14,{HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle"'
        parts.append(f'<text class="soft" {turned}>held-out loss, nats a token</text>')
        return "".join(parts)


def _label(ends: Iterable[tuple[float, float, str]]) -> list[str]:
    """Names in a column at the right, in the order of the losses, each tied to its place."""
    ordered = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _ in ordered:
        places.append(max(y, places[-1] + LABEL_HEIGHT if places else TOP))
    lowest = HEIGHT - BOTTOM
    for number in reversed(range(len(places))):  # those that would stand below the axis, and who is in their way
        places[number] = lowest = min(places[number], lowest)
        lowest -= LABEL_HEIGHT
    parts = []
    for at, (x, y, name) in zip(places, ordered, strict=True):
        parts.append(f'<line class="tie" x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT + 10:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(WIDTH - RIGHT + 13, at + 4, name, "start"))
    return parts


def _ours(ours: bool) -> str:
    return " ours" if ours else ""


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="soft" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
