"""`/join`, for volunteers: what will be computed, by whom, within which limits, and how to begin."""

from coordinator.dashboard.elements import UNKNOWN, Facts, box, describe_bytes, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.invites import build_invite
from coordinator.dashboard.snapshot import Snapshot
from coordinator.verdict import describe_span
from protocol.run_spec import RunSpec

BYTES_A_PARAMETER = 4
LIMITS = (
    "It computes with what others leave over; it pauses on battery, on metered links, when hot or short of room.",
    "Every limit is yours to set, also while it runs; manyhands worker settings lists them.",
    "No code comes over the wire: only what is installed on your machine runs.",
    "It opens no port that others must reach. The connection is encrypted; the invite pins the coordinator's key.",
    "Ctrl-C hands back what is not finished.",
    "The name that you choose and your device's description are public on these pages.",
)
FACTS = {
    "model": "Model",
    "goal": "Trained on",
    "left": "To go",
    "download": "Download at the start",
    "round": "A round takes about",
    "upload": "Sent a round, on average",
    "steps": "Work a round",
    "workers": "Workers now",
}


async def build(_: Frame, viewer: Viewer) -> None:
    board = viewer.board
    server, spec = board.server, board.server.run.spec
    with section("invite", "Join this run"):
        if server.spec.invite.approval:
            text("p", "The operator approves each new worker: yours waits for that after it has joined.")
        if viewer.may_see_invite and server.invite:
            text("p", "Whoever has this invite can join. On the other machine, with manyhands installed:")
            build_invite(server.invite, "run")
        elif viewer.is_operator():
            text("p", "No invite is announced now. The Coordinator page issues one.")
        else:
            text(
                "p",
                "Ask the operator of this run for an invite, a line that begins with mh1., and then:",
            )
            text("code", "manyhands worker start mh1.…", "command")
        text("p", "What your machine can do, and what is in the way, before you begin:", "muted")
        text("code", "manyhands worker doctor mh1.…", "command")
    with section("what", "What is computed"):
        text("p", describe_work(spec))
        facts = Facts(FACTS, "facts")
    with section("who", "By whom"):
        text("p", "The run is signed with this key; your worker takes instructions from nobody else.", "muted")
        identity = Facts({"run": "Run", "address": "Coordinator", "id": "Run id", "key": "Public key"}, "facts long")
        identity.show(run=spec.name, address=server.address, id=server.run.run_id, key=server.identity.public_key.hex())
    with section("limits", "Within which limits"), box("ul"):
        for words in LIMITS:
            text("li", words)

    async def show(snapshot: Snapshot) -> None:
        status = snapshot.status
        seconds = status["round_seconds"]
        facts.show(
            model=f"{spec.model.architecture}, {server.run.num_parameters:,} parameters",
            goal=snapshot.tokens + " tokens",
            left=snapshot.eta,
            download=describe_bytes(BYTES_A_PARAMETER * server.run.num_parameters),
            round=UNKNOWN if seconds is None else describe_span(max(1.0, seconds)),
            upload=describe_upload(board.history.payload_bytes, board.history.contributions),
            steps=f"{spec.round.inner_steps} inner steps of {spec.step_tokens:,} tokens",
            workers=f"{status['workers']:,}",
        )

    viewer.updaters.append(show)


def describe_work(spec: RunSpec) -> str:
    """One sentence; of the text's place only what is no path of the operator's machine."""
    source = spec.data.source.rstrip("/").rsplit("/", 1)[-1] or spec.data.source
    text_words = "Python's own sources" if source == "stdlib" else f"text ({source})"
    return (
        f"A language model ({spec.model.architecture}) learns from {text_words}. Each round your worker gets a few"
        " shards of it, trains on them, and sends compressed changes of the model, not your data."
    )


def describe_upload(payload_bytes: int, contributions: int) -> str:
    """The mean payload so far."""
    if not contributions:
        return UNKNOWN
    return describe_bytes(payload_bytes / contributions)
