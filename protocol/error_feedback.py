"""Error feedback: what a lossy codec left out is sent later.

e <- β e + Δ; send Q(e); e <- e - Q(e), the last only when a signed manifest lists the payload. Without a manifest e
keeps everything, so the work of a rejected contribution is in the next one. (Templar subtracts before it knows.)
Seide et al. 2014; Karimireddy et al. 2019 (arXiv:1901.09847). The residual belongs to one worker and is never shared.

A round does not begin at θ but at θ - KEPT_SHARE e: part of what a worker has learnt and not yet sent is not lost to
itself meanwhile. Δ is still where it began minus where it ended, so the others see nothing of it, and no byte is added
(docs/convergence.md has what it gains).
"""

import numpy as np

from protocol.codecs import codec_of
from protocol.codecs.payload import Vector, check_vector

KEPT_SHARE = 0.4  # best among four workers; among eight and more a little less would be (docs/convergence.md)


def round_start(theta: Vector, residual: Vector, out: Vector, kept_share: float = KEPT_SHARE) -> Vector:
    """Where the worker of this residual begins a round, float32 (D,), in `out`; residual and `out` may have rows."""
    np.multiply(residual, np.float32(-kept_share), out=out)
    out += theta
    return out


class ErrorFeedback:
    """The residual e, float32 (D,), of one worker."""

    def __init__(self, num_parameters: int) -> None:
        self._residual = np.zeros(num_parameters, np.float32)

    def compensate(self, delta: Vector, decay: float) -> Vector:
        """e <- decay * e + delta; returns e, the vector to encode (a read-only view, valid until the next call).

        Where delta is θ minus where a worker ended that began at `start`, its decay is less by KEPT_SHARE: that much of
        e is in delta. Raises PayloadError, and leaves e as it is, when delta is not finite float32: what diverged is
        not kept.
        """
        check_vector(delta)
        if decay != 1.0:
            self._residual *= np.float32(decay)
        self._residual += delta
        view = self._residual.view()
        view.flags.writeable = False
        return view

    def start(self, theta: Vector, out: Vector) -> Vector:
        """Where this worker begins a round: see `round_start`."""
        return round_start(theta, self._residual, out)

    def settle(self, payload: bytes) -> None:
        """e <- e - decode(payload). Call it when a manifest has accepted the payload, and only then."""
        codec_of(payload).accumulate(payload, -1.0, self._residual)

    def forget(self) -> None:
        """e <- 0: what it held was sent by other means, or is not known to be unsent."""
        self._residual.fill(0.0)

    def state(self) -> Vector:
        """A copy of e, to be kept over a restart."""
        return self._residual.copy()

    def restore(self, residual: Vector) -> None:
        """Take up a kept e. Raises PayloadError when it is not finite float32, ValueError for another size."""
        check_vector(residual)
        if residual.shape != self._residual.shape:
            raise ValueError(f"a residual of shape {residual.shape} for {self._residual.size} parameters")
        self._residual[:] = residual
