"""A worker's log: JSON lines in its run's folder, rotated by size, and how they are shown.

    worker.log, worker.log.1 … worker.log.4     at most 2 MB each, newest first
    worker.out                                  what a background worker's process itself wrote: its last error

Invariants: a full disk never stops a worker (what cannot be written is dropped); what is shown holds no control
characters, since texts in it come from other machines.
"""

import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Generator
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog
import typer

NAME = "worker.log"
MAX_BYTES = 2_000_000
NUM_OLDER = 4
POLL_S = 0.25
_COLOURS = {"warning": typer.colors.YELLOW, "error": typer.colors.RED, "critical": typer.colors.RED}


def log_to_file(folder: Path, *, quiet: bool) -> None:
    """Write this process's events to the log in `folder` from now on; also to stderr unless `quiet`.

    Warnings of libraries that use `logging` go to the file only.
    """
    handler = _RotatingFile(folder / NAME, maxBytes=MAX_BYTES, backupCount=NUM_OLDER, encoding="utf-8", delay=True)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    for older in [handler for handler in root.handlers if isinstance(handler, _RotatingFile)]:
        root.removeHandler(older)
        older.close()
    root.addHandler(handler)
    last = structlog.get_config()["processors"][-1]  # how stderr is written, see protocol.logs
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _FileSink(handler),
            _drop if quiet else last,
        ]
    )


def tail(folder: Path, num_lines: int) -> list[str]:
    """The last lines of the log, older files included, as they stand in the file."""
    lines: deque[str] = deque(maxlen=num_lines)
    for path in _files(folder):
        with path.open(encoding="utf-8", errors="replace") as file:
            lines.extend(line.rstrip("\n") for line in file)
    return list(lines)


def follow(folder: Path, num_lines: int) -> Generator[str, None, None]:
    """The last lines, then each line as it is written, over rotation, for ever."""
    files = _files(folder)
    current = _open_at_end(files[-1]) if files else None
    yield from tail(folder, num_lines)
    unfinished = ""
    try:
        while True:
            following = _next_file(folder, current)  # first: nothing is written to the older file once there is one
            if current is not None:
                *lines, unfinished = (unfinished + current.read()).split("\n")
                yield from lines
            if following is None:
                time.sleep(POLL_S)
                continue
            if current is not None:
                current.close()
            current, unfinished = following.open(encoding="utf-8", errors="replace"), ""
    finally:
        if current is not None:
            current.close()


def render(line: str, *, colour: bool = False) -> str:
    """A line of the log for people: local time, level, event, then what belongs to it."""
    try:
        event: dict[str, Any] = json.loads(line)
        moment = datetime.fromisoformat(event.pop("timestamp")).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        level, text = str(event.pop("level")), str(event.pop("event"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _printable(line)
    trace = event.pop("exception", None)
    facts = "  ".join(f"{name}={value}" for name, value in event.items())
    shown_level = f"{level:<8}"
    if colour and level in _COLOURS:
        shown_level = typer.style(shown_level, fg=_COLOURS[level], bold=True)
    head = f"{moment}  {shown_level} {_printable(text)}" + (f"  {_printable(facts)}" if facts else "")
    return "\n".join([head, *(f"    {_printable(row)}" for row in str(trace).splitlines())]) if trace else head


class _RotatingFile(RotatingFileHandler):
    """A handler that drops what it cannot write."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        del record


class _JsonFormatter(logging.Formatter):
    """Events of structlog as they were rendered; records of `logging` in the same form."""

    def format(self, record: logging.LogRecord) -> str:
        line: str | None = getattr(record, "line", None)
        if line is not None:
            return line
        moment = datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")
        event = {"event": record.getMessage(), "logger": record.name, "level": record.levelname.lower()}
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps({**event, "timestamp": moment})


class _FileSink:
    """A processor that writes the event to the file and hands it on unchanged."""

    def __init__(self, handler: logging.Handler) -> None:
        self._handler = handler
        self._to_json = structlog.processors.JSONRenderer()

    def __call__(
        self, logger: Any, method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.ProcessorReturnValue:
        written = structlog.processors.format_exc_info(logger, method, dict(event))
        line = self._to_json(logger, method, written)
        self._handler.handle(logging.makeLogRecord({"line": line}))
        return event


def _drop(_: Any, __: str, ___: structlog.typing.EventDict) -> structlog.typing.ProcessorReturnValue:
    raise structlog.DropEvent


def _files(folder: Path) -> list[Path]:
    """The log's files, oldest first."""
    numbered = [folder / f"{NAME}.{number}" for number in range(NUM_OLDER, 0, -1)]
    return [path for path in [*numbered, folder / NAME] if path.is_file()]


def _open_at_end(path: Path) -> TextIO:
    file = path.open(encoding="utf-8", errors="replace")
    file.seek(0, os.SEEK_END)
    return file


def _next_file(folder: Path, current: TextIO | None) -> Path | None:
    """The file that was begun after the open one, if there is one."""
    files = _files(folder)
    if current is None:
        return files[0] if files else None
    inode = os.fstat(current.fileno()).st_ino
    places = [place for place, path in enumerate(files) if _inode(path) == inode]
    if not places:
        return files[0] if files else None  # so old that it is gone
    return files[places[0] + 1] if places[0] + 1 < len(files) else None


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:  # rotated meanwhile
        return -1


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def is_terminal() -> bool:
    """Whether what is shown goes to a terminal, in colour."""
    return sys.stdout.isatty()
