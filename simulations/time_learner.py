"""A learner without tensors: payloads have the size that their codec gives them, and nothing is learned.

Attacks show as far as the coordinator can see them: a scaled contribution by its norm, zeros by none, a copy by its
hash. What they do to the loss only fidelity `learn` tells.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from coordinator.core.effects import CloseRound, GrantLease
from protocol.codecs import get_codec
from protocol.signing import sha256_hex
from simulations.learner import Sent, Work

MEASURED_PARAMETERS = 1 << 20
NORMS = {"scaled": 10.0, "noise": 1.0, "zeros": 0.0, "sign_flip": 1.0, "copies": 1.0}  # over an honest one


class TimeLearner:
    """For fidelity `time`. Every honest payload is another, with norm 1. attacks: by peer."""

    def __init__(self, num_parameters: int, attacks: Mapping[str, str] | None = None) -> None:
        self.num_parameters = num_parameters
        self.digest = sha256_hex(b"the initial state")
        self._attacks = dict(attacks or {})
        self._grants: dict[str, GrantLease] = {}
        self._last_hash = ""  # of an honest payload in this round

    def open_round(self, works: Sequence[Work]) -> None:
        self._last_hash = ""
        for work in works:
            self._grants[work.grant.peer] = work.grant

    def contribute(self, peer: str) -> Sent:
        grant, attack = self._grants[peer], self._attacks.get(peer)
        payload_hash = sha256_hex(f"{grant.lease_id}:{peer}".encode())
        if attack == "copies" and self._last_hash:
            payload_hash = self._last_hash
        elif attack is None:
            self._last_hash = payload_hash
        return Sent(
            payload_hash=payload_hash,
            payload_bytes=payload_bytes(grant.codec, grant.codec_options, self.num_parameters),
            norm=NORMS[attack] if attack else 1.0,
            mean_loss=float("nan"),
        )

    def close_round(self, closed: CloseRound) -> None:
        merged = ",".join(credit.payload_hash for credit in closed.credits)
        self.digest = sha256_hex(f"{self.digest}:{merged}".encode())

    def drop(self, peer: str) -> None:
        self._grants.pop(peer, None)

    def held_out_loss(self) -> float | None:
        return None


@cache
def payload_bytes(codec: str, options: tuple[tuple[str, int | float], ...], num_parameters: int) -> int:
    """Bytes of one payload: exact for codecs of fixed size; of `sparse` as measured on normally distributed values."""
    coder = get_codec(codec, dict(options))
    if codec != "sparse":
        return coder.payload_bytes_max(num_parameters)
    count = min(num_parameters, MEASURED_PARAMETERS)
    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    return round(len(coder.encode(values)) * num_parameters / count)
