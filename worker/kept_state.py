"""What a worker keeps of the run's states for joiners that ask it, and the room that its blobs take."""

from collections.abc import Callable

from protocol.exchange.store import BlobStore
from protocol.replica import State


class KeptState:
    """The state of the last checkpoint round, in the store."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._digest = ""

    def tidy(self, state: State | None, every_rounds: int, max_store_bytes: Callable[[], int]) -> None:
        """At a checkpoint round, which is every so many, keep this state in place of the last, and drop what is old."""
        if state is None or state.round % every_rounds:
            return
        if self._digest and self._digest != state.digest:
            self._store.remove(self._digest)
        self._digest = self._store.put(state.to_bytes())
        self._store.prune({self._digest}, max_store_bytes())
