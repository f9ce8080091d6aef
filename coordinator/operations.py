"""What an operator may ask of a run, checked against its state: each request becomes one event and one sentence.

Pure: the signed command of the command line and the page's buttons both end here, and the caller submits the event.
Every ManyhandsError is one sentence for the operator.
"""

from collections.abc import Callable

from coordinator.core import events as ev
from coordinator.core.leases import MAX_EXPECTED_S
from coordinator.core.state import Peer, State
from protocol.errors import ManyhandsError

MIN_ROUND_S = 1.0
MAX_REASON_CHARS = 200
ID_PREFIX = "12D3KooW"  # of every peer id: nobody should have to type it


def find_peer(state: State, words: str) -> str:
    """The id of the one peer that `words` name: by its name, or by the beginning of its id or of what follows 12D3KooW.

    Names are the volunteers' own choice, so two that fit are an error, and so is one that none fits.
    """
    if words in state.peers:
        return words
    found = [
        peer_id
        for peer_id, peer in state.peers.items()
        if words and (peer.name == words or peer_id.startswith((words, ID_PREFIX + words)))
    ]
    if not found:
        raise ManyhandsError(f"no peer is called {words!r}; `manyhands coordinator status` lists them")
    if len(found) > 1:
        ids = ", ".join(found[:3]) + (" and more" if len(found) > 3 else "")
        raise ManyhandsError(f"{words!r} could be {len(found)} peers ({ids}); give one peer id")
    return found[0]


def find_invite(state: State, words: str) -> str:
    """The id of the one invite that begins with `words`."""
    found = [token_id for token_id in state.invites if words and token_id.startswith(words)]
    if not found:
        raise ManyhandsError(f"no invite begins with {words!r}; `manyhands coordinator invites` lists them")
    if len(found) > 1:
        raise ManyhandsError(f"{len(found)} invites begin with {words!r}; give more of its id")
    return found[0]


def list_invites(state: State, now_unix_s: float) -> list[dict[str, object]]:
    """Every invite that was issued, newest first: plain facts, and not the invite itself, which nobody keeps."""
    joined = [peer.token_id for peer in state.peers.values()]
    return [
        {
            "id": token_id,
            "role": invite.role,
            "uses": invite.uses,
            "uses_left": invite.uses_left,
            "joined": joined.count(token_id),
            "revoked": invite.revoked,
            "expired": 0.0 < invite.expires_unix_s <= now_unix_s,
            "issued_unix_s": invite.issued_unix_s,
            "expires_unix_s": invite.expires_unix_s,
        }
        for token_id, invite in reversed(state.invites.items())
    ]


# ---- one function a verb that changes the run: the event, and the sentence for the operator


def pause(_: State) -> tuple[ev.Event, str]:
    return ev.PauseRequested(paused=True), "no further round opens until `resume`; the current one is finished"


def resume(_: State) -> tuple[ev.Event, str]:
    return ev.PauseRequested(paused=False), "the run goes on"


def ban(state: State, *, peer: str, reason: str = "") -> tuple[ev.Event, str]:
    """The validator is the operator's own process, and cannot be banned."""
    peer_id, banned = _find(state, peer)
    if banned.role == "validator":
        raise ManyhandsError("the validator cannot be banned; start the coordinator with --no-validator instead")
    if banned.banned:
        raise ManyhandsError(f"{banned.name} is banned already")
    _check_reason(reason)
    invite = state.invites.get(banned.token_id)
    still = (
        f"; whoever has its invite can join under a new identity, unless you `revoke {banned.token_id}`"
        if invite is not None and invite.uses_left and not invite.revoked
        else ""
    )
    return ev.PeerBanned(peer=peer_id, reason=reason.strip()), f"{banned.name} is banned{still}"


def unban(state: State, *, peer: str) -> tuple[ev.Event, str]:
    peer_id, banned = _find(state, peer)
    if not banned.banned:
        raise ManyhandsError(f"{banned.name} is not banned")
    return ev.PeerUnbanned(peer=peer_id), f"{banned.name} may join again; its owner has to start it"


def approve(state: State, *, peer: str) -> tuple[ev.Event, str]:
    peer_id, waiting = _find(state, peer)
    if not waiting.waiting_for_approval:
        raise ManyhandsError(f"{waiting.name} does not wait for approval")
    return ev.PeerApproved(peer=peer_id), f"{waiting.name} is approved"


def revoke(state: State, *, invite: str) -> tuple[ev.Event, str]:
    token_id = find_invite(state, invite)
    if state.invites[token_id].revoked:
        raise ManyhandsError(f"the invite {token_id} is revoked already")
    joined = sum(peer.token_id == token_id for peer in state.peers.values())
    stay = f"; the {joined} that did may come back, `ban` keeps them out" if joined else ""
    return ev.InviteRevoked(token_id=token_id), f"nobody new joins with the invite {token_id}{stay}"


def set_round_time(_: State, *, seconds: float) -> tuple[ev.Event, str]:
    """0: as run.toml says."""
    if seconds == 0.0:
        return ev.RoundTimeSet(seconds=None), "from the next round on, inner_steps are again what run.toml says"
    if not MIN_ROUND_S <= seconds <= MAX_EXPECTED_S:
        raise ManyhandsError(f"a round takes {MIN_ROUND_S:g} to {MAX_EXPECTED_S:g} seconds; 0: as run.toml says")
    return ev.RoundTimeSet(seconds=seconds), f"from the next round on, rounds should take {seconds:g} s"


PLANS: dict[str, Callable[..., tuple[ev.Event, str]]] = {
    "pause": pause,
    "resume": resume,
    "ban": ban,
    "unban": unban,
    "approve": approve,
    "revoke": revoke,
    "round-time": set_round_time,
}


def _find(state: State, words: str) -> tuple[str, Peer]:
    peer_id = find_peer(state, words)
    return peer_id, state.peers[peer_id]


def _check_reason(reason: str) -> None:
    if len(reason) > MAX_REASON_CHARS or not reason.isprintable():
        raise ManyhandsError(f"a reason is one line of at most {MAX_REASON_CHARS} characters")
