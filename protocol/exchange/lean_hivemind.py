"""hivemind without what a peer never uses.

`import hivemind.p2p` runs hivemind's own `__init__` first, which imports all of it: averaging, mixtures of experts,
optimizers, scipy. That is 45 MB at import and half a second of every start. Here the package is put in place
unexecuted, so that its submodules can be imported by themselves; whoever asks the package for anything of its own gets
the whole of it.
"""

from protocol.deferred_package import defer_package


def defer_hivemind() -> None:
    """Do so, unless hivemind is imported already or not installed."""
    defer_package("hivemind")
