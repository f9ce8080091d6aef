"""Real databases for the contract tests: an SQLite file, and a PostgreSQL cluster made for the session.

The cluster listens on a Unix socket in a folder of its own. PostgreSQL refuses to run as root; then it runs as the
user `postgres` or `nobody`. Skipped only where no PostgreSQL is installed; CI installs it.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

NUMBERS = count()


def find_postgres() -> Path | None:
    """The folder of initdb and pg_ctl, of the newest version."""
    on_path = shutil.which("initdb")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    found = places[-1] if places else Path(on_path).resolve() if on_path else None
    return found.parent if found else None


def unprivileged_user() -> str | None:
    """Who runs the server: nobody else, unless we are root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[Path]:
    """The folder with the socket of a running, empty cluster."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("no PostgreSQL is installed (neither on PATH nor in /usr/lib/postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="manyhands-pg-"))  # short: a socket's path has at most 107 characters
    user = unprivileged_user()
    options: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": "/"}
    if user is not None:
        shutil.chown(folder, user)
        options |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    data = folder / "data"
    initdb = ["--auth", "trust", "--username", "manyhands", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
    try:
        subprocess.run([binaries / "initdb", "--pgdata", data, *initdb], **options)
        server = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=20"
        log = folder / "log"
        subprocess.run(
            [binaries / "pg_ctl", "--pgdata", data, "--log", log, "--wait", "-o", server, "start"], **options
        )
        try:
            yield folder
        finally:
            subprocess.run([binaries / "pg_ctl", "--pgdata", data, "--mode", "immediate", "stop"], **options)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres_socket: Path) -> str:
    """The URL of a new, empty PostgreSQL database, as an operator would write it."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'manyhands[postgresql]'")
    name = f"run{next(NUMBERS)}"
    with psycopg.connect(f"host={postgres_socket} user=manyhands dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://manyhands@/{name}?host={postgres_socket}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'run.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url
