"""Checkpoints: a round's θ as a Hugging Face model folder, which AutoModelForCausalLM and AutoTokenizer open offline.

    model.safetensors, config.json, generation_config.json      the model, float32
    tokenizer.json, tokenizer_config.json                       the run's tokenizer
    README.md                                                   the model card: who trained it, on what, how well
    manyhands.json                                              the same for programs, and the hash of every file

Invariants: a folder that has its name is complete and on the disk (written beside, flushed, renamed);
`verify_checkpoint` finds any altered file. It holds neither the outer optimizer's momentum nor anybody's inner state: a
run goes on from state blobs, not from here.

Shape letters: D parameters.
"""

import contextlib
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from protocol import parameters
from protocol.errors import ConfigError, VerificationError
from protocol.run_spec import RunSpec
from protocol.tokenizer import tokenizer_from_json
from worker.disk import flush, translate_disk_errors
from worker.model_card import CheckpointCard, Contributor, render_card
from worker.tasks import TASKS
from worker.tasks.causal_lm import load_pretrained, quiet_transformers

__all__ = [
    "CheckpointCard",
    "Contributor",
    "checkpoint_folder",
    "export_checkpoint",
    "list_checkpoints",
    "prune_checkpoints",
    "read_card",
    "verify_checkpoint",
    "write_checkpoint",
]

_RECORD = "manyhands.json"
_NAME = re.compile(r"round-\d{8,}")
_MAX_RECORD_BYTES = 64 << 20


def checkpoint_folder(parent: Path, round_number: int) -> Path:
    """Where the checkpoint of a round belongs."""
    return parent / f"round-{round_number:08d}"


def list_checkpoints(parent: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest round first."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and (path / _RECORD).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def find_checkpoint(place: Path) -> Path:
    """The newest checkpoint of a run folder, or the checkpoint or model folder that `place` is. Raises ConfigError."""
    if (place / "config.json").is_file():
        return place
    found = list_checkpoints(place / "checkpoints")
    if not found:
        raise ConfigError(f"{place} holds no checkpoint; name a run folder that has one, or a model folder")
    return found[-1]


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and what interrupted writes left. No write may be under way."""
    if keep < 1:
        raise ValueError("at least one checkpoint is kept")
    for path in [*list_checkpoints(parent)[:-keep], *parent.glob(".round-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    *,
    spec: RunSpec,
    theta: NDArray[np.float32],
    vocabulary_size: int,
    tokenizer_json: bytes,
    card: CheckpointCard,
    model_config: bytes | None = None,
) -> None:
    """Write θ, float32 (D,), as the model folder `folder`; one that is there is replaced when the new one is complete.

    model_config: what the task's `config_json` gave, where `spec.model.initial_weights` is on another machine. Raises
    VerificationError when θ does not fit the model or the tokenizer is none, ConfigError, DiskFullError.
    """
    task = TASKS["causal_lm"]
    if model_config is None:
        model = task.build_model(spec, vocabulary_size, spec.seed)
    else:
        model = task.build_from_config(model_config, spec.seed)
    parameters.assign(model, theta)
    end_id = tokenizer_from_json(tokenizer_json).end_of_text_id
    with _replacing(folder) as temporary:
        _save_model(temporary, model, end_id)
        _save_tokenizer(temporary, tokenizer_json, end_id)
        (temporary / "README.md").write_text(render_card(spec, theta.size, card), encoding="utf-8")
        record = {"card": asdict(card), "theta_sha256": _hash_theta(theta), "files": _hash_files(temporary)}
        (temporary / _RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def read_card(folder: Path) -> CheckpointCard:
    """The card of a checkpoint. Raises ConfigError when the folder is none, VerificationError when it is damaged."""
    return _card_of(_read_record(folder), folder)


def verify_checkpoint(folder: Path) -> CheckpointCard:
    """Check every file against its hash, and that the folder opens and holds the recorded θ; returns its card.

    The record is not signed: whether this θ is the run's is for the ledger to say, which names `card.digest`. Raises
    ConfigError when the folder is no checkpoint, VerificationError when anything differs.
    """
    record = _read_record(folder)
    card = _card_of(record, folder)
    if record.get("files") != _hash_files(folder):
        raise VerificationError(f"{folder}: a file is not the one that was written; export the checkpoint again")
    if record.get("theta_sha256") != _hash_theta(parameters.flatten(load_pretrained(folder))):
        raise VerificationError(f"{folder}: its weights are not those of its record; export the checkpoint again")
    return card


def export_checkpoint(source: Path, target: Path) -> CheckpointCard:
    """Copy a checkpoint to `target`, which may be an older checkpoint, and verify the copy; returns its card.

    Raises ConfigError when `source` is no checkpoint or `target` holds something else, VerificationError,
    DiskFullError; `target` then is as it was.
    """
    read_card(source)
    if target.exists() and not (target / _RECORD).is_file():
        raise ConfigError(f"{target} is there already and is not a checkpoint; choose another name")
    try:
        with _replacing(target) as temporary:
            for path in source.iterdir():
                shutil.copyfile(path, temporary / path.name)
            return verify_checkpoint(temporary)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}; choose another place") from error


def _save_model(folder: Path, model: Any, end_id: int) -> None:
    model.config.use_cache = True  # off in training; without it generation is slow
    model.config.eos_token_id = end_id
    # not config.pad_token_id: whoever trains on would train without a gradient for that token
    model.generation_config = transformers.GenerationConfig(eos_token_id=end_id, pad_token_id=end_id)
    with quiet_transformers():
        model.save_pretrained(folder)


def _save_tokenizer(folder: Path, tokenizer_json: bytes, end_id: int) -> None:
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    end_of_text = tokenizers.Tokenizer.from_buffer(tokenizer_json).id_to_token(end_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its name, flushed to the disk, if the block ends well."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    previous = folder.with_name(f".{folder.name}.previous")
    with translate_disk_errors(folder):
        try:
            if previous.exists() and not folder.exists():  # the power went between the two renames below
                previous.rename(folder)
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.iterdir(), temporary]:
                flush(path)
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
            temporary.rename(folder)
            flush(folder.parent)
            shutil.rmtree(previous, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _RECORD
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise VerificationError(f"{path} is too large to be a checkpoint's record")
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} is not a checkpoint: it has no {_RECORD}") from error
    except ValueError as error:
        raise VerificationError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise VerificationError(f"{path} is damaged: not a JSON object")
    return record


def _card_of(record: dict[str, Any], folder: Path) -> CheckpointCard:
    try:
        fields = dict(record["card"])
        contributors = tuple(Contributor(**entry) for entry in fields.pop("contributors"))
        return CheckpointCard(**fields, contributors=contributors)
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(f"{folder / _RECORD} is damaged: {error}") from error


def _hash_files(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != _RECORD and path.is_file():
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _hash_theta(theta: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(theta, "<f4").data).hexdigest()
