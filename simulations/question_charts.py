"""The pictures of docs/every-phone-and-computer.md: SVG that reads on dark and on light, with labelled axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 52
STYLE = """<style>
svg { font: 13px system-ui, sans-serif; --ink: #1f2328; --soft: #59636e; --grid: #d1d9e0; --paper: #ffffff;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989 }
@media (prefers-color-scheme: dark) { svg { --ink: #f0f6fc; --soft: #9198a1; --grid: #3d444d; --paper: #0d1117;
  --c0: #4493f8; --c1: #f0883e; --c2: #3fb950; --c3: #ab7df8; --c4: #f778ba } }
text { fill: var(--ink) } .soft { fill: var(--soft) } .title { font-weight: 600; font-size: 15px }
</style>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One value for each x, and its range; infinite where there is none."""

    name: str
    values: Sequence[float]
    ranges: Sequence[tuple[float, float]] = ()


def log_lines(title: str, xs: Sequence[float], lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Lines over two logarithmic axes, their ranges as bands."""
    finite = [v for line in lines for v in (*line.values, *[e for r in line.ranges for e in r]) if v < float("inf")]
    low, high = floor(log10(min(finite))), ceil(log10(max(finite)))
    x_low, x_high = log10(xs[0]), log10(xs[-1])

    def x(value: float) -> float:
        return LEFT + (log10(value) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    body = [_grid(y(10.0**power), _power(power)) for power in range(low, high + 1)]
    body += [_text(x(value), HEIGHT - BOTTOM + 18, _power(round(log10(value))), "middle") for value in xs]
    labels = []
    for number, line in enumerate(lines):
        points = [(x(at), y(v)) for at, v in zip(xs, line.values, strict=True) if v < float("inf")]
        if line.ranges:
            edge = [(x(at), y(r[0]), y(r[1])) for at, r in zip(xs, line.ranges, strict=True) if r[1] < float("inf")]
            corners = [(a, b) for a, b, _ in edge] + [(a, c) for a, _, c in reversed(edge)]
            body.append(f'<polygon points="{_points(corners)}" style="fill: var(--c{number}); opacity: 0.12"/>')
        body.append(
            f'<polyline points="{_points(points)}" style="fill: none; stroke: var(--c{number}); stroke-width: 2"/>'
        )
        body += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" style="fill: var(--c{number})"/>' for a, b in points]
        labels.append((points[-1][1], f'<tspan style="fill: var(--c{number})">{escape(line.name)}</tspan>'))
    body += [_text(WIDTH - RIGHT + 10, at + 4, name) for at, name in _spread(labels)]
    return _frame(title, body, HEIGHT, x_label, y_label)


def stacked_bars(
    title: str, names: Sequence[str], parts: Sequence[Sequence[float]], part_names: Sequence[str], *, x_label: str
) -> str:
    """A bar for each name, divided by share."""
    height = TOP + 34 * len(names) + BOTTOM + 22
    body, inner = [], WIDTH - LEFT - 30
    for row, (name, values) in enumerate(zip(names, parts, strict=True)):
        at, total = float(LEFT), sum(values)
        top = TOP + 24 + 34 * row
        body.append(_text(LEFT - 8, top + 17, escape(name), "end"))
        for number, value in enumerate(values):
            width = inner * value / total
            body.append(
                f'<rect x="{at:.1f}" y="{top}" width="{width:.1f}" height="24" style="fill: var(--c{number})"/>'
            )
            if width > 44:
                share = f'<tspan style="fill: var(--paper)">{value / total:.0%}</tspan>'
                body.append(_text(at + width / 2, top + 17, share, "middle"))
            at += width
    at = float(LEFT)
    for number, name in enumerate(part_names):
        body.append(f'<rect x="{at:.1f}" y="{TOP - 4}" width="12" height="12" style="fill: var(--c{number})"/>')
        body.append(_text(at + 18, TOP + 7, escape(name)))
        at += 40 + 7.5 * len(name)
    body += [
        _text(LEFT + inner * share / 100, height - BOTTOM + 14, f"{share} %", "middle")
        for share in (0, 25, 50, 75, 100)
    ]
    return _frame(title, body, height, x_label, "")


def tornado(
    title: str, names: Sequence[str], ends: Sequence[tuple[float, float]], middle: float, *, x_label: str
) -> str:
    """For each assumption the values at both of its ends, on a logarithmic axis."""
    height, left = TOP + 34 * len(names) + BOTTOM, 250
    finite = [value for pair in ends for value in pair if value < float("inf")] + [middle]
    low, high = log10(min(finite)) - 0.1, log10(max(finite)) + 0.25

    def x(value: float) -> float:
        return left + (log10(value) - low) / (high - low) * (WIDTH - left - 40)

    body = []
    for row, (name, (less, more)) in enumerate(zip(names, ends, strict=True)):
        top = TOP + 6 + 34 * row
        start, end = sorted((x(less), x(min(more, 10.0**high))))
        body.append(_text(left - 10, top + 16, escape(name), "end"))
        body.append(
            f'<rect x="{start:.1f}" y="{top}" width="{max(end - start, 2):.1f}" height="22" style="fill: var(--c0)"/>'
        )
        body.append(_text(end + 6, top + 16, f"{show_days(min(less, more))} – {show_days(max(less, more))}"))  # noqa: RUF001
    at = x(middle)
    line = f'x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM + 2}"'
    body.append(f'<line {line} style="stroke: var(--ink); stroke-dasharray: 4 3"/>')
    body.append(_text(at, height - BOTTOM + 18, show_days(middle), "middle"))
    return _frame(title, body, height, x_label, "")


def show_days(days: float) -> str:
    """Days as people say them."""
    if days == float("inf"):
        return "never"
    if days < 1.0 / 24.0:
        return f"{days * 1440:.0f} min" if days * 1440 >= 1 else "1 min"
    if days < 2.0:
        return f"{days * 24:.1f} h" if days * 24 < 10 else f"{days * 24:.0f} h"
    return f"{days:.1f} d" if days < 10 else f"{days:,.0f} d"


def _frame(title: str, body: Sequence[str], height: int, x_label: str, y_label: str) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        STYLE,
        f'<rect width="{WIDTH}" height="{height}" style="fill: var(--paper)"/>',
        f'<text x="16" y="24" class="title">{escape(title)}</text>',
        *body,
        f'<text x="{WIDTH / 2:.0f}" y="{height - 10}" text-anchor="middle" class="soft">{escape(x_label)}</text>',
    ]
    if y_label:
        middle = (TOP + height - BOTTOM) / 2
        turn = f'transform="translate(18 {middle:.0f}) rotate(-90)"'
        parts.append(f'<text {turn} text-anchor="middle" class="soft">{escape(y_label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(at: float, label: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" style="stroke: var(--grid)"/>'
    return line + _text(LEFT - 8, at + 4, label, "end")


def _text(x: float, y: float, inner: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{inner}</text>'


def _power(power: int) -> str:
    return f"{10**power:,}" if 0 <= power <= 3 else f'10<tspan dy="-5" font-size="9">{power}</tspan>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _spread(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Labels at their height, or as far below as the one above needs."""
    placed: list[tuple[float, str]] = []
    for at, name in sorted(labels):
        placed.append((max(at, placed[-1][0] + 16) if placed else at, name))
    return placed
