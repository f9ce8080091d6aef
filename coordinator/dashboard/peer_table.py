"""Peers as a table: words for a peer's state, and which of a thousand peers one viewer sees. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.dashboard.data_table import Cell, Column, Row, action, linked, row
from coordinator.dashboard.elements import UNKNOWN, describe_bytes, number, peer_path

PAGE_ROWS = 50
MAX_ACTIVITY_CHARS = 60
COLUMNS = (
    Column("Name", key="name", sortable=True),
    Column("State", "wide stacked", key="state", sortable=True),
    Column("Device and version", "wide stacked", key="device", sortable=True),
    Column("Reached", key="reachable"),
    Column("Tokens/s", "number", key="speed", sortable=True),
    Column("Behind", "number", key="lag", sortable=True),
    Column("Accepted", "number", key="accepted", sortable=True),
    Column("Refused", "number", key="refused", sortable=True),
    Column("Tokens", "number", key="tokens", sortable=True),
)
OPERATORS_COLUMN = Column("Action", "acts", key="acts")
Peer = Mapping[str, Any]

_SORT_KEYS = {
    "name": lambda peer: shown_name(peer).casefold(),
    "state": lambda peer: (not peer["connected"], describe_state(peer)),
    "device": lambda peer: peer["device"].casefold(),
    "speed": lambda peer: peer["steps_per_s"],
    "lag": lambda peer: peer["lag_rounds"] or 0,
    "accepted": lambda peer: peer["accepted"],
    "refused": lambda peer: peer["refused"],
    "tokens": lambda peer: peer["credited_tokens"],
}


def shown_name(peer: Peer) -> str:
    """Its name, or the end of its id."""
    return str(peer["name"]) or str(peer["peer"])[-8:]


def describe_state(peer: Peer) -> str:
    """The most important of what holds for it."""
    if peer["banned"]:
        return "banned"
    if peer["waiting_for_approval"] and peer["connected"]:
        return "waits for approval"
    if not peer["connected"]:
        return "lost" if peer["lost"] else "left"
    if peer["pause_reason"]:
        return f"paused: {peer['pause_reason'].replace('_', ' ')}"
    if peer["role"] == "validator":
        return "validator"
    return {"open": "training", "committed": "sending", "accepted": "done", "aside": "training ahead"}.get(
        peer["lease"], str(peer["status"])
    )


def select(
    peers: Sequence[Peer], *, words: str, everybody: bool, sorted_by: str, descending: bool
) -> tuple[list[Peer], list[Peer]]:
    """Those that fit, sorted; and whoever waits for the operator. `words` are looked for in names, devices and ids."""
    wanted = words.casefold().strip()
    chosen = [
        peer
        for peer in peers
        if (everybody or peer["connected"])
        and (not wanted or wanted in f"{peer['name']}\n{peer['device']}\n{peer['peer']}".casefold())
    ]
    chosen.sort(key=_SORT_KEYS[sorted_by], reverse=descending)
    return chosen, [peer for peer in peers if peer["waiting_for_approval"] and not peer["banned"]]


def describe_row(peer: Peer, step_tokens: int, *, for_operator: bool) -> Row:
    speed = peer["steps_per_s"] * step_tokens
    state = describe_state(peer)
    cells: list[Cell] = [
        linked(shown_name(peer), peer_path(peer["peer"])),
        {"text": state, "sub": describe_activity(peer)},
        {"text": peer["device"] or UNKNOWN, "sub": describe_software(peer)},
        describe_reach(peer),
        f"{speed:,.0f}" if speed else UNKNOWN,
        number(peer["lag_rounds"]),
        f"{peer['accepted']:,}",
        f"{peer['refused']:,}",
        f"{peer['credited_tokens']:,}",
    ]
    if for_operator:
        cells.append(describe_action(peer))
    css = "" if peer["connected"] else "gone"
    return row(peer["peer"], *cells, css=f"{css} alarm" if state in ("banned", "lost") else css)


def describe_software(peer: Peer) -> str:
    return str(peer["software"]).removeprefix("manyhands ") or UNKNOWN


def describe_reach(peer: Peer) -> str:
    """How others get its payloads."""
    if peer["reachable"] is None:
        return UNKNOWN
    return "directly" if peer["reachable"] else "dials out"


def describe_activity(peer: Peer) -> str:
    """Its own words, unless they only repeat its state."""
    words = str(peer["activity"])[:MAX_ACTIVITY_CHARS]
    return "" if words == describe_state(peer) else words


def describe_action(peer: Peer) -> Cell:
    """The button that fits its state; none for the operator's own validator."""
    name = shown_name(peer)
    if peer["role"] == "validator":
        return ""
    if peer["banned"]:
        return action("Unban", "unban", f"Unban {name}")
    if peer["waiting_for_approval"]:
        return action("Approve", "approve", f"Approve {name}")
    return action("Ban", "ban", f"Ban {name}")


def describe_links(peer: Peer) -> str:
    """Its measured links, in bytes a second."""
    up, down = peer["upload_bps"], peer["download_bps"]
    if not up and not down:
        return UNKNOWN
    return f"{describe_bytes(up / 8)}/s up, {describe_bytes(down / 8)}/s down"
