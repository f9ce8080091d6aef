"""`/sign-in`: the form that takes the operator's token. dashboard/sign_in.py takes what it sends."""

from coordinator.dashboard.elements import box, button, section, text
from coordinator.dashboard.frame import Frame, Viewer


async def build(_: Frame, viewer: Viewer, *, wrong: bool) -> None:
    with section("sign-in", "Sign in as the operator"):
        if viewer.is_operator():
            text("p", "You are signed in.")
            return
        text("p", "The token is printed when the coordinator starts, and lies in the run folder as operator-token.")
        with box("form", "sign-in-form").props("method=post action=/sign-in"):
            text("label", "Token").props("for=token")
            field = box("input").props(
                "id=token name=token type=password autocomplete=current-password required maxlength=200"
            )
            button("Sign in", "primary").props("type=submit")
            if wrong:
                field.props("aria-invalid=true aria-describedby=wrong")
                words = "That is not the token, or there were too many tries: wait a minute then."
                text("p", words, "alarm").props("id=wrong role=alert")
