"""Who is let act as the operator, when the token is guessed, the session forged or old, or the sign-in flooded."""

import hmac

import pytest

from coordinator.dashboard.access import MAX_SESSIONS, MAX_TRIES, MAX_TRIES_OF_ALL, SESSION_S, TRIES_WITHIN_S, Access

TOKEN = "the-right-token-of-32-characters"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(clock: Clock) -> Access:
    return Access(TOKEN, clock)


def test_session_is_the_operators_when_the_token_is_right(access: Access) -> None:
    session = access.sign_in(f" {TOKEN}\n", "here")
    assert access.is_operator(session)
    assert access.sign_in(TOKEN, "here") != session


@pytest.mark.parametrize("token", ["", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ü\udcff"])
def test_nobody_is_signed_in_when_the_token_is_wrong(access: Access, token: str) -> None:
    assert access.sign_in(token, "here") is None


def test_tokens_are_compared_in_constant_time(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    access.sign_in("wrong", "here")
    assert compared == [(b"wrong", TOKEN.encode())]


@pytest.mark.parametrize("session", [None, "", TOKEN, "a" * 43, "ü\udcff"])
def test_session_is_nobodys_when_it_is_forged(access: Access, session: str | None) -> None:
    access.sign_in(TOKEN, "here")
    assert not access.is_operator(session)


def test_session_ends_when_its_hours_are_over(access: Access, clock: Clock) -> None:
    session = access.sign_in(TOKEN, "here")
    clock.now_s += SESSION_S - 1
    assert access.is_operator(session)
    clock.now_s += 1
    assert not access.is_operator(session)


def test_session_is_worthless_when_it_was_signed_out(access: Access) -> None:
    session, other = access.sign_in(TOKEN, "here"), access.sign_in(TOKEN, "here")
    access.sign_out(session)
    access.sign_out(None)
    assert not access.is_operator(session)
    assert access.is_operator(other)


def test_client_waits_when_it_guessed_too_often_and_others_do_not(access: Access, clock: Clock) -> None:
    for _ in range(MAX_TRIES):
        access.sign_in("guess", "guesser")
    assert access.sign_in(TOKEN, "guesser") is None
    assert access.sign_in(TOKEN, "operator") is not None
    clock.now_s += TRIES_WITHIN_S
    assert access.sign_in(TOKEN, "guesser") is not None


def test_guesses_of_all_clients_are_limited_and_sessions_go_on(access: Access, clock: Clock) -> None:
    session = access.sign_in(TOKEN, "operator")
    for number in range(3 * MAX_TRIES_OF_ALL):
        access.sign_in("guess", f"address {number}")
    assert access.sign_in(TOKEN, "operator") is None
    assert access.is_operator(session)
    clock.now_s += TRIES_WITHIN_S
    assert access.sign_in(TOKEN, "operator") is not None


def test_oldest_session_ends_when_there_are_too_many(access: Access) -> None:
    first, *others = [access.sign_in(TOKEN, "here") for _ in range(MAX_SESSIONS + 1)]
    assert not access.is_operator(first)
    assert all(access.is_operator(session) for session in others)
