"""Structured logs on stderr: one line an event, never keys, tokens or payloads."""

import logging
import os
import sys

import structlog


def configure_logging() -> None:
    """Console lines on a terminal, JSON lines elsewhere."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core writes to stderr what we raise as one line
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
