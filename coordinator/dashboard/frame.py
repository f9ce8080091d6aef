"""What stands around every page: the way to the others, who is signed in, and the verdict on the run.

Built once for a viewer; then only what changed is sent.
"""

from dataclasses import dataclass, field

from nicegui import ui

from coordinator.dashboard.board import Board, Updater
from coordinator.dashboard.elements import box, button, link, text
from coordinator.dashboard.snapshot import Snapshot

NAVIGATION = {
    "/": "Overview",
    "/loss": "Loss",
    "/rounds": "Rounds",
    "/peers": "Peers",
    "/incidents": "Incidents",
    "/ledger": "Ledger",
    "/communication": "Communication",
    "/coordinator": "Coordinator",
    "/cost": "Cost",
    "/export": "Export",
    "/join": "Join",
}
HEAD = '<link rel="stylesheet" href="/static/style.css"><script src="/static/page.js"></script>'
LINKS = {"/api/status": "status (JSON)", "/api/openapi.json": "API (OpenAPI)", "/metrics": "metrics (Prometheus)"}


@dataclass(slots=True, kw_only=True)
class Viewer:
    """One browser's look at one page."""

    board: Board
    session: str | None
    may_see_invite: bool
    snapshot: Snapshot
    updaters: list[Updater] = field(default_factory=list)

    def is_operator(self) -> bool:
        """Asked anew before each action: a session ends."""
        return self.board.access.is_operator(self.session)

    async def show(self, snapshot: Snapshot) -> None:
        """Bring the page up to date."""
        self.snapshot = snapshot
        for update in self.updaters:
            await update(snapshot)

    async def refresh(self) -> None:
        """At once, after the viewer did something."""
        await self.show(await self.board.read())


class Frame:
    """Header, verdict strip, the page's own part (`with frame.content:`), footer."""

    def __init__(self, viewer: Viewer, path: str, title: str) -> None:
        self._texts: dict[str, ui.label] = {}
        snapshot = viewer.snapshot
        ui.add_head_html(HEAD)
        self._build_header(viewer, path, snapshot)
        self._build_verdict(snapshot)
        self.content = box("div", "content").props("id=content tabindex=-1")
        with self.content:
            self.heading = text("h1", title)
        with box("div", "colophon"):
            with box("p"):
                text("span", "Ledger head ")
                self._changing("code", "ledger_head", snapshot)
            with box("p", "machine-readable"):
                for href, words in LINKS.items():
                    link(words, href)
        viewer.updaters.append(self.show)

    async def show(self, snapshot: Snapshot) -> None:
        """Elements whose text stays the same are not sent."""
        for name, label in self._texts.items():
            label.text = getattr(snapshot, name)
        self._verdict.classes(replace=f"verdict {snapshot.level}")
        if self._progress.props["value"] != snapshot.percent:
            self._progress.props["value"] = snapshot.percent

    def _build_header(self, viewer: Viewer, path: str, snapshot: Snapshot) -> None:
        with ui.header(fixed=False, wrap=False, add_scroll_padding=False).classes("top"):
            link("Skip to the page", "#content", "skip")
            with box("div", "banner"):
                link("manyhands", "/", "brand")
                text("span", snapshot.name, "run-name").props["title"] = f"run {snapshot.run_id}"
                with box("div", "tools"):
                    theme = button("Auto", "theme quiet").props('title="Colours: as the system prefers, light or dark"')
                    theme.on("click", js_handler="() => manyhands.nextTheme()")
                    if viewer.is_operator():
                        with box("form").props("method=post action=/sign-out"):
                            button("Sign out", "quiet").props("type=submit")
                    else:
                        link("Sign in", "/sign-in", "quiet")
            with box("nav").props('aria-label="Pages"'):
                for href, words in NAVIGATION.items():
                    anchor = link(words, href)
                    if href == path:
                        anchor.props["aria-current"] = "page"

    def _build_verdict(self, snapshot: Snapshot) -> None:
        with box("section", "verdict").props('aria-label="Verdict on the run"') as self._verdict:
            self._changing("p", "announcement", snapshot, "visually-hidden").props("role=status aria-live=polite")
            with box("div", "words"):
                with box("p", "headline"):
                    self._changing("strong", "level_words", snapshot, "level")
                    self._changing("span", "phase_words", snapshot, "phase muted")
                with box("p", "cause"):
                    self._changing("span", "cause", snapshot)
                    self._changing("span", "since", snapshot, "since muted")
                self._changing("p", "also", snapshot, "also muted")
            with box("dl", "pace"):
                with box("div"):
                    text("dt", "Round")
                    with box("dd"):
                        self._changing("span", "round", snapshot, "round")
                        self._changing("small", "clock", snapshot, "clock")
                for label, name in (("Last merge", "last_merge"), ("Tokens/s", "speed"), ("To go", "eta")):
                    with box("div"):
                        text("dt", label)
                        self._changing("dd", name, snapshot, name)
                with box("div", "wide"):
                    text("dt", "Tokens").props("id=tokens")
                    with box("dd"):
                        self._changing("span", "tokens", snapshot, "tokens")
                        self._changing("small", "percent_words", snapshot)
                        self._progress = box("progress").props("max=100 value=0 aria-labelledby=tokens")
            self._progress.props["value"] = snapshot.percent
        self._verdict.classes(replace=f"verdict {snapshot.level}")

    def _changing(self, tag: str, name: str, snapshot: Snapshot, classes: str = "") -> ui.label:
        """A text that follows the snapshot's field of that name."""
        self._texts[name] = text(tag, getattr(snapshot, name), classes)
        return self._texts[name]
