"""What an operator may ask: which peer and which invite are meant, and the sentence for what cannot be."""

import pytest

from coordinator import operations
from coordinator.core import events as ev
from coordinator.core.state import State
from protocol.errors import ManyhandsError
from tests.core_run import TOKEN, CoreRun

ANN, BOB, CID = ("12D3KooW" + rest + "x" * 38 for rest in ("Qaaaaa", "Qabbbb", "Rccccc"))


@pytest.fixture
def state() -> State:
    run = CoreRun()
    for peer, name in ((ANN, "attic"), (BOB, "attic"), (CID, "cellar"), ("12D3KooWval", "validator")):
        role = "validator" if name == "validator" else "worker"
        run.send(ev.PeerJoined(peer=peer, name=name, device="", role=role, token_id=TOKEN, lease_id=None))
    run.send(ev.InviteIssued(token_id="ab12", uses=5, issued_unix_s=100.0, expires_unix_s=200.0))
    run.send(ev.InviteIssued(token_id="ab34", uses=1, role="validator"))
    return run.state


@pytest.mark.parametrize("words", ["cellar", CID, CID[:9], "R", "Rccc"])
def test_peer_is_found_when_only_one_fits(state: State, words: str) -> None:
    assert operations.find_peer(state, words) == CID


@pytest.mark.parametrize("words", ["attic", "12D3KooW", "Qa"])
def test_peers_are_named_when_several_fit(state: State, words: str) -> None:
    with pytest.raises(ManyhandsError, match=f"{ANN}.*{BOB}.*give one peer id"):
        operations.find_peer(state, words)


def test_exact_peer_id_is_meant_when_another_peer_took_it_as_its_name(state: State) -> None:
    state.peers[BOB].name = CID
    assert operations.find_peer(state, CID) == CID
    state.peers[BOB].name = CID[:12]
    with pytest.raises(ManyhandsError, match="could be 2 peers"):
        operations.find_peer(state, CID[:12])


@pytest.mark.parametrize("words", ["", "nobody", "ttic"])
def test_sentence_says_what_to_type_when_no_peer_fits(state: State, words: str) -> None:
    with pytest.raises(ManyhandsError, match="manyhands coordinator status"):
        operations.find_peer(state, words)


def test_invite_is_found_by_its_beginning_when_only_one_fits(state: State) -> None:
    event, message = operations.revoke(state, invite="ab1")
    assert event == ev.InviteRevoked(token_id="ab12")
    assert message == "nobody new joins with the invite ab12"
    for words, sentence in (("ab", "2 invites begin"), ("", "no invite"), ("zz", "no invite")):
        with pytest.raises(ManyhandsError, match=sentence):
            operations.revoke(state, invite=words)


def test_invites_are_listed_with_what_became_of_them(state: State) -> None:
    state.invites["ab34"].revoked = True
    newest, second, first = operations.list_invites(state, now_unix_s=200.0)
    assert (newest["id"], newest["role"], newest["revoked"], newest["expired"]) == ("ab34", "validator", True, False)
    assert (second["id"], second["issued_unix_s"], second["expired"], second["joined"]) == ("ab12", 100.0, True, 0)
    assert (first["id"], first["uses"], first["uses_left"], first["joined"]) == (TOKEN, 1000, 996, 4)


def test_ban_tells_of_the_invite_when_it_still_works(state: State) -> None:
    event, message = operations.ban(state, peer="cellar", reason=" noise ")
    assert event == ev.PeerBanned(peer=CID, reason="noise")
    assert f"revoke {TOKEN}" in message
    state.invites[TOKEN].revoked = True
    assert operations.ban(state, peer="cellar")[1] == "cellar is banned"


@pytest.mark.parametrize(
    ("verb", "options", "sentence"),
    [
        ("ban", {"peer": "validator"}, "the validator cannot be banned"),
        ("ban", {"peer": "cellar", "reason": "two\nlines"}, "one line"),
        ("ban", {"peer": "cellar", "reason": "x" * 201}, "at most 200"),
        ("unban", {"peer": "cellar"}, "is not banned"),
        ("approve", {"peer": "cellar"}, "does not wait"),
        ("round-time", {"seconds": 0.5}, "1 to 3600"),
        ("round-time", {"seconds": 4000.0}, "1 to 3600"),
        ("round-time", {"seconds": float("nan")}, "1 to 3600"),
    ],
)
def test_request_is_refused_with_a_sentence_when_it_makes_no_sense(
    state: State, verb: str, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ManyhandsError, match=sentence):
        operations.PLANS[verb](state, **options)


def test_request_is_refused_when_it_was_carried_out_before(state: State) -> None:
    state.peers[CID].banned = state.invites["ab12"].revoked = True
    with pytest.raises(ManyhandsError, match="banned already"):
        operations.ban(state, peer="cellar")
    with pytest.raises(ManyhandsError, match="revoked already"):
        operations.revoke(state, invite="ab12")
