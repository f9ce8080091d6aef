"""The first page."""

import asyncio
from typing import Any


def serve_page(server: Any) -> "asyncio.Task[None]":
    return asyncio.create_task(server.stop.wait())
