"""Attackers: what they send in place of what they have trained. One registry, `ATTACKS`.

- `sign_flip`: the opposite.
- `scaled`: ten times as much.
- `noise`: normally distributed numbers, of the same norm.
- `zeros`: nothing, to be credited for no work.
- `copies`: the first payload that an honest peer has sent in this round; see simulations.learning.learner.

Attackers keep no error feedback: each payload is made anew.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ConfigError

Vector = NDArray[np.float32]
COPIES = "copies"
SCALE = 10.0


def _noise(vector: Vector, rng: np.random.Generator) -> Vector:
    noise = rng.standard_normal(vector.size, dtype=np.float32)
    return noise * np.float32(np.linalg.norm(vector) / max(float(np.linalg.norm(noise)), 1e-30))


ATTACKS: dict[str, Callable[[Vector, np.random.Generator], Vector]] = {
    "sign_flip": lambda vector, rng: -vector,
    "scaled": lambda vector, rng: np.float32(SCALE) * vector,
    "noise": _noise,
    "zeros": lambda vector, rng: np.zeros_like(vector),
    COPIES: lambda vector, rng: vector,  # where there is nothing to copy yet
}


def check_attack(name: str) -> None:
    """Raises ConfigError for an attack that is not known."""
    if name not in ATTACKS:
        raise ConfigError(f"attack `{name}` is not one of {', '.join(ATTACKS)}")
