"""A round as a waterfall: who computed, sent and merged when, with the straggler standing out."""

from collections.abc import Sequence
from typing import Any

from coordinator.dashboard.charts import BLUE, GREEN, GREY, ORANGE, Chart, axis, options
from coordinator.dashboard.data_table import Column, DataTable, Row, linked, row, titled
from coordinator.dashboard.elements import UNKNOWN, box, count, describe_bytes, number, peer_path, text
from coordinator.records.views import Bar, Waterfall

MAX_BARS = 40
PARTS = (("compute", BLUE), ("send", ORANGE), ("merge", GREEN))
COLUMNS = (
    Column("Worker"),
    Column("Result", "wide"),
    Column("Compute", "number"),
    Column("Send and check", "number"),
    Column("Merge", "number"),
    Column("Steps", "number"),
    Column("Tokens", "number"),
    Column("Payload", "number"),
)
RESULTS = {"open": "computes", "committed": "sends", "aside": "not its turn", "away": "left", "expired": "nothing came"}


class WaterfallView:
    """The chart of a round and, below it, its numbers."""

    def __init__(self, name: str, *, with_numbers: bool = True) -> None:
        self._shown: Waterfall | None = None
        self._is_new = True
        self.words = text("p", "", "muted")
        with box("p", "legend"):
            for part, _ in PARTS:
                text("span", {"send": "send and check"}.get(part, part), part)
        with box("div") as self._place:
            hidden = {"type": "bar", "stack": "round", "itemStyle": {"color": "transparent"}, "data": []}
            parts = [{"type": "bar", "stack": "round", "name": part, "color": color} for part, color in PARTS]
            y = {"type": "category", "inverse": True, "data": [], "axisTick": {"show": False}}
            chart_options = options(axis("seconds", min=0), y, [hidden | {"silent": True, "name": "start"}, *parts])
            chart_options["tooltip"] |= {"trigger": "item", "formatter": "{b}: {a} {c} s"}
            chart_options["xAxis"]["axisLine"] = {"show": False}
            label = "Who computed, sent and merged when in this round" + ("; the table has the numbers" * with_numbers)
            self._chart = Chart("round", label, chart_options, can_be_saved=with_numbers)
        self._table = DataTable(COLUMNS, labelledby=name, empty="") if with_numbers else None

    def show(self, waterfall: Waterfall | None, now_unix_s: float) -> None:
        """Draw it; an open round up to `now_unix_s`."""
        self._place.set_visibility(waterfall is not None)
        if waterfall is None:
            self.words.text = "No round was opened yet. The first one appears here while it runs."
            return
        is_open = waterfall.closed_unix_s is None
        end_s = now_unix_s if is_open else None
        if waterfall == self._shown and not is_open:
            return
        self._shown = waterfall
        self.words.text = _describe(waterfall, now_unix_s)
        bars = select_bars(waterfall)
        self._draw(waterfall, bars, end_s)
        if self._table is not None:
            self._table.show([_describe_bar(bar, waterfall) for bar in bars])

    def _draw(self, waterfall: Waterfall, bars: Sequence[Bar], end_s: float | None) -> None:
        spans = [cut(bar, waterfall, end_s) for bar in bars]
        marked = [bar.peer == waterfall.straggler for bar in bars]
        self._chart.options["yAxis"]["data"] = [
            _label(bar, is_marked) for bar, is_marked in zip(bars, marked, strict=True)
        ]
        height = f"{60 + 26 * len(bars)}px"
        if self._chart.element.style.get("height") != height:
            self._chart.element.style(f"height: {height}")
        series: list[list[Any]] = [[span[index] for span in spans] for index in range(4)]
        for part in series[1:]:
            for place, is_marked in enumerate(marked):
                if is_marked:
                    part[place] = {"value": part[place], "itemStyle": {"borderColor": "#d6336c", "borderWidth": 2}}
                elif bars[place].result in ("refused", "late", "expired", "void", "away", "returned"):
                    part[place] = {"value": part[place], "itemStyle": {"color": GREY}}
        self._chart.show(*series, news=(waterfall, series))


