"""A deferred package is executed once, by whoever first needs the whole of it."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from protocol.deferred_package import defer_package

NAME = "deferred_for_this_test"
FILES = {
    "__init__.py": "from . import inner\nvalue = inner.value\n",
    "inner.py": "from . import deeper\nvalue = 7\n",
    "deeper.py": "number = object()\n",
    "free.py": "value = 1\n",
}


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """The package deferred, `free` alone being importable without it; the list grows when it is executed."""
    folder = tmp_path / NAME
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    executed: list[ModuleType] = []
    assert defer_package(NAME, {"mark": "stand-in"}, executed.append, alone=("free",)) is not None
    yield executed
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]


def test_stand_ins_and_what_can_be_imported_alone_do_not_execute_it(loads: list[ModuleType]) -> None:
    package = importlib.import_module(NAME)
    assert package.mark == "stand-in"
    assert importlib.import_module(f"{NAME}.free").value == 1
    assert not hasattr(package, "__nothing__")
    assert loads == []
    assert f"{NAME}.inner" not in sys.modules


def test_attribute_that_has_no_stand_in_executes_it(loads: list[ModuleType]) -> None:
    package = importlib.import_module(NAME)
    assert package.value == 7
    assert loads == [package]
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing


@pytest.mark.parametrize("submodule", ["inner", "deeper"])
def test_submodule_that_needs_the_whole_is_imported_once(loads: list[ModuleType], submodule: str) -> None:
    found = importlib.import_module(f"{NAME}.{submodule}")
    package = importlib.import_module(NAME)
    assert loads == [package]
    assert found is sys.modules[f"{NAME}.{submodule}"]
    assert found is getattr(package, submodule)
    assert found.__spec__ is not None
    assert found.__spec__.origin is not None
    assert package.inner.deeper is sys.modules[f"{NAME}.deeper"]


def test_package_that_is_imported_or_missing_is_left_alone() -> None:
    assert defer_package("json") is None
    assert defer_package("there_is_no_such_package") is None
