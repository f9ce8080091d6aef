"""What only those who joined can measure: the run's own model, and transfers. Asked for by `doctor --join`.

The session lasts some seconds and never says which state it holds: a coordinator leases to those alone who do, so no
work is handed out and none is lost. What stays is what every join leaves with the coordinator: this machine in its list
of peers, as gone, and, for a key that it has not seen, one use of the invite. This machine's own key is taken where
there is one; else one that is forgotten. Blobs go to a temporary folder.
"""

import asyncio
import math
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from protocol.documents import Genesis, Invite
from protocol.errors import ConfigError, DeviceMemoryError, ManyhandsError, RefusedError
from protocol.exchange.store import BlobStore
from protocol.identity import Identity
from protocol.policy import MOST_MUON_SHARE, choose_optimizer
from protocol.run_spec import AUTO
from protocol.wire import coordinator_pb2 as pb
from worker.daemon import MAX_CONFIG_BYTES
from worker.device import describe_device
from worker.doctor.findings import Finding, Level
from worker.doctor.machine import WORKER_BYTES, available_bytes
from worker.home import RunHome
from worker.link import CoordinatorLink, Introduction
from worker.preparation import measure_speed, tune
from worker.trainer import Trainer

TRANSFER_S = 3.0
BENCHMARK_S = 3.0
DEAR_OPTIMIZER_SHARE = 0.3  # of an inner step
ENOUGH_BYTES = 32 << 20  # for a download that is worth a number
STATE_COPIES = 6  # vectors of float32 beside the trainer's: θ, error feedback, two of work, and two while merging
TRAINER_COPIES = 4  # before it is measured: weights, gradients, the optimizer's two


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What was brought back from a session."""

    genesis: Genesis
    model_config: bytes
    download_bps: float
    peer: str


async def visit(invite_text: str, invite: Invite, key: bytes, run: RunHome, name: str, device: torch.device) -> Visit:
    """Join, fetch what the run is, measure the download, leave.

    Raises ConfigError when the invite would be used up by it, ManyhandsError when the coordinator does not let it in.
    """
    identity = _identity(run, invite)
    with tempfile.TemporaryDirectory(prefix="manyhands-doctor-") as folder:
        store = BlobStore(Path(folder))
        async with CoordinatorLink(invite_text, invite, key, identity) as link:
            await link.join(
                Introduction(
                    name=name,
                    device=describe_device(device),
                    software=f"manyhands {version('manyhands')} {platform.system()}"[:64],
                ),
                _refuse_to_wait,
            )
            genesis = link.genesis
            await link.fetch_small_blobs([genesis.model_config_hash], store, MAX_CONFIG_BYTES)
            download_bps = await _measure_download(link)
            link.send(leaving=pb.Leaving(reason="the doctor has seen enough"))
            await link.drain()
        return Visit(
            genesis=genesis,
            model_config=store.read(genesis.model_config_hash),
            download_bps=download_bps,
            peer=identity.peer_id,
        )


def _refuse_to_wait(reason: str) -> None:
    raise RefusedError(f"{reason}; once it is given, try again")


def check_download(download_bps: float) -> Finding:
    """What came from the coordinator, in bits a second."""
    figures: dict[str, float | int | str] = {"download_bps": round(download_bps)}
    if download_bps <= 0.0:
        text = f"nothing arrived within {TRANSFER_S:.0f} s"
        return Finding(topic="download", level=Level.ATTENTION, text=text, advice="check the network")
    text = f"{download_bps / 1e6:,.1f} Mbit/s from the coordinator"
    return Finding(topic="download", level=Level.OK, text=text, figures=figures)


def check_model(seen: Visit, device: torch.device) -> tuple[list[Finding], float]:
    """Build the run's trainer as a worker does and let it make steps on random tokens; also the inner steps a second.

    The model is not built when it cannot fit: on a CPU the system would end some process instead of raising.
    """
    genesis = seen.genesis
    model = f"{genesis.num_parameters:,} parameters"
    least = WORKER_BYTES + 4 * (TRAINER_COPIES + STATE_COPIES) * genesis.num_parameters
    if device.type == "cpu" and least > available_bytes():
        text = f"{model} need {least / 1e9:.1f} GB at least; {available_bytes() / 1e9:.1f} GB are free"
        advice = "close other programs, or take a machine with more memory"
        return [Finding(topic="model", level=Level.PROBLEM, text=text, advice=advice)], 0.0
    before_bytes = _used_bytes(device)
    try:
        trainer = Trainer(genesis.spec, genesis.vocabulary_size, device, model_config=seen.model_config)
        tune(trainer)
        speed = measure_speed(trainer, BENCHMARK_S)
    except DeviceMemoryError as error:
        advice = "`--device cpu`, or a device with more memory"
        return [Finding(topic="model", level=Level.PROBLEM, text=f"{model}: {error}", advice=advice)], 0.0
    except ManyhandsError as error:
        advice = "`pip install --upgrade manyhands` may know this model"
        return [Finding(topic="model", level=Level.PROBLEM, text=str(error), advice=advice)], 0.0
    training_bytes = max(0, _used_bytes(device) - before_bytes)
    findings = [
        _speed(trainer, speed.steps_per_s),
        _optimizer(trainer, speed.optimizer_share),
        _batch(trainer),
        _memory(model, genesis, training_bytes, device),
    ]
    return findings, speed.steps_per_s


def _speed(trainer: Trainer, steps_per_s: float) -> Finding:
    tokens_per_s = steps_per_s * trainer.spec.step_tokens
    kind = "bfloat16 autocast" if trainer.autocast_dtype is not None else "float32"
    text = f"{steps_per_s:.2f} inner steps/s, {tokens_per_s:,.0f} tokens/s, in {kind}"
    figures: dict[str, float | int | str] = {"steps_per_s": round(steps_per_s, 3), "tokens_per_s": round(tokens_per_s)}
    inner_steps = trainer.spec.round.inner_steps
    if isinstance(inner_steps, int) and inner_steps / steps_per_s > 3600.0:
        advice = "a round would take over an hour; a faster device, or more threads"
        return Finding(topic="speed", level=Level.ATTENTION, text=text, advice=advice, figures=figures)
    return Finding(topic="speed", level=Level.OK, text=text, figures=figures)


def _optimizer(trainer: Trainer, share: float) -> Finding:
    """What the inner optimizer costs. Muon's part does not grow with the batch, and AdamW learns far less a step."""
    name = trainer.optimizer_name
    text = f"{share:.0%} of an inner step is {name}'s update"
    if trainer.spec.train.optimizer == AUTO:
        chosen, _ = choose_optimizer([share])
        text += f"; among machines like this `auto` takes {chosen} (muon up to {MOST_MUON_SHARE:.0%})"
    figures: dict[str, float | int | str] = {"optimizer": name, "optimizer_share": round(share, 3)}
    if share > DEAR_OPTIMIZER_SHARE:
        advice = "for the run's operator: a larger train.batch_sequences spreads it over more tokens"
        return Finding(topic="optimizer", level=Level.ATTENTION, text=text, advice=advice, figures=figures)
    return Finding(topic="optimizer", level=Level.OK, text=text, figures=figures)