def select_bars(waterfall: Waterfall) -> list[Bar]:
    """At most MAX_BARS: the straggler and what went wrong first, then those that took longest."""

    def key(bar: Bar) -> tuple[bool, bool, float]:
        end = bar.merged_unix_s or bar.checked_unix_s or bar.committed_unix_s or float("inf")
        return bar.peer != waterfall.straggler, bar.result in ("accepted", "open", "committed", "aside"), -end

    return sorted(waterfall.bars, key=key)[:MAX_BARS]


def cut(bar: Bar, waterfall: Waterfall, now_unix_s: float | None = None) -> tuple[float, float, float, float]:
    """Seconds before it began, of computing, of sending and checking, of merging; `now_unix_s` ends what goes on."""
    closed = waterfall.closed_unix_s
    until = now_unix_s if closed is None else closed
    committed = bar.committed_unix_s
    computed_until = committed if committed is not None else until or bar.leased_unix_s
    checked = bar.checked_unix_s if bar.checked_unix_s is not None else (until or computed_until)
    start = bar.leased_unix_s - waterfall.opened_unix_s
    compute = computed_until - bar.leased_unix_s
    if committed is not None and bar.compute_s is not None:
        compute = min(compute, bar.compute_s)
    send = max(0.0, checked - bar.leased_unix_s - compute) if committed is not None else 0.0
    merge = bar.merged_unix_s - closed if bar.merged_unix_s is not None and closed is not None else 0.0
    return tuple(round(max(0.0, span), 2) for span in (start, compute, send, merge))  # type: ignore[return-value] # four


def _describe(waterfall: Waterfall, now_unix_s: float) -> str:
    workers = len({bar.peer for bar in waterfall.bars})
    end_s = now_unix_s if waterfall.closed_unix_s is None else waterfall.closed_unix_s
    state = "open for" if waterfall.closed_unix_s is None else "took"
    words = f"Round {waterfall.round:,} {state} {end_s - waterfall.opened_unix_s:.1f} s, {count(workers, 'worker')}"
    names = [bar.name or bar.peer[-8:] for bar in waterfall.bars if bar.peer == waterfall.straggler]
    words += f"; it waited for {names[0]}" if names else ""
    shown = min(MAX_BARS, len(waterfall.bars))
    return words + (
        "." if shown == len(waterfall.bars) else f". The {shown} slowest of {len(waterfall.bars):,} leases:"
    )


def _label(bar: Bar, is_straggler: bool) -> str:
    name = bar.name or bar.peer[-8:]
    name = name if len(name) <= 16 else f"{name[:15]}…"
    return f"▸ {name}" if is_straggler else name


def _describe_bar(bar: Bar, waterfall: Waterfall) -> Row:
    _, compute, send, merge = cut(bar, waterfall)
    is_straggler = bar.peer == waterfall.straggler
    result = RESULTS.get(bar.result, bar.result)
    return row(
        str(bar.lease_id),
        linked(bar.name or bar.peer[-8:], peer_path(bar.peer), "straggler" if is_straggler else ""),
        titled(f"{result}: {bar.reason}" if bar.reason else result, bar.reason, f"result-{bar.result}"),
        number(compute, ".1f", " s") if bar.committed_unix_s is not None else UNKNOWN,
        number(send, ".1f", " s") if bar.checked_unix_s is not None else UNKNOWN,
        number(merge, ".1f", " s") if bar.merged_unix_s is not None else UNKNOWN,
        f"{bar.inner_steps:,}" if bar.inner_steps else UNKNOWN,
        f"{bar.tokens:,}" if bar.tokens else UNKNOWN,
        describe_bytes(bar.payload_bytes) if bar.payload_bytes else UNKNOWN,
        css="straggler" if is_straggler else "",
    )
