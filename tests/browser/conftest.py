"""One real run for the browser tests of a file that only look: a coordinator, its validator and two workers."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.processes import RunningCoordinator, start_coordinator, start_worker, wait_until

WORKERS = ("ada", "bob <b>the</b> builder")
EARLIER = "earlier"


def copy_run(folder: Path, to: Path) -> None:
    """What is in a run's database now, as another run folder beside it."""
    to.mkdir()
    with closing(sqlite3.connect(folder / "run.db")) as source, closing(sqlite3.connect(to / "run.db")) as target:
        source.backup(target)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    """A run in which two workers train."""
    place = tmp_path_factory.mktemp("page")
    with (
        start_coordinator(place / "run", train={"tokens": 100_000_000}) as coordinator,
        start_worker(coordinator.invite, place / "first", name=WORKERS[0]),
        start_worker(coordinator.invite, place / "second", name=WORKERS[1]),
    ):
        wait_until(lambda: coordinator.status()["workers"] == 2 and coordinator.status()["round"] >= 2, 90)
        copy_run(coordinator.folder, place / EARLIER)
        yield coordinator
