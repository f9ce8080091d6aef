"""POST /sign-in and /sign-out: a form's token becomes a cookie that scripts cannot read and other sites cannot send.

The page with the form must let browsers send it, and say where it comes from: `form-action 'self'` in its
Content-Security-Policy, and `Referrer-Policy: same-origin` (with no-referrer they hide the origin, and are refused).
"""

from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Request
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from coordinator.dashboard.access import SESSION_S, Access

COOKIE = "manyhands_session"
MAX_FORM_BYTES = 4096
OTHER_SITE = "this request comes from another site; open the page itself and sign in there"


def session_of(request: HTTPConnection) -> str | None:
    """The session id that the browser sent; `Access.is_operator` knows whether it is good."""
    return request.cookies.get(COOKIE)


def make_router(access: Access) -> APIRouter:
    """Both answer 303, or 403 when the browser says that another site sends the request."""
    router = APIRouter(include_in_schema=False)

    @router.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        if _is_of_another_site(request):
            return PlainTextResponse(OTHER_SITE, status_code=403)
        token = await _read_token(request)
        session_id = access.sign_in(token, request.client.host if request.client else "")
        if session_id is None:
            return RedirectResponse("/sign-in?wrong=1", status_code=303)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            COOKIE, session_id, max_age=int(SESSION_S), httponly=True, samesite="strict", secure=_is_https(request)
        )
        return response

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        if _is_of_another_site(request):
            return PlainTextResponse(OTHER_SITE, status_code=403)
        access.sign_out(session_of(request))
        response = RedirectResponse("/", status_code=303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=_is_https(request))
        return response

    return router


def _is_of_another_site(request: Request) -> bool:
    """What the browser says; it sends Sec-Fetch-Site to https and loopback only, and Origin with every POST.

    Another port of the same host is another site. A program that sends neither has nobody's cookies.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None and site not in ("same-origin", "none"):
        return True
    if origin is None or (origin == "null" and site is not None):
        return False
    try:
        return urlsplit(origin).netloc != request.headers.get("host")
    except ValueError:
        return True


async def _read_token(request: Request) -> str:
    """The form's `token`; empty when there is none, or more than a form's bytes."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            return ""
    return parse_qs(body.decode(errors="replace")).get("token", [""])[0]


def _is_https(request: Request) -> bool:
    """Also behind a proxy that ends TLS: whoever lies about it harms only its own cookie."""
    return "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
