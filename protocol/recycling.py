"""Vectors whose memory is used again: a model's worth of fresh memory costs more than a merge does.

The system hands memory out page by page, cleared, at the first touch. A replica needs a new θ every round and drops the
one before the last, so that one's memory is kept and given to the next, once no array and no view of it is left.

Invariants: memory that anybody can still see is never given out; what is kept is at most the vectors of one state. It
knows no states and no rounds.
"""

import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
_MAX_SPARE = 2  # θ and the momentum
_spare: deque[Vector] = deque(maxlen=_MAX_SPARE)  # the oldest is freed when there are more


class _Memory:
    """Stands between the memory and all arrays on it: when it goes, nobody sees the memory any more."""

    def __init__(self, memory: Vector) -> None:
        self.__array_interface__: dict[str, Any] = memory.__array_interface__
        weakref.finalize(self, _spare.append, memory).atexit = False


def empty_vector(num_parameters: int) -> Vector:
    """float32 (D,), its values undefined."""
    try:
        memory = _spare.pop()
    except IndexError:
        memory = None
    if memory is None or memory.size != num_parameters:
        memory = np.empty(num_parameters, np.float32)
    return np.asarray(_Memory(memory))
