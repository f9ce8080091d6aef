"""Muon's orthogonal matrices, and its momentum between rounds: turned towards what all workers have agreed on.

A worker's momentum is M = O S, where O is orthogonal and S says how much it moves in each direction. It knows the
worker's own batches alone, and leads the workers apart again after every merge. What a merge has moved the weights
by, over the learning rates of its steps, added up, is U: the mean of everybody's O, over a round. So a new round begins
with S kept and O replaced by U, for the greater part. Where workers disagree U is short of an orthogonal matrix, and
the momentum shrinks. Nothing is sent for it (docs/convergence.md has what it gains).

Shape letters: P workers, M and N a matrix's sides.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MUON_RMS = 0.2  # of a step of Muon at learning rate 1, as AdamW's: `match_rms_adamw` of torch.optim.Muon
TURNED_SHARE = 0.8
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_EPSILON = 1e-7


@dataclass(frozen=True, slots=True)
class Cut:
    """How a matrix falls into equal blocks, each of which is orthogonalized by itself: `count` of them, along `axis`.

    Weights of query, key and value in one matrix are cut into their heads'; most matrices are one block.
    """

    count: int = 1
    axis: int = 0  # of (M, N)

    def blocks(self, matrices: Tensor) -> Tensor:
        """A view (P, count, m, n) of (P, M, N)."""
        shape = list(matrices.shape)
        shape[1 + self.axis : 2 + self.axis] = [self.count, shape[1 + self.axis] // self.count]
        return matrices.view(shape).movedim(1 + self.axis, 1)

    def join(self, blocks: Tensor) -> Tensor:
        """(P, M, N) of blocks (P, count, m, n)."""
        return blocks.movedim(1, 1 + self.axis).flatten(1 + self.axis, 2 + self.axis)


WHOLE = Cut()


def direction(gradients: Tensor, cut: Cut) -> Tensor:
    """What Muon moves weights by at learning rate 1, for gradients or momenta (P, M, N)."""
    blocks = cut.blocks(gradients)
    own = orthogonalize(blocks.flatten(0, 1)).view(blocks.shape)
    return cut.join(own * (MUON_RMS * math.sqrt(max(blocks.shape[2:]))))


def turn(momenta: Tensor, moved: Tensor, rate_sum: float, cut: Cut = WHOLE) -> None:
    """Turn float32 momenta (P, M, N), in place, after a merge of rounds with `rate_sum`.

    moved: float32 (M, N), the weights before the merge minus those after it. Steps at a rate of zero say nothing.
    """
    if rate_sum <= 0.0:
        return
    if cut.count > 1:
        for part, part_moved in zip(cut.blocks(momenta).unbind(1), cut.blocks(moved[None])[0], strict=True):
            turn(part, part_moved, rate_sum)
        return
    agreed = (moved / (rate_sum * MUON_RMS * math.sqrt(max(moved.shape)))).expand_as(momenta)
    own = orthogonalize(momenta)
    turned = _combine(momenta, own, agreed) + _combine(agreed, own, momenta)
    momenta.lerp_(turned, TURNED_SHARE)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each float32 matrix (P, M, N), in float32, by Newton-Schulz as torch.optim.Muon does it.

    In bfloat16 as there, but on CPUs: of those few have it, and where it is emulated it takes twenty times as long.
    """
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()


def _combine(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Half of first second^T third, (P, M, N) each, by the shorter side."""
    is_tall = first.shape[1] > first.shape[2]
    return 0.5 * (first @ (second.mT @ third) if is_tall else (first @ second.mT) @ third)
