"""A package that is in place but not executed until somebody asks it for more than was foreseen.

Importing a submodule executes the package above it first. Where that brings much that is never used, the package is put
into sys.modules unexecuted: submodules can then be imported by themselves, and whoever asks the package for an
attribute of its own that has no stand-in, or for a submodule that needs the whole, makes it execute, then and there, as
an ordinary import would have done.
"""

import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def defer_package(
    name: str,
    stand_ins: Mapping[str, object] | None = None,
    on_load: Callable[[ModuleType], None] = lambda _: None,
    alone: Collection[str] | None = None,
) -> ModuleType | None:
    """Put a package in place unexecuted; None, and nothing is done, when it is imported already or not installed.

    stand_ins: attributes that do until the package is executed, which replaces them. on_load: called with the package
    as soon as it has been executed, in the thread that caused it. alone: the submodules that can be imported without
    the whole; None: all of them.
    """
    spec = None if name in sys.modules else find_spec(name)
    if spec is None or spec.loader is None:
        return None
    package = module_from_spec(spec)
    deferred = _Deferred(package, spec.loader, on_load)
    vars(package).update(stand_ins or {})
    package.__getattr__ = deferred.load_attribute  # type: ignore[method-assign]  # PEP 562
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)  # as the import system does
    if alone is not None:
        sys.meta_path.insert(0, _WholeFirst(deferred, frozenset(f"{name}.{submodule}" for submodule in alone)))
    return package


class _Deferred:
    """The package, until it is executed."""

    def __init__(self, package: ModuleType, loader: Loader, on_load: Callable[[ModuleType], None]) -> None:
        self.package = package
        self.is_touched = False  # it is executed, or being executed
        self._loader = loader
        self._on_load = on_load
        self._lock = threading.RLock()  # others wait until the package is whole

    def load(self) -> None:
        with self._lock:
            if self.is_touched:
                return
            self.is_touched = True
            try:
                self._loader.exec_module(self.package)
            except BaseException:
                self.is_touched = False
                raise
            self._on_load(self.package)

    def load_attribute(self, attribute: str) -> Any:
        """What the package's own `__getattr__` is until then; afterwards it finds what others had to wait for."""
        name = self.package.__name__
        # a submodule that is being imported by itself is not there yet
        if not attribute.startswith("__") and f"{name}.{attribute}" not in sys.modules:
            self.load()
        if attribute in vars(self.package):
            return vars(self.package)[attribute]
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}")


class _WholeFirst(MetaPathFinder, Loader):
    """Has the package executed before a submodule that cannot be imported alone, as Python does with any package."""

    def __init__(self, deferred: _Deferred, alone: Collection[str]) -> None:
        self._deferred = deferred
        self._alone = alone

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        inside = fullname.startswith(f"{self._deferred.package.__name__}.")
        if not inside or self._deferred.is_touched or fullname in self._alone:
            return None
        self._deferred.load()
        with suppress(ValueError):  # another thread was first
            sys.meta_path.remove(self)
        module = sys.modules.get(fullname)
        if module is None:  # the whole did without it: it is found as any other
            return None
        # imported meanwhile, where Python does not look again: it is handed on as it is
        module.__spec__ = ModuleSpec(fullname, self, loader_state=module.__spec__)
        return module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state
