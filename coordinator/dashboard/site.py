"""The page's web server: NiceGUI at `/`, read-only JSON, metrics. Imported in a thread once the coordinator runs,
because FastAPI and NiceGUI take longer to import than all the rest.

One poll of the coordinator's state serves all viewers, and there is none while nobody looks. Nothing is loaded from
other hosts; the Content-Security-Policy makes browsers keep to it. NiceGUI keeps its application in globals: one site a
process.
"""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any

import structlog
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from nicegui import ui
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from coordinator.dashboard.history import RoundHistory
from coordinator.dashboard.snapshot import Snapshot, describe
from coordinator.dashboard.view import View
from coordinator.metrics import create_registry
from coordinator.server import Server
from protocol.errors import ManyhandsError

log = structlog.get_logger()
POLL_EVERY_S = 1.0
CLOSE_WITHIN_S = 2.0
SECURITY_HEADERS = {
    # NiceGUI needs inline scripts and eval; what matters is that nothing comes from, or goes to, another host.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _WebServer(uvicorn.Server):
    """uvicorn inside somebody else's process: signals are the command line's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Board:
    """What all viewers see."""

    def __init__(self, server: Server) -> None:
        self.history = RoundHistory(server.database.engine)
        self.views: set[View] = set()
        self._server = server
        self._snapshot: Snapshot | None = None
        self._read_s = 0.0
        self._reading = asyncio.Lock()

    async def read(self) -> Snapshot:
        """The state in words, at most one poll old."""
        async with self._reading:
            if self._snapshot is None or time.monotonic() - self._read_s > POLL_EVERY_S / 2:
                await self.history.refresh()
                self._snapshot = describe(self._server.status(), self.history, time.time())
                self._read_s = time.monotonic()
            return self._snapshot

    async def keep_showing(self) -> None:
        """Until cancelled: what changed, to all who look."""
        while True:
            await asyncio.sleep(POLL_EVERY_S)
            if not self.views:
                continue
            try:
                snapshot = await self.read()
                for view in list(self.views):
                    view.show(snapshot)
            except Exception:
                log.exception("the page could not be brought up to date")


async def run_site(server: Server, listener: socket.socket) -> None:
    """Serve on an open socket until cancelled; browsers that are connected are cut off."""
    board = _Board(server)
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


def _build_app(server: Server, board: _Board) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # its documentation pages load from a CDN
    registry = create_registry(server.status, lambda: board.history.payload_bytes)

    @app.middleware("http")
    async def add_security_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(SECURITY_HEADERS)
        return response

    @app.get("/api/status")
    async def read_status() -> dict[str, Any]:
        return server.status()

    @app.get("/api/rounds")
    def read_rounds(last: Annotated[int, Query(ge=1, le=100_000)] = 1000) -> list[dict[str, Any]]:
        rows = server.database.read_rounds(last=last)
        return [{column.name: getattr(row, column.name) for column in row.__table__.columns} for row in rows]

    @app.get("/metrics")
    async def read_metrics() -> Response:
        await board.history.refresh()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @ui.page("/")
    async def show_page(request: Request) -> None:
        snapshot = await board.read()
        subtitle = f"run {server.run.run_id} · {server.run.num_parameters:,} parameters"
        invite = server.invite if _may_see_invite(request, listens_on) else None
        view = View(snapshot, server.run.spec.name, subtitle, invite)
        board.views.add(view)
        ui.context.client.on_delete(lambda: board.views.discard(view))

    listens_on = server.spec.coordinator.http.rpartition(":")[0]
    ui.run_with(
        app,
        title=f"{server.run.spec.name} · manyhands",
        favicon="🤝",
        dark=None,  # as the system prefers
        language="en-US",
        reconnect_timeout=10.0,
        message_history_length=30,
        tailwind=False,
        show_welcome_message=False,
    )
    return app


def _may_see_invite(request: Request, listens_on: str) -> bool:
    """Whether this is the operator: whoever sees an invite can join.

    The page must be served on loopback alone, and asked for by a loopback name (a site that points its own name here
    is not the operator), without a proxy in between.
    """
    forwarded = any(header in request.headers for header in ("forwarded", "x-forwarded-for", "via"))
    return _is_loopback(listens_on) and _is_loopback(request.url.hostname or "") and not forwarded


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
