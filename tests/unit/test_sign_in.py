"""The sign-in over HTTP: the cookie, and what other sites, forgers and oversized forms get."""

from collections.abc import AsyncIterator
from urllib.parse import urlencode

import httpx
import pytest
from fastapi import FastAPI, Request

from coordinator.dashboard.access import MAX_TRIES, Access
from coordinator.dashboard.sign_in import COOKIE, make_router, session_of

TOKEN = "the-right-token-of-32-characters"
HOST = "run.example:7641"
FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    access, app = Access(TOKEN), FastAPI()
    app.include_router(make_router(access))

    @app.get("/who")
    async def who(request: Request) -> bool:
        return access.is_operator(session_of(request))

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
        yield client


async def sign_in(client: httpx.AsyncClient, token: str = TOKEN, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/sign-in", content=urlencode({"token": token}), headers=FORM | named)


async def is_operator(client: httpx.AsyncClient) -> bool:
    answer: bool = (await client.get("/who")).json()
    return answer


async def test_cookie_is_kept_from_scripts_and_other_sites_when_the_token_is_right(client: httpx.AsyncClient) -> None:
    answer = await sign_in(client, sec_fetch_site="same-origin", origin=f"http://{HOST}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie
    assert TOKEN not in answer.headers["set-cookie"]
    assert await is_operator(client)


async def test_cookie_is_for_https_alone_when_the_page_is(client: httpx.AsyncClient) -> None:
    assert "secure" in (await sign_in(client, x_forwarded_proto="https")).headers["set-cookie"].lower()
    client.base_url = httpx.URL(f"https://{HOST}")
    assert "secure" in (await sign_in(client)).headers["set-cookie"].lower()


@pytest.mark.parametrize("body", [urlencode({"token": "wrong"}), "", "token", "token=%ff%00", "token=" + "x" * 5000])
async def test_nobody_is_signed_in_when_the_form_is_wrong(client: httpx.AsyncClient, body: str) -> None:
    answer = await client.post("/sign-in", content=body, headers=FORM)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?wrong=1")
    assert "set-cookie" not in answer.headers
    assert not await is_operator(client)


async def test_right_token_is_refused_when_it_comes_after_many_guesses(client: httpx.AsyncClient) -> None:
    for _ in range(MAX_TRIES):
        await sign_in(client, "guess")
    assert (await sign_in(client)).headers["location"] == "/sign-in?wrong=1"


@pytest.mark.parametrize(
    "headers",
    [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site", "origin": f"http://{HOST}"},
        {"origin": "https://evil.example"},
        {"origin": "http://run.example:8000"},
        {"origin": "null"},
        {"origin": "http://["},
    ],
)
async def test_request_is_refused_when_another_site_sends_it(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    assert (await sign_in(client, **headers)).status_code == 403
    await sign_in(client)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    assert (await client.post("/sign-out", headers=named)).status_code == 403
    assert await is_operator(client)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": f"http://{HOST}"},
        {"origin": f"https://{HOST}"},
        {"sec_fetch_site": "same-origin", "origin": "null"},
        {"sec_fetch_site": "none"},
    ],
)
async def test_request_is_taken_when_it_comes_from_the_page(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await sign_in(client, **headers)).headers["location"] == "/"


async def test_session_is_worthless_when_it_signed_out(client: httpx.AsyncClient) -> None:
    await sign_in(client)
    session = client.cookies[COOKIE]
    answer = await client.post("/sign-out")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert COOKIE not in client.cookies
    client.cookies.set(COOKIE, session, domain="run.example")
    assert not await is_operator(client)


@pytest.mark.parametrize("cookie", ["", "a" * 43, TOKEN])
async def test_cookie_is_nobodys_when_it_is_forged(client: httpx.AsyncClient, cookie: str) -> None:
    await sign_in(client)
    client.cookies.clear()
    client.cookies.set(COOKIE, cookie, domain="run.example")
    assert not await is_operator(client)


async def test_sign_in_is_never_a_get(client: httpx.AsyncClient) -> None:
    assert (await client.get("/sign-out")).status_code == 405
    assert (await client.get(f"/sign-in?token={TOKEN}")).status_code == 405
