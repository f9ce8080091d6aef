"""Which protocol version a worker speaks with a coordinator, and what it then leaves unsaid."""

import pytest

from protocol.documents import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Invite
from protocol.errors import RefusedError
from protocol.identity import Identity
from worker.link import CoordinatorLink, choose_version


@pytest.mark.parametrize(
    ("theirs", "spoken"),
    [(PROTOCOL_VERSION, PROTOCOL_VERSION), (PROTOCOL_VERSION - 1, PROTOCOL_VERSION - 1), (99, PROTOCOL_VERSION)],
)
def test_newest_version_that_both_speak_is_chosen(theirs: int, spoken: int) -> None:
    assert choose_version(theirs) == spoken


def test_coordinator_that_is_too_old_is_named_with_what_to_type() -> None:
    with pytest.raises(RefusedError, match="pip install --upgrade manyhands"):
        choose_version(OLDEST_PROTOCOL_VERSION - 1)


@pytest.mark.parametrize(("version", "messages"), [(1, 0), (2, 1)])
def test_pause_is_told_to_coordinators_that_know_the_word(version: int, messages: int) -> None:
    invite = Invite(
        run_id="0" * 16,
        address="localhost:1",
        tls_fingerprint="0" * 64,
        token_id="0" * 16,
        role="worker",
        expires_unix_s=1,
        uses=1,
    )
    link = CoordinatorLink("", invite, b"", Identity.generate())
    link.protocol_version = version
    link.send_availability("battery")
    assert link._outbox.qsize() == messages