def _batch(trainer: Trainer) -> Finding:
    batch, micro = trainer.spec.train.batch_sequences, trainer.micro_batch
    accumulation = math.ceil(batch / micro)
    text = f"{micro} sequences at once of the run's {batch}" + (
        f", in {accumulation} passes a step" if accumulation > 1 else ": no accumulation"
    )
    figures: dict[str, float | int | str] = {"micro_batch": micro, "accumulation": accumulation}
    return Finding(topic="batch", level=Level.OK, text=text, figures=figures)


def _memory(model: str, genesis: Genesis, training_bytes: int, device: torch.device) -> Finding:
    exchange_bytes = 4 * STATE_COPIES * genesis.num_parameters
    # the trainer is still there: what is free now is beside it
    left_bytes = available_bytes() - exchange_bytes - (training_bytes if device.type != "cpu" else 0)
    text = (
        f"{model}: {training_bytes / 1e6:,.0f} MB to train (measured, with what torch loads for it) and "
        f"{exchange_bytes / 1e6:,.0f} MB to exchange; "
        f"{left_bytes / 1e9:.1f} GB remain free"
    )
    figures: dict[str, float | int | str] = {"training_bytes": training_bytes, "exchange_bytes": exchange_bytes}
    if left_bytes < 0:
        advice = "close other programs: the system may end the worker when it merges"
        return Finding(topic="model", level=Level.PROBLEM, text=text, advice=advice, figures=figures)
    if left_bytes < 1_000_000_000:
        advice = "tight; close other programs"
        return Finding(topic="model", level=Level.ATTENTION, text=text, advice=advice, figures=figures)
    return Finding(topic="model", level=Level.OK, text=text, figures=figures)


def _identity(run: RunHome, invite: Invite) -> Identity:
    if run.identity_path.exists():
        return run.identity()
    if invite.uses == 1:
        raise ConfigError("this invite lets one machine in, and a check would use it up; start the worker instead")
    return Identity.generate()


async def _measure_download(link: CoordinatorLink) -> float:
    """Bits a second of the run's last state, fetched over and over for a moment and thrown away."""
    meter = _Meter()
    started_s = time.perf_counter()
    try:
        async with asyncio.timeout(TRANSFER_S):
            while meter.total_bytes < ENOUGH_BYTES:
                meter.offset = 0
                await link.fetch(link.welcome.checkpoint_digest, 0, meter)
                if meter.offset == 0:
                    return 0.0
    except TimeoutError:
        pass
    return 8 * meter.total_bytes / (time.perf_counter() - started_s)


class _Meter:
    """A sink that counts."""

    end = 1 << 40  # more than any blob: it is fetched whole

    def __init__(self) -> None:
        self.offset = 0
        self.total_bytes = 0

    async def write(self, chunk: bytes | memoryview) -> None:
        self.offset += len(chunk)
        self.total_bytes += len(chunk)


def _used_bytes(device: torch.device) -> int:
    """At most, so far: of the device's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process(os.getpid()).memory_info().rss
