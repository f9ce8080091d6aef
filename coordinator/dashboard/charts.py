"""Charts as ECharts in SVG: their texts take the style sheet's colours, so that they follow dark and light."""

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from coordinator.dashboard.elements import box, button, text

BLUE, ORANGE, GREEN, GREY, VIOLET = "#3b82f6", "#f97316", "#10a37f", "#8a94a3", "#8b5cf6"
GRID_LINES = {"splitLine": {"lineStyle": {"color": "#8883"}}, "axisLine": {"lineStyle": {"color": "#8886"}}}
Points = Sequence[tuple[float, float]]


def axis(name: str, **options: Any) -> dict[str, Any]:
    """A number's axis, named in the middle below it."""
    labels = {"axisLabel": {"hideOverlap": True}}
    return {"type": "value", "name": name, "nameLocation": "middle", "nameGap": 26, **GRID_LINES, **labels, **options}


def options(x: Mapping[str, Any], y: Mapping[str, Any], series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "animation": False,
        "grid": {"left": 8, "right": 24, "top": 14, "bottom": 28, "containLabel": True},
        "tooltip": {"trigger": "axis", "className": "tooltip", "confine": True},
        "xAxis": dict(x),
        "yAxis": dict(y),
        "series": [dict(one) for one in series],
    }


def line(name: str, color: str, **more: Any) -> dict[str, Any]:
    return {"type": "line", "name": name, "color": color, "showSymbol": False, "data": [], **more}


class Chart:
    """A chart of series; `show` sends it only when there is news."""

    def __init__(self, name: str, label: str, chart_options: dict[str, Any], *, can_be_saved: bool = True) -> None:
        """`name`: of the file that it can be saved as; `label`: what screen readers say."""
        self._shown: Any = None
        self.element = ui.echart(chart_options, renderer="svg")
        self.element.props["role"] = "img"
        self.element.props["aria-label"] = label
        if not can_be_saved:
            return
        with box("p", "buttons save"):
            for kind in ("SVG", "PNG"):
                save = button(f"Save as {kind}", "quiet")
                save.on("click", js_handler=f"(event) => manyhands.saveChart(event.target, '{name}', '{kind.lower()}')")

    @property
    def options(self) -> dict[str, Any]:
        chart_options: dict[str, Any] = self.element.options
        return chart_options

    def show(self, *series: Any, news: Any) -> None:
        """Give each series its data; nothing is sent while `news` stays the same."""
        if news == self._shown:
            return
        self._shown = news
        for one, data in zip(self.options["series"], series, strict=False):
            one["data"] = data
        self.element.update()


class LossChart:
    """Train and held-out loss against tokens or hours, with marks for what happened."""

    def __init__(self, *, can_be_saved: bool = True) -> None:
        self.by_time = False
        self._shown: Any = None
        earlier = {"lineStyle": {"type": "dashed", "width": 1.5}}
        series = [
            line("train", BLUE),
            line("held-out", ORANGE, showSymbol=True, symbol="circle", symbolSize=5),
            line("earlier run, train", GREY, **earlier),
            line("earlier run, held-out", VIOLET, **earlier),
        ]
        label = "Loss against tokens; the latest values stand above"
        x = axis("tokens", max="dataMax", axisLabel={"hideOverlap": True, "showMaxLabel": False})
        chart_options = options(x, axis("", scale=True), series)
        self._empty = text("p", "No round is merged yet: the curves begin with the first.", "empty")
        with box("div") as self._place:
            self._chart = Chart("loss", label, chart_options, can_be_saved=can_be_saved)

    def show(
        self, train: Points, held_out: Points, marks: Sequence[tuple[float, str]] = (), earlier: Sequence[Points] = ()
    ) -> None:
        """`marks`: where on the axis, and the words of the tooltip."""
        ends = [(len(points), points[-1]) for points in (train, held_out, *earlier) if points]
        news = (self.by_time, ends, list(marks))  # curves grow at their end, also where they are thinned out
        if news == self._shown:
            return
        self._shown = news
        self._empty.set_visibility(not train)
        self._place.set_visibility(bool(train))
        self._chart.options["series"][0]["showSymbol"] = len(train) == 1
        rounded = [[(x, round(y, 4)) for x, y in points] for points in (train, held_out, *earlier)]
        self._chart.options["xAxis"]["name"] = "hours since the first merge" if self.by_time else "tokens"
        self._chart.options["series"][0]["markLine"] = _mark(marks)
        while len(rounded) < 4:
            rounded.append([])
        self._chart.show(*rounded, news=news)


def _mark(marks: Sequence[tuple[float, str]]) -> dict[str, Any]:
    return {
        "symbol": ["none", "circle"],
        "symbolSize": 6,
        "animation": False,
        "lineStyle": {"type": "dotted", "color": "#8889"},
        "label": {"show": False},
        "tooltip": {"show": True, "trigger": "item", "formatter": "{b}"},
        "data": [{"xAxis": x, "name": words} for x, words in marks],
    }
