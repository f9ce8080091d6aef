"""torch and transformers without what training a language model never uses: 110 MB less in every worker.

The first model that transformers builds imports torch's compiler with sympy (70 MB), torch's distributed tensors (8 MB)
and scipy (35 MB), and each step of torch's optimizers asks for the compiler again. Here

- transformers finds neither scipy nor torch.distributed: it takes them for optional, and keeps what it found in caches;
- `torch._dynamo`, the compiler's front, is put in place unexecuted. The four functions that mark something for it do
  nothing while there is no compiler; what they were asked is made good when there is one. Whoever asks it for anything
  else, `torch.compile` above all, gets the whole of it.

What is computed is the same bit for bit. Where a version of either library is not as expected, it is imported as ever.
"""

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from protocol.deferred_package import defer_package

_DYNAMO = "torch._dynamo"
_later: list[Callable[[ModuleType], None]] = []  # what the compiler is told when it is loaded


def import_lean() -> None:
    """Do so from now on, for whatever of the three is not imported yet."""
    _defer_compiler()
    checks = importlib.import_module("transformers.utils.import_utils")
    if "scipy" not in sys.modules:
        with _no_module("scipy"):
            _ask_again(checks, "is_scipy_available")
    if "torch.distributed.tensor" not in sys.modules:
        with _no_distributed():
            _ask_again(checks, "is_torch_distributed_available")


def _defer_compiler() -> None:
    stand_ins = {
        "allow_in_graph": functools.partial(_mark, "allow_in_graph"),
        "assume_constant_result": functools.partial(_mark, "assume_constant_result"),
        "disable": _disable,
        "graph_break": lambda msg="": None,
    }
    # the one submodule that transformers' masks import needs nothing of the whole
    defer_package(_DYNAMO, stand_ins, _make_good, alone=("_trace_wrapped_higher_order_op",))


def _make_good(dynamo: ModuleType) -> None:
    while _later:
        _later.pop(0)(dynamo)


def _mark(mark: str, function: Any) -> Any:
    """A decorator of the compiler's that returns what it is given."""
    _later.append(lambda dynamo: getattr(dynamo, mark)(function))
    return function


def _disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
    """torch._dynamo.disable: the function as it is, until the compiler is there to leave it alone."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **options)
    if not inspect.isfunction(fn):  # a module or a class, which the compiler changes
        return _load_compiler().disable(fn, recursive, **options)
    target: Callable[..., Any] = fn

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def disable_it(dynamo: ModuleType) -> None:
        nonlocal target
        target = dynamo.disable(fn, recursive, **options)

    _later.append(disable_it)
    return call


def _load_compiler() -> Any:
    dynamo = sys.modules[_DYNAMO]
    _ = dynamo.optimize  # any attribute without a stand-in
    return dynamo


def _ask_again(checks: ModuleType, name: str) -> None:
    """Have one of transformers' checks of what is installed keep what it finds now, if it keeps anything."""
    check: Any = getattr(checks, name, None)
    if hasattr(check, "cache_clear"):
        check.cache_clear()
        check()


@contextlib.contextmanager
def _no_module(name: str) -> Iterator[None]:
    """Inside the block nothing of that name can be found: so the import system writes "not there"."""
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def _no_distributed() -> Iterator[None]:
    there = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = there
