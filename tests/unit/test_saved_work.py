"""What a worker did and was not credited for comes back after a restart, or is refused with a reason."""

from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.documents import ShardRef
from protocol.errors import VerificationError
from protocol.run_spec import TrainSpec
from worker.optimizers import InnerOptimizer, build_optimizer
from worker.saved_work import Pending, SavedWork, Unlisted

SHARDS = (ShardRef(pass_index=0, index=3), ShardRef(pass_index=1, index=0))
UNLISTED = Unlisted(round=5, pending=Pending(round=5, payload_hash="ab" * 32, shards=SHARDS), carried=SHARDS[:1])


def trained(seed: int) -> tuple[torch.nn.Module, InnerOptimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(model, TrainSpec(optimizer="adamw", tokens=1000))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step(1e-3)
    return model, optimizer


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    residual = np.linspace(-1.0, 1.0, 15, dtype=np.float32)
    _, optimizer = trained(0)
    SavedWork(tmp_path).save(UNLISTED, residual, optimizer.state())
    _, other = trained(1)
    found = SavedWork(tmp_path).load(other)
    assert found is not None
    assert found[0] == UNLISTED
    np.testing.assert_array_equal(found[1], residual)
    optimizer.save(tmp_path / "a")
    other.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_comes_back_when_nothing_was_saved(tmp_path: Path) -> None:
    assert SavedWork(tmp_path).load(trained(0)[1]) is None


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_damaged_file_is_refused_by_name(tmp_path: Path, damage: bytes | None) -> None:
    saved = SavedWork(tmp_path)
    saved.save(UNLISTED, np.zeros(3, np.float32), {})
    path = tmp_path / "work.safetensors"
    path.write_bytes(path.read_bytes()[:-2] if damage is None else damage)
    with pytest.raises(VerificationError, match=r"work\.safetensors"):
        saved.load(trained(0)[1])


def test_saving_is_due_at_once_and_then_not_more_often_than_its_share_of_the_time(tmp_path: Path) -> None:
    saved = SavedWork(tmp_path)
    assert saved.is_due
    saved.save(UNLISTED, np.zeros(1 << 20, np.float32), {})
    assert not saved.is_due
