"""The page as one viewer's browser shows it: built once, then only what changed is sent.

Peers' names and words are hostile: they go to the browser as text, never as HTML.
"""

from dataclasses import astuple
from typing import Any

from nicegui import ui

from coordinator.dashboard.snapshot import PeerRow, Points, Snapshot
from coordinator.dashboard.style import CSS

COLUMNS = ("Name", "Role", "Status", "Doing", "Device", "Steps/s", "Tokens", "Accepted", "Refused")
LINKS = {"/api/status": "status (JSON)", "/api/rounds": "rounds (JSON)", "/metrics": "metrics (Prometheus)"}
COPY = """() => {
  const text = document.querySelector(%r).textContent;
  const say = (words) => { document.querySelector(".copied").textContent = words; };
  navigator.clipboard.writeText(text).then(() => say("Copied."), () => say("Copying failed: select it by hand."));
}"""


class View:
    """The elements of one viewer's page."""

    def __init__(self, snapshot: Snapshot, title: str, subtitle: str, invite: str | None) -> None:
        self._texts: dict[str, ui.label] = {}
        self._curves: tuple[Points, Points] = ((), ())
        self._peers: tuple[PeerRow, ...] = ()
        self._cells: list[list[ui.label]] = []
        ui.add_head_html(f"<style>{CSS}</style>")
        with _box("header"):
            _text("h1", title)
            _text("p", subtitle, "muted")
        self._build_verdict(snapshot)
        self._build_loss(snapshot)
        with _section("peers"):
            self._changing("h2", "peers_heading", snapshot).props("id=peers")
            # Roles are spelt out: on a phone the style sheet lays rows out as cards, which would take them away.
            with _box("table").props("role=table aria-labelledby=peers"):
                with _box("thead").props("role=rowgroup"), _box("tr").props("role=row"):
                    for column in COLUMNS:
                        _text("th", column).props("role=columnheader scope=col")
                self._rows = _box("tbody").props("role=rowgroup")
            self._changing("p", "peers_note", snapshot, "muted")
        _build_invite(invite)
        with _box("footer"):
            with _box("p"):
                _text("span", "Ledger head ")
                self._changing("code", "ledger_head", snapshot)
            with _box("nav").props('aria-label="Machine-readable"'):
                for path, words in LINKS.items():
                    _text("a", words).props(f"href={path}")
        self.show(snapshot)

    def show(self, snapshot: Snapshot) -> None:
        """Bring the page up to date. Elements whose text stays the same are not sent."""
        for name, label in self._texts.items():
            label.text = getattr(snapshot, name)
        self._verdict.classes(replace=f"verdict {snapshot.level}")
        if self._progress.props["value"] != snapshot.percent:
            self._progress.props["value"] = snapshot.percent
        if self._curves != (snapshot.train, snapshot.held_out):
            self._curves = (snapshot.train, snapshot.held_out)
            for series, points in zip(self._chart.options["series"], self._curves, strict=True):
                series["data"] = points
            self._chart.update()
        self._show_peers(snapshot.peers)

    def _build_verdict(self, snapshot: Snapshot) -> None:
        with _section("verdict") as self._verdict:
            _text("h2", "Verdict", "visually-hidden").props("id=verdict")
            self._changing("p", "announcement", snapshot, "visually-hidden").props("role=status aria-live=polite")
            with _box("p").classes("headline"):
                self._changing("strong", "level_words", snapshot, "level")
                self._changing("span", "phase_words", snapshot, "phase muted")
            with _box("p").classes("cause"):
                self._changing("span", "cause", snapshot)
                self._changing("span", "since", snapshot, "since muted")
            self._changing("p", "also", snapshot, "also muted")
            with _box("dl"):
                with _box("div"):
                    _text("dt", "Round")
                    with _box("dd"):
                        self._changing("span", "round", snapshot, "round")
                        self._changing("span", "clock", snapshot, "clock muted")
                for label, name in (("Last merge", "last_merge"), ("Tokens/s", "speed"), ("To go", "eta")):
                    with _box("div"):
                        _text("dt", label)
                        self._changing("dd", name, snapshot, name)
                with _box("div").classes("wide"):
                    _text("dt", "Tokens").props("id=tokens")
                    with _box("dd"):
                        self._changing("span", "tokens", snapshot, "tokens")
                        self._changing("span", "percent_words", snapshot, "muted")
                        self._progress = _box("progress").props("max=100 value=0 aria-labelledby=tokens")

    def _build_loss(self, snapshot: Snapshot) -> None:
        with _section("loss"):
            _text("h2", "Loss").props("id=loss")
            with _box("p").classes("legend"):
                for words, name in (("Train ", "train_loss"), ("Held-out ", "held_out_loss")):
                    with _box("span").classes(name):
                        _text("span", words)
                        self._changing("strong", name, snapshot)
            self._chart = ui.echart(_chart_options(), renderer="svg")
            self._chart.props('role=img aria-label="Loss against tokens; the latest values stand above"')

    def _show_peers(self, peers: tuple[PeerRow, ...]) -> None:
        if peers == self._peers:
            return
        if [_identify(peer) for peer in peers] != [_identify(peer) for peer in self._peers]:
            self._rows.clear()
            with self._rows:
                self._cells = [_build_row(peer) for peer in peers]
        for cells, peer in zip(self._cells, peers, strict=True):
            for cell, value in zip(cells, astuple(peer), strict=True):
                cell.text = value
        self._peers = peers

    def _changing(self, tag: str, name: str, snapshot: Snapshot, classes: str = "") -> ui.label:
        """A text that follows the snapshot's field of that name."""
        self._texts[name] = _text(tag, getattr(snapshot, name), classes)
        return self._texts[name]


