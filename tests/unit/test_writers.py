"""Rounds go to TensorBoard and Weights & Biases once each; a missing extra is told in one line."""

import asyncio
import builtins
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from coordinator.records import writers
from coordinator.records.writers import add_writers
from protocol.errors import ConfigError
from tests.recorded_run import RUN_ID, RecordedRun


def play(run: RecordedRun, rounds: int) -> None:
    for _ in range(rounds):
        run.report(*run.identities)
        run.contribute(*run.identities)


async def write_once(run: RecordedRun, **options: Any) -> None:
    task = asyncio.create_task(add_writers(run.database.readers, name="tiny", run_id=RUN_ID, **options)())
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.wait({task}, timeout=20)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(tokens, value) by tag, of all event files, by what wrote them."""
    from tensorboardX.event_file_writer import event_pb2  # type: ignore[attr-defined] # only with the extra

    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:  # a record: length (8), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
            data = data[16 + length :]
    return found


def read_logs(folder: Path, awaited: bytes) -> list[bytes]:
    """What W&B keeps of each run that it could not send. Its own process may still write when it says it is done."""
    deadline_s = time.monotonic() + 20.0
    while True:
        logs = [path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb")]
        if awaited in b"".join(logs) or time.monotonic() > deadline_s:
            return logs
        time.sleep(0.1)


async def test_each_round_is_in_tensorboard_once_when_the_coordinator_was_started_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run = RecordedRun(tmp_path)
    (ann,) = run.meet("ann")
    run.join(ann)
    play(run, 3)
    await write_once(run, tensorboard=tmp_path / "board")
    play(run, 2)
    await write_once(run, tensorboard=tmp_path / "board")
    found = read_events(tmp_path / "board" / f"tiny-{RUN_ID}")
    assert [tokens for tokens, _ in found["loss/train"]] == [80, 160, 240, 320, 400]
    assert [value for _, value in found["loss/train"]] == pytest.approx([3.0, 2.9, 2.8, 2.7, 2.6])
    assert [tokens for tokens, _ in found["loss/held_out"]] == [80, 240, 400]
    run.database.close()


async def test_rounds_are_logged_to_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = RecordedRun(tmp_path)
    (ann,) = run.meet("ann")
    run.join(ann)
    play(run, 3)
    await write_once(run, wandb="manyhands-test")
    (logged,) = read_logs(tmp_path, b"loss/held_out")
    assert b"loss/held_out" in logged
    run.database.close()


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [({"tensorboard": Path("x")}, "tensorboardX", "tensorboard"), ({"wandb": "x"}, "wandb", "wandb")],
)
def test_missing_extra_is_one_line_that_says_what_to_install(
    option: dict[str, Any], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=rf"needs {module}: `pip install 'manyhands\[{extra}\]'`"):
        writers.add_writers(None, name="tiny", run_id=RUN_ID, **option)  # type: ignore[arg-type] # not reached
