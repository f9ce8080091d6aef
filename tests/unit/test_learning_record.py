"""simulations.learning.record: what is recorded gives what the step gives, and calls less."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from simulations.learning import record as record_module
from simulations.learning.record import Step, record_step

PEERS, BATCH, PIXELS, CLASSES = 3, 4, 6, 5
SIZES = [PIXELS * CLASSES, CLASSES]


def classify(parameters: Tensor, rows: Tensor) -> Tensor:
    """A layer's loss: parameters (D,), rows (B, C) of pixels and a label."""
    weight, bias = torch.split(parameters, SIZES)
    logits = F.linear(rows[:, :-1].float(), weight.view(CLASSES, PIXELS), bias)
    return F.cross_entropy(logits, rows[:, -1])


def with_noise(parameters: Tensor, rows: Tensor) -> Tensor:
    """What the noise depends on is constant; the noise is not."""
    return classify(parameters + 0.1 * torch.rand_like(torch.ones_like(parameters)), rows)


def with_a_change_in_place(parameters: Tensor, rows: Tensor) -> Tensor:
    total = torch.zeros_like(parameters)
    total += parameters
    return classify(total * 2, rows)


def looks_at_its_numbers(parameters: Tensor, rows: Tensor) -> Tensor:
    return classify(parameters, rows) if rows.sum().item() > 0 else parameters.sum()


def batch(loss: object) -> Step:
    step: Step = vmap(grad_and_value(loss), randomness="different")  # type: ignore[arg-type]
    return step


def join(gradients: Tensor | Sequence[Tensor]) -> Tensor:
    """The columns of (P, D) put together."""
    return gradients if isinstance(gradients, Tensor) else torch.cat(list(gradients), dim=1)


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Parameters (P, D) and rows (P, B, C)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 9, (PEERS, BATCH, PIXELS), generator=generator)
    labels = torch.randint(0, CLASSES, (PEERS, BATCH, 1), generator=generator)
    return torch.randn(PEERS, sum(SIZES), generator=generator), torch.cat((pixels, labels), dim=2)


@pytest.mark.parametrize("loss", [classify, with_noise, with_a_change_in_place])
def test_a_record_gives_bitwise_what_the_step_gives_on_other_numbers(loss: object) -> None:
    step = batch(loss)
    with torch.no_grad():
        record = record_step(step, *draw(0))
        assert record is not None
        for seed in (1, 2):
            torch.manual_seed(seed)
            expected = step(*draw(seed))
            torch.manual_seed(seed)
            found = record(*draw(seed))
            assert torch.equal(join(found[0]), join(expected[0]))
            assert torch.equal(found[1], expected[1])


def test_random_numbers_are_new_in_every_step() -> None:
    with torch.no_grad():
        record = record_step(batch(with_noise), *draw(0))
        assert record is not None
        assert not torch.equal(record(*draw(0))[1], record(*draw(0))[1])


def test_operations_that_follow_from_shapes_are_not_in_a_record_and_few_go_through_an_operator() -> None:
    with torch.no_grad():
        record = record_step(batch(classify), *draw(0))
    assert record is not None
    names = Counter(node.op for node in record.graph.nodes)
    targets = [str(node.target) for node in record.graph.nodes]
    assert names["get_attr"] > 0
    assert not [target for target in targets if "ones_like" in target or "zeros_like" in target]
    operators = [node for node in record.graph.nodes if isinstance(node.target, OpOverload)]
    assert len(operators) < 0.4 * (names["call_function"] + names["call_method"])


def test_large_constants_are_computed_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "_SMALL_BYTES", 4 * PEERS)  # a value a peer
    with torch.no_grad():
        record = record_step(batch(classify), *draw(0))
    assert record is not None
    assert all(buffer.nbytes <= 4 * PEERS for buffer in record.buffers())
    assert [node for node in record.graph.nodes if "zeros_like" in str(node.target)]


def test_gradients_that_are_constant_can_be_clipped_when_they_are_put_together() -> None:
    step = batch(lambda parameters, rows: parameters.sum() + 0 * rows.sum())
    with torch.no_grad():
        record = record_step(step, *draw(0))
        assert record is not None
        for _ in range(2):
            gradients = join(record(*draw(0))[0])
            assert torch.equal(gradients, torch.ones(PEERS, sum(SIZES)))
            gradients.mul_(0.5)


def test_a_step_that_looks_at_its_numbers_is_not_recorded() -> None:
    with torch.no_grad():
        assert record_step(batch(looks_at_its_numbers), *draw(0)) is None