def _identify(peer: PeerRow) -> tuple[str, bool]:
    """Rows are built again when these change, or their order."""
    return peer.name, peer.status == "gone"


def _build_row(peer: PeerRow) -> list[ui.label]:
    with _box("tr").props("role=row").classes("gone" if peer.status == "gone" else ""):
        name = _text("th", "").props("role=rowheader scope=row")
        return [name, *(_text("td", "").props(f'role=cell data-label="{column}"') for column in COLUMNS[1:])]


def _build_invite(invite: str | None) -> None:
    with _section("join"):
        _text("h2", "Join").props("id=join")
        if invite is None:
            _text("p", "Ask the operator for an invite. The operator gets one with:")
            _text("code", "manyhands coordinator invite", "command")
            return
        _text("p", "Whoever has this invite can join. On the other machine:")
        with _box("code").classes("command"):
            _text("span", "manyhands worker start ")
            _text("span", invite, "invite")
        with _box("p").classes("buttons"):
            _text("button", "Copy command").props("type=button").on("click", js_handler=COPY % ".command")
            _text("button", "Copy invite").props("type=button").on("click", js_handler=COPY % ".invite")
            _text("span", "", "copied muted").props("role=status")


def _section(name: str) -> ui.element:
    return _box("section").classes(name).props(f"aria-labelledby={name}")


def _box(tag: str) -> ui.element:
    return ui.element(tag)


def _text(tag: str, words: str, classes: str = "") -> ui.label:
    label = ui.label(words).classes(classes)
    label.tag = tag
    return label


def _chart_options() -> dict[str, Any]:
    """Colours of text are the style sheet's: the chart is SVG, so that it follows the system's preference by itself."""
    line: dict[str, Any] = {"type": "line", "showSymbol": False, "data": []}
    grid_lines = {"splitLine": {"lineStyle": {"color": "#8883"}}, "axisLine": {"lineStyle": {"color": "#8886"}}}
    return {
        "animation": False,
        "grid": {"left": 8, "right": 24, "top": 12, "bottom": 28, "containLabel": True},
        "tooltip": {"trigger": "axis", "className": "tooltip", "confine": True},
        "xAxis": {"type": "value", "name": "tokens", "nameLocation": "middle", "nameGap": 26, "max": "dataMax"}
        | grid_lines
        | {"axisLabel": {"hideOverlap": True, "showMaxLabel": False}},
        "yAxis": {"type": "value", "scale": True} | grid_lines,
        "series": [
            {**line, "name": "train", "color": "#3b82f6"},
            {**line, "name": "held-out", "color": "#f97316", "showSymbol": True, "symbol": "circle", "symbolSize": 5},
        ],
    }
