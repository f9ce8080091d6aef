"""hivemind without what a peer never uses.

`import hivemind.p2p` runs hivemind's own `__init__` first, which imports all of it: averaging, mixtures of experts,
optimizers, scipy. That is 45 MB at import and half a second of every start. Here the package is put in place
unexecuted, so that its submodules can be imported by themselves; whoever asks the package for anything of its own gets
the whole of it.
"""

import sys
from importlib.util import find_spec, module_from_spec
from typing import Any


def defer_hivemind() -> None:
    """Do so, unless hivemind is imported already or not installed."""
    spec = None if "hivemind" in sys.modules else find_spec("hivemind")
    if spec is None or spec.loader is None:
        return
    package = module_from_spec(spec)
    load = spec.loader.exec_module

    def load_attribute(name: str) -> Any:
        if name.startswith("__") or f"hivemind.{name}" in sys.modules:  # the latter is being imported just now
            raise AttributeError(f"module 'hivemind' has no attribute {name!r}")
        del package.__getattr__
        load(package)
        return getattr(package, name)

    package.__getattr__ = load_attribute  # type: ignore[method-assign]  # PEP 562
    sys.modules["hivemind"] = package
