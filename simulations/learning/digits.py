"""The task `digits`: 1,797 handwritten digits of 8 by 8 pixels, to be told apart by a small multi-layer perceptron.

Data: E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
doi:10.24432/C50P49, licensed CC BY 4.0; the test part, as scikit-learn's `load_digits` gives it.

A row is 64 pixels of 0 to 16 and the label. Losses are in nats an example, "tokens" are pixels.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from protocol.run_spec import RunSpec
from simulations.learning.problem import TrainingData, deal_rows
from worker.device import seeded

NUM_PIXELS, NUM_CLASSES, WHITE = 64, 10, 16
HIDDEN = 32
HELD_OUT = 360


class Digits:
    """64-32-10 with a rectifier (see simulations.learning.problem.LearningTask)."""

    def build_model(self, spec: RunSpec, vocabulary_size: int, seed: int) -> nn.Module:
        """Linear layers as torch initializes them."""
        with seeded(torch.device("cpu"), seed):
            return nn.Sequential(nn.Linear(NUM_PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_CLASSES))

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean cross entropy in nats an example of rows (B, 65)."""
        logits = model(rows[:, :-1] / WHITE)
        # F.cross_entropy looks for labels to leave out as well: a third of all that a step of so small a model does.
        mean: Tensor = logits.log_softmax(-1).gather(-1, rows[:, -1:].long()).mean()
        return -mean


def load_digits(spec: RunSpec) -> TrainingData:
    """All digits, dealt to shards by the spec's seed; 360 are held out. Raises ConfigError, DataError."""
    with np.load(Path(__file__).parent / "digits.npz") as archive:
        rows = np.column_stack((archive["pixels"], archive["labels"])).astype(np.int32)
    shards, held_out = deal_rows(rows, HELD_OUT, spec)
    return TrainingData(vocabulary_size=WHITE + 1, shards=shards, held_out=held_out)
