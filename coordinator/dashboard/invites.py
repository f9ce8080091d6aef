"""The operator's invites: issue one, see what became of the others, revoke."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import segno
from nicegui import ui

from coordinator.dashboard.controls import MAX_INVITE_HOURS, confirm, perform, tell
from coordinator.dashboard.data_table import Column, DataTable, Row, action, row
from coordinator.dashboard.elements import UNKNOWN, box, button, section, text
from coordinator.dashboard.frame import Viewer
from coordinator.dashboard.snapshot import Snapshot, describe_age
from coordinator.verdict import describe_span

MAX_LISTED = 50
COLUMNS = (
    Column("Invite", "mono"),
    Column("For"),
    Column("Issued"),
    Column("Valid"),
    Column("Joined", "number"),
    Column("Uses left", "number"),
    Column("Action", "acts"),
)


class InviteControls:
    """Only for whoever is signed in."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        with section("invites", "Invites", "control invites"):
            with box("p", "buttons form"):
                self._uses = ui.number("Machines", value=10, min=1, max=100_000, step=1, precision=0)
                self._hours = ui.number("Valid for hours", value=168, min=1, max=MAX_INVITE_HOURS, step=1)
                for field in (self._uses, self._hours):
                    field.props("outlined dense").classes("short")
                button("Issue an invite").on("click", self._issue)
            with box("div") as self._new:
                text("p", "Whoever has this invite can join. It is shown this once:")
                self._card = box("div")
            self._new.set_visibility(False)
            self._table = DataTable(COLUMNS, labelledby="invites", empty="No invite was issued yet.", on_act=self._act)
        viewer.updaters.append(self._show)

    async def _show(self, snapshot: Snapshot) -> None:
        if not self._viewer.is_operator():
            self._table.show([])
            return
        listed: Any = self._viewer.board.server.perform("invites")["invites"]
        self._table.show(describe_invites(listed, snapshot.now_unix_s))

    async def _issue(self) -> None:
        uses, hours = self._uses.value, self._hours.value
        if not uses or not hours:
            tell("Give the number of machines and the hours first.", failed=True)
            return
        answer = await perform(self._viewer, "invite", uses=int(uses), expires_hours=float(hours))
        if answer is not None:
            self._card.clear()
            with self._card:
                build_invite(str(answer["invite"]), "new")
            self._new.set_visibility(True)

    async def _act(self, _: str, invite: str) -> None:
        consequence = "Nobody new joins with it. Who has joined stays; ban keeps them out."
        if await confirm(f"Revoke the invite {invite[:8]}?", consequence, "Revoke") is not None:
            await perform(self._viewer, "revoke", invite=invite)


def describe_invites(invites: Sequence[Mapping[str, Any]], now_unix_s: float) -> list[Row]:
    rows = []
    for invite in invites[:MAX_LISTED]:
        ended = "revoked" if invite["revoked"] else "expired" if invite["expired"] else ""
        until, issued = invite["expires_unix_s"], invite["issued_unix_s"]
        rows.append(
            row(
                invite["id"],
                invite["id"][:8],
                invite["role"],
                describe_age(now_unix_s - issued) if issued else UNKNOWN,
                ended or (f"for {describe_span(until - now_unix_s)}" if until else UNKNOWN),
                f"{invite['joined']:,}",
                f"{invite['uses_left']:,} of {invite['uses']:,}" if invite["uses"] else f"{invite['uses_left']:,}",
                UNKNOWN if ended else action("Revoke", "revoke", f"Revoke the invite {invite['id'][:8]}"),
                css="gone" if ended else "",
            )
        )
    return rows


def build_invite(invite: str, name: str) -> None:
    """The command with the invite, and its QR code. `name` is part of the elements' classes."""
    with box("div", "invite-card"):
        with box("div"):
            with box("code", f"command {name}-command"):
                text("span", "manyhands worker start ")
                text("span", invite, f"invite {name}-invite")
            with box("p", "buttons"):
                for words, what in (("Copy command", "command"), ("Copy invite", "invite")):
                    copy = f"(event) => manyhands.copy('.{name}-{what}', event.target)"
                    button(words).on("click", js_handler=copy)
                text("span", "", "copied muted").props("role=status")
        drawing = ui.html(draw_qr_code(invite), sanitize=False).classes("qr")
        drawing.props('role=img aria-label="The invite as a QR code"')


def draw_qr_code(words: str) -> str:
    """An SVG of black on white, whatever the theme: scanners want it so."""
    drawing = io.BytesIO()
    code = segno.make(words, error="l", micro=False)
    code.save(drawing, kind="svg", xmldecl=False, svgns=True, omitsize=True, light="#ffffff", border=3)
    return drawing.getvalue().decode()
