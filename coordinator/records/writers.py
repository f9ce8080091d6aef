"""Writes merged rounds to TensorBoard or Weights & Biases, beside the run; both are extras.

Reads the rounds table every few seconds and passes on what is new; a run that is started again goes on where its writer
stopped. Nothing that fails here stops the run: it is logged, and tried again.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import structlog
from sqlalchemy import Engine, select

from coordinator.storage.database import RoundRow
from protocol.errors import ConfigError

log = structlog.get_logger()
WRITE_EVERY_S = 5.0
ROWS_A_WRITE = 1_000


class Writer(Protocol):
    """Takes scalars of rounds, in order. `next_round`, `next_evaluated`: the first that it has not yet."""

    next_round: int
    next_evaluated: int

    def write_round(self, row: RoundRow) -> None: ...
    def write_held_out(self, row: RoundRow) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def add_writers(
    engine: Engine, *, name: str, run_id: str, tensorboard: Path | None = None, wandb: str | None = None
) -> Callable[[], Coroutine[Any, Any, None]]:
    """Open the writers that are asked for and return what keeps them writing until it is cancelled.

    `tensorboard`: a folder; `wandb`: a project. Raises ConfigError when an extra is missing or W&B cannot be reached.
    """
    writers: list[Writer] = []
    if tensorboard is not None:
        writers.append(_TensorBoard(tensorboard / f"{name}-{run_id}"))
    if wandb is not None:
        writers.append(_Wandb(wandb, name, run_id))
    return lambda: _keep_writing(engine, writers)


async def _keep_writing(engine: Engine, writers: Sequence[Writer]) -> None:
    one_at_a_time = Lock()  # a thread that was writing when it was cancelled goes on to its end

    def write(writer: Writer, *, at_end: bool = False) -> None:
        try:
            with one_at_a_time:
                write_news(engine, writer)
        except Exception:
            log.exception("rounds could not be written", writer=type(writer).__name__)
        if at_end:
            writer.close()

    try:
        while True:
            for writer in writers:
                await asyncio.to_thread(write, writer)
            await asyncio.sleep(WRITE_EVERY_S)
    finally:
        for writer in writers:
            write(writer, at_end=True)


def write_news(engine: Engine, writer: Writer) -> None:
    """Pass on what the writer has not yet. Blocks while it reads and writes."""
    closed = select(*RoundRow.__table__.columns).order_by(RoundRow.round).limit(ROWS_A_WRITE)
    while rows := _read(engine, closed.where(RoundRow.round >= writer.next_round)):
        for row in rows:
            writer.write_round(row)
            writer.next_round = row.round + 1
    evaluated = closed.where(RoundRow.held_out_loss.is_not(None))
    while rows := _read(engine, evaluated.where(RoundRow.round >= writer.next_evaluated)):
        for row in rows:
            writer.write_held_out(row)
            writer.next_evaluated = row.round + 1
    writer.flush()


def _read(engine: Engine, query: Any) -> Sequence[Any]:
    with engine.connect() as connection:
        return connection.execute(query).all()


@dataclass
class _TensorBoard:
    """Scalars against tokens. What was written is noted beside the event files, for the next start."""

    folder: Path

    def __post_init__(self) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise _missing("tensorboard", error) from error
        self.folder.mkdir(parents=True, exist_ok=True)
        self._noted = self.folder / "written"
        noted = self._noted.read_text().split() if self._noted.is_file() else ["0", "0"]
        self.next_round, self.next_evaluated = int(noted[0]), int(noted[1])
        self._writer = SummaryWriter(str(self.folder), filename_suffix=f".{self.next_round}")

    def write_round(self, row: RoundRow) -> None:
        for tag, value in _scalars(row).items():
            self._writer.add_scalar(tag, value, row.tokens_after, walltime=row.unix_s)

    def write_held_out(self, row: RoundRow) -> None:
        self._writer.add_scalar("loss/held_out", row.held_out_loss, row.tokens_after, walltime=row.unix_s)

    def flush(self) -> None:
        self._writer.flush()
        self._noted.write_text(f"{self.next_round} {self.next_evaluated}")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run for the run, resumed under its id. Its environment variables (WANDB_MODE, …) are its own."""

    def __init__(self, project: str, name: str, run_id: str) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _missing("wandb", error) from error
        try:
            self._run = wandb.init(project=project, name=name, id=run_id, resume="allow")
        except wandb.errors.Error as error:
            raise ConfigError(f"Weights & Biases: {str(error).splitlines()[0]}") from error
        self._run.define_metric("*", step_metric="tokens")
        self.next_round = int(self._run.summary.get("round", -1)) + 1
        self.next_evaluated = int(self._run.summary.get("evaluated_round", -1)) + 1

    def write_round(self, row: RoundRow) -> None:
        self._run.log({"tokens": row.tokens_after, "round": row.round, **_scalars(row)})

    def write_held_out(self, row: RoundRow) -> None:
        values = {"tokens": row.tokens_after, "evaluated_round": row.round, "loss/held_out": row.held_out_loss}
        self._run.log(values)

    def flush(self) -> None:
        pass  # it sends by itself

    def close(self) -> None:
        self._run.finish()


def _scalars(row: RoundRow) -> dict[str, float]:
    return {
        "loss/train": row.mean_loss,
        "round/seconds": row.seconds,
        "round/contributions": float(row.contributions),
        "round/payload_bytes": float(row.payload_bytes),
    }


def _missing(extra: str, error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(f"--{extra} needs {error.name}: `pip install 'manyhands[{extra}]'`")
