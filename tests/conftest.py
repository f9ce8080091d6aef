"""Hypothesis profiles. `repeatable` (the default, and CI's) tries the same examples every time; `search` looks for new
ones: `pytest --hypothesis-profile search --timeout 0 tests/property`.

`make test` runs two tests at a time (pytest-xdist): those that start a run's processes one after the other, since each
of them keeps two cores busy, and beside them the others, file by file.
"""

from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("search", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("repeatable")

WITH_PROCESSES = ("tests/integration/", "tests/browser/")
LIGHT = tuple(  # those that take hardly more than one core
    f"tests/integration/test_{name}"
    for name in ("bad_input", "butterfly", "exchange.py", "operator_commands", "service", "worker_daemon_commands")
)


def keeps_cores_busy(nodeid: str) -> bool:
    return nodeid.startswith(WITH_PROCESSES) and not nodeid.startswith(LIGHT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not keeps_cores_busy(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByProcesses(LoadScopeScheduling):
        """A scope is given to one of pytest's processes as a whole, in the order of the tests."""

        def _split_scope(self, nodeid: str) -> str:
            return "processes" if keeps_cores_busy(nodeid) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByProcesses(config, log)
