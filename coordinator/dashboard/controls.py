"""What the operator does on the pages. Whether the viewer is signed in is asked again at each action."""

from collections.abc import Mapping
from typing import Any

from nicegui import ui

from coordinator.dashboard.elements import box, button, section, text
from coordinator.dashboard.frame import Viewer
from coordinator.dashboard.snapshot import Snapshot
from protocol.errors import ManyhandsError

SIGNED_OUT = "You are signed out: sign in again to do this."
MAX_INVITE_HOURS = 24 * 365


async def perform(viewer: Viewer, verb: str, **options: Any) -> Mapping[str, Any] | None:
    """Do it, say what came of it, bring the page up to date. None when it was not done."""
    if not viewer.is_operator():
        tell(SIGNED_OUT, failed=True)
        return None
    try:
        answer = viewer.board.server.perform(verb, **options)
    except ManyhandsError as error:
        tell(str(error), failed=True)
        return None
    message = answer.get("message")
    if isinstance(message, str):
        tell(message)
    await viewer.refresh()
    return answer


def tell(words: str, *, failed: bool = False) -> None:
    """A line at the edge of the page, read aloud too."""
    ui.notify(
        words,
        type="negative" if failed else "positive",
        position="bottom",
        timeout=10_000 if failed else 6_000,
        close_button="Close",
        multi_line=True,
        classes="notice",
    )


async def confirm(question: str, consequence: str, verb: str, *, ask_reason: bool = False) -> str | None:
    """The reason (empty when none is asked for or given) once the operator agrees; None when not."""
    with ui.dialog().props("aria-labelledby=question") as dialog, box("div", "dialog"):
        text("h2", question).props("id=question")
        text("p", consequence)
        reason = ui.input("Reason (the worker is told)").props("outlined maxlength=200") if ask_reason else None
        with box("p", "buttons"):
            button(verb, "danger").on("click", lambda: dialog.submit(reason.value if reason is not None else ""))
            button("Cancel").on("click", lambda: dialog.submit(None))
    answer: str | None = await dialog
    dialog.delete()
    return answer


async def act_on_peer(viewer: Viewer, verb: str, peer: str) -> None:
    """Ban, unban or approve; a ban is asked about first."""
    name = next((one["name"] for one in viewer.snapshot.status["peers"] if one["peer"] == peer), "") or peer[-8:]
    if verb == "ban":
        consequence = (
            "Its connection ends, its lease goes back, and it cannot join again under this identity."
            " What was accepted from it stays."
        )
        reason = await confirm(f"Ban {name}?", consequence, "Ban", ask_reason=True)
        if reason is not None:
            await perform(viewer, "ban", peer=peer, reason=reason)
    else:
        await perform(viewer, verb, peer=peer)


class RunControls:
    """Pause or resume, and how long a round should take."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._is_paused = False
        with section("control", "Control the run", "control"):
            with box("p", "buttons"):
                self._pause = button("Pause the run")
                self._pause.on("click", self._toggle_pause)
                self._words = text("span", "", "muted")
            with box("p", "buttons form"):
                self._seconds = ui.number("Seconds a round should take", min=0, step=1)
                self._seconds.props("outlined dense").classes("long-label")
                button("Set the round time").on("click", self._set_round_time)
                self._round_time = text("span", "", "muted")
        viewer.updaters.append(self._show)

    async def _show(self, snapshot: Snapshot) -> None:
        status = snapshot.status
        self._is_paused = status["phase"] == "paused"
        self._pause.text = "Resume the run" if self._is_paused else "Pause the run"
        self._words.text = (
            "No round opens until you resume."
            if self._is_paused
            else "The open round is finished, then no other opens."
        )
        seconds = status["round_time_s"]
        self._round_time.text = (
            "As run.toml says now; from the next round on."
            if seconds is None
            else f"{seconds:g} s now; 0: as run.toml says."
        )

    async def _toggle_pause(self) -> None:
        if self._is_paused:
            await perform(self._viewer, "resume")
        elif (
            await confirm("Pause the run?", "No round opens until you resume it; all workers wait.", "Pause")
            is not None
        ):
            await perform(self._viewer, "pause")

    async def _set_round_time(self) -> None:
        if self._seconds.value is None:
            tell("Give the seconds first; 0: as run.toml says.", failed=True)
        else:
            await perform(self._viewer, "round-time", seconds=float(self._seconds.value))
