"""The page's web server: NiceGUI's pages, the HTTP API, metrics. Imported in a thread once the coordinator runs,
because FastAPI and NiceGUI take longer to import than all the rest.

Nothing is loaded from other hosts; the Content-Security-Policy makes browsers keep to it. NiceGUI keeps its application
in globals: one site a process.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.staticfiles import StaticFiles
from nicegui import ui
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from coordinator.dashboard import api, sign_in
from coordinator.dashboard.access import Access
from coordinator.dashboard.board import Board
from coordinator.dashboard.frame import NAVIGATION, Frame, Viewer
from coordinator.dashboard.pages import (
    communication,
    cost,
    export,
    incidents,
    join,
    ledger,
    loss,
    overview,
    peer,
    peers,
    rounds,
)
from coordinator.dashboard.pages import coordinator as coordinator_page
from coordinator.dashboard.pages import sign_in as sign_in_page
from coordinator.metrics import create_registry
from coordinator.server import Server
from protocol.errors import ManyhandsError

CLOSE_WITHIN_S = 2.0
PAGE_TIMEOUT_S = 20.0
Build = Callable[..., Awaitable[None]]
SECURITY_HEADERS = {
    # NiceGUI needs inline scripts and eval; what matters is that nothing comes from, or goes to, another host.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


class _WebServer(uvicorn.Server):
    """uvicorn inside somebody else's process: signals are the command line's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run_site(server: Server, listener: socket.socket) -> None:
    """Serve on an open socket until cancelled; browsers that are connected are cut off."""
    board = Board(server, Access(server.operator_token))
    config = uvicorn.Config(
        _build_app(server, board),
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    web = _WebServer(config)
    serving = asyncio.create_task(web.serve(sockets=[listener]), name="web server")
    showing = asyncio.create_task(board.keep_showing(), name="page poll")
    try:
        await asyncio.shield(serving)
        raise ManyhandsError("the page's web server ended by itself")
    finally:
        showing.cancel()
        web.should_exit = True
        await asyncio.wait([serving], timeout=CLOSE_WITHIN_S)
        serving.cancel()


def _build_app(server: Server, board: Board) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # its documentation pages load from a CDN
    registry = create_registry(server.status, lambda: board.history.payload_bytes)

    @app.middleware("http")
    async def add_security_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(SECURITY_HEADERS)
        return response

    @app.get("/metrics", include_in_schema=False)
    async def read_metrics() -> Response:
        await board.history.refresh()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(api.make_router(server))
    app.include_router(sign_in.make_router(board.access))
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    _add_pages(board)
    ui.run_with(
        app,
        title=server.run.spec.name,
        favicon="🤝",
        dark=None,  # as the system prefers, until page.js knows better
        language="en-US",
        binding_refresh_interval=None,
        reconnect_timeout=10.0,
        message_history_length=30,
        tailwind=False,
        show_welcome_message=False,
    )
    return app


def _add_pages(board: Board) -> None:
    plain: dict[str, Build] = {
        "/": overview.build,
        "/loss": loss.build,
        "/peers": peers.build,
        "/incidents": incidents.build,
        "/ledger": ledger.build,
        "/communication": communication.build,
        "/coordinator": coordinator_page.build,
        "/cost": cost.build,
        "/export": export.build,
        "/join": join.build,
    }
    for path, build in plain.items():
        _add_page(board, path, build)

    @ui.page("/rounds", title=_title(board, "Rounds"), response_timeout=PAGE_TIMEOUT_S)
    async def show_rounds(request: Request, round_: Annotated[int | None, Query(alias="round", ge=0)] = None) -> None:
        await _show(board, request, "/rounds", "Rounds", partial(rounds.build, round_=round_))

    @ui.page("/peers/{peer_id}", title=_title(board, "Peer"), response_timeout=PAGE_TIMEOUT_S)
    async def show_peer(request: Request, peer_id: str) -> None:
        await _show(board, request, "/peers", "Peer", partial(peer.build, peer=peer_id))

    @ui.page("/sign-in", title=_title(board, "Sign in"), response_timeout=PAGE_TIMEOUT_S)
    async def show_sign_in(request: Request, wrong: bool = False) -> None:
        await _show(board, request, "/sign-in", "Sign in", partial(sign_in_page.build, wrong=wrong))


def _add_page(board: Board, path: str, build: Build) -> None:
    @ui.page(path, title=_title(board, NAVIGATION[path]), response_timeout=PAGE_TIMEOUT_S)
    async def show_page(request: Request) -> None:
        await _show(board, request, path, NAVIGATION[path], build)


async def _show(board: Board, request: Request, path: str, title: str, build: Build) -> None:
    """Build a page for one viewer, whole, and keep it up to date until the browser leaves it."""
    session = sign_in.session_of(request)
    viewer = Viewer(
        board=board,
        session=session,
        may_see_invite=board.access.is_operator(session) or _is_on_this_machine(request, board),
        snapshot=await board.read(),
    )
    frame = Frame(viewer, path, title)
    with frame.content:
        await build(frame, viewer)
    await viewer.show(viewer.snapshot)
    board.add(viewer.show)
    ui.context.client.on_delete(lambda: board.remove(viewer.show))


def _title(board: Board, page: str) -> str:
    return f"{page} · {board.server.run.spec.name} · manyhands"


def _is_on_this_machine(request: Request, board: Board) -> bool:
    """Whether this is the operator without a sign-in: whoever sees an invite can join.

    The page must be served on loopback alone, and asked for by a loopback name (a site that points its own name here
    is not the operator), without a proxy in between.
    """
    listens_on = board.server.spec.coordinator.http.rpartition(":")[0]
    forwarded = any(header in request.headers for header in ("forwarded", "x-forwarded-for", "via"))
    return _is_loopback(listens_on) and _is_loopback(request.url.hostname or "") and not forwarded


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
