"""Starts the page on `coordinator.http`. Light to import: the web frameworks are loaded in a thread, meanwhile.

The socket is open before they are, so a browser that comes early waits a moment and is not refused.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from protocol.errors import ConfigError, ConnectionFailedError
from protocol.exchange.dial import split_address

if TYPE_CHECKING:
    from coordinator.server import Server


def serve_page(server: "Server") -> "asyncio.Task[None]":
    """Serve the page in the running loop until the task is cancelled; connections are taken from now on.

    Raises ConfigError when the address cannot be used.
    """
    listener = _listen(server.spec.coordinator.http)
    return asyncio.create_task(_serve(server, listener), name="page")


async def _serve(server: "Server", listener: socket.socket) -> None:
    with listener:
        run_site = await asyncio.to_thread(_load_site)
        await run_site(server, listener)


def _load_site() -> "Callable[[Server, socket.socket], Awaitable[None]]":
    from coordinator.dashboard.site import run_site

    return run_site


def _listen(address: str) -> socket.socket:
    """A listening socket on host:port. Raises ConfigError."""
    try:
        host, port = split_address(address)
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family)
    except (OSError, ConnectionFailedError) as error:
        raise ConfigError(
            f"cannot serve the page on {address}: the port is in use or the address is not this machine's;"
            " change coordinator.http in run.toml"
        ) from error
