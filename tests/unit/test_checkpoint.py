"""worker.checkpoint, worker.model_card and worker.generate: a folder that other people's tools open."""

import errno
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from protocol import parameters
from protocol.errors import ConfigError, DiskFullError, VerificationError
from protocol.run_spec import RunSpec
from protocol.tokenizer import ByteTokenizer
from worker.checkpoint import (
    CheckpointCard,
    Contributor,
    checkpoint_folder,
    export_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_card,
    verify_checkpoint,
    write_checkpoint,
)
from worker.disk import translate_disk_errors, write_tensors
from worker.generate import generate
from worker.tasks.causal_lm import CausalLM
from worker.trainer import Trainer

VOCABULARY = 257
CPU = torch.device("cpu")
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
MIXTRAL = LLAMA | {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
PEER = "12D3KooW" + "a" * 44


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_spec(architecture: str = "llama", model: Any = None, initial_weights: Path | None = None) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": {
                "architecture": architecture,
                "config": LLAMA if model is None else model,
                "initial_weights": None if initial_weights is None else str(initial_weights),
            },
            "data": {"sequence_length": 16},
        }
    )


def make_card(round_number: int = 12, name: str = "Ada") -> CheckpointCard:
    return CheckpointCard(
        run_id="0123456789abcdef",
        name="tiny tales",
        round=round_number,
        digest="d" * 64,
        ledger_head="e" * 64,
        tokens=123_456,
        contributors=(Contributor(name=name, peer=PEER, tokens=123_456),),
        held_out_loss=math.log(8.0),
        plan="sign, 5 inner steps; adamw (muon: 77% of a step), rate 0.002, 2 workers",
    )


def make_theta(spec: RunSpec, seed: int = 5) -> NDArray[np.float32]:
    return parameters.flatten(CausalLM().build_model(spec, VOCABULARY, seed))


def write(folder: Path, spec: RunSpec, theta: NDArray[np.float32], card: CheckpointCard | None = None) -> None:
    write_checkpoint(
        folder,
        spec=spec,
        theta=theta,
        vocabulary_size=VOCABULARY,
        tokenizer_json=ByteTokenizer().to_json(),
        card=card or make_card(),
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def alter(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("architecture", "model"),
    [("llama", LLAMA), ("llama", LLAMA | {"tie_word_embeddings": True}), ("gpt2", GPT2), ("mixtral", MIXTRAL)],
)
def test_logits_and_loss_are_the_same_when_transformers_opens_it(
    tmp_path: Path, architecture: str, model: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(architecture, model)
    theta = make_theta(spec)
    write(tmp_path / "checkpoint", spec, theta)
    assert capfd.readouterr() == ("", "")  # transformers says nothing
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", local_files_only=True)
    trainer = Trainer(spec, VOCABULARY, CPU)
    rows = np.random.default_rng(0).integers(VOCABULARY, size=(4, 17))
    loss = trainer.evaluate(theta, rows, batch=4)
    inputs = torch.from_numpy(rows)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(opened(inputs).logits, trainer.model(inputs).logits)
        assert opened(inputs, labels=inputs).loss.item() == pytest.approx(loss, abs=1e-6)
    assert parameters.flatten(opened).tobytes() == theta.tobytes()
    assert opened.config.use_cache
    assert opened.generation_config.eos_token_id == 256


def test_tokenizer_gives_the_runs_ids_when_transformers_opens_it(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path / "checkpoint", spec, make_theta(spec))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint", local_files_only=True)
    text = "Grüße , don't 🙂\n\tx"
    assert tokenizer.encode(text) == ByteTokenizer().encode_to_array(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == ByteTokenizer.end_of_text_id
    assert (tmp_path / "checkpoint" / "tokenizer.json").read_bytes() == ByteTokenizer().to_json()


def test_run_goes_on_from_a_checkpoint_when_it_is_the_initial_weights(tmp_path: Path) -> None:
    spec = make_spec("gpt2", GPT2)
    theta = make_theta(spec)
    write(tmp_path / "checkpoint", spec, theta)
    model = CausalLM().build_model(make_spec(initial_weights=tmp_path / "checkpoint"), VOCABULARY, seed=0)
    assert parameters.flatten(model).tobytes() == theta.tobytes()
    with pytest.raises(ConfigError, match="vocabulary of 257"):
        CausalLM().build_model(make_spec(initial_weights=tmp_path / "checkpoint"), 300, seed=0)
    with pytest.raises(ConfigError, match=r"model\.initial_weights: .*no config\.json"):
        CausalLM().build_model(make_spec(initial_weights=tmp_path), VOCABULARY, seed=0)


def test_card_is_text_when_a_contributor_writes_markup(tmp_path: Path) -> None:
    spec = make_spec()
    card = make_card(name="[win](http://evil.example) | <b>x</b> `")
    write(tmp_path / "checkpoint", spec, make_theta(spec), card)
    text = (tmp_path / "checkpoint" / "README.md").read_text(encoding="utf-8")
    front_matter = text.split("---")[1]
    assert "library_name: transformers" in front_matter
    assert "perplexity 8)" in text
    assert "123,456" in text
    assert "| plan of the last round | sign, 5 inner steps; adamw" in text
    assert "<b>" not in text
    assert "](http" not in text
    assert read_card(tmp_path / "checkpoint") == card


def test_older_checkpoint_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path / "checkpoint", spec, make_theta(spec, seed=1), make_card(1))
    theta = make_theta(spec, seed=2)
    write(tmp_path / "checkpoint", spec, theta, make_card(2))
    assert verify_checkpoint(tmp_path / "checkpoint").round == 2
    assert names(tmp_path) == ["checkpoint"]


def test_older_checkpoint_stays_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path / "checkpoint", spec, make_theta(spec), make_card(1))
    with pytest.raises(VerificationError, match="parameters"):
        write(tmp_path / "checkpoint", spec, np.zeros(3, np.float32), make_card(2))
    with pytest.raises(VerificationError, match="tokenizer"):
        write_checkpoint(
            tmp_path / "checkpoint",
            spec=spec,
            theta=make_theta(spec),
            vocabulary_size=VOCABULARY,
            tokenizer_json=b"{}",
            card=make_card(2),
        )
    assert verify_checkpoint(tmp_path / "checkpoint").round == 1
    assert names(tmp_path) == ["checkpoint"]


def test_older_checkpoint_comes_back_when_the_power_went_between_the_renames(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path / "source", spec, make_theta(spec), make_card(2))
    write(tmp_path / "target", spec, make_theta(spec), make_card(1))
    (tmp_path / "target").rename(tmp_path / ".target.previous")
    alter(tmp_path / "source")
    with pytest.raises(VerificationError):
        export_checkpoint(tmp_path / "source", tmp_path / "target")
    assert verify_checkpoint(tmp_path / "target").round == 1
    assert names(tmp_path) == ["source", "target"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_disk_is_said_in_plain_words(tmp_path: Path, code: int) -> None:
    with pytest.raises(DiskFullError, match="disk"), translate_disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    with pytest.raises(FileNotFoundError), translate_disk_errors(tmp_path):
        (tmp_path / "absent").read_bytes()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path / "source", spec, make_theta(spec))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(DiskFullError):
            write(disk / "checkpoint", spec, make_theta(spec))
        with pytest.raises(DiskFullError):
            export_checkpoint(tmp_path / "source", disk / "checkpoint")
        with pytest.raises(DiskFullError):
            write_tensors(disk / "tensors", {"all": torch.zeros(1 << 16)})
        assert names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_copy_is_the_same_and_verified_when_exported(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path / "source", spec, make_theta(spec))
    assert export_checkpoint(tmp_path / "source", tmp_path / "target") == make_card()
    assert verify_checkpoint(tmp_path / "target") == make_card()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("x")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        export_checkpoint(tmp_path / "source", tmp_path / "letters")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        export_checkpoint(tmp_path / "letters", tmp_path / "other")
    assert (tmp_path / "letters" / "love.txt").exists()


def test_export_is_refused_when_a_file_was_altered(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path / "source", spec, make_theta(spec))
    alter(tmp_path / "source")
    with pytest.raises(VerificationError, match="a file is not"):
        export_checkpoint(tmp_path / "source", tmp_path / "target")
    assert names(tmp_path) == ["source"]
    (tmp_path / "source" / "manyhands.json").write_text(json.dumps({"card": {"round": 1}}))
    with pytest.raises(VerificationError, match="damaged"):
        read_card(tmp_path / "source")


def test_newest_are_kept_when_pruned(tmp_path: Path) -> None:
    spec = make_spec()
    write(checkpoint_folder(tmp_path, 9), spec, make_theta(spec))
    for number in (10, 11, 100_000_000):
        shutil.copytree(checkpoint_folder(tmp_path, 9), checkpoint_folder(tmp_path, number))
    (tmp_path / ".round-00000012.ab12.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round-00000011", "round-100000000"]
    assert names(tmp_path) == ["notes", "round-00000011", "round-100000000"]


def test_text_is_the_same_when_the_seed_is_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = make_spec("gpt2", GPT2)  # 64 positions
    write(tmp_path / "checkpoint", spec, make_theta(spec))
    folder = tmp_path / "checkpoint"
    one, same, other = (generate(folder, "Once", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one.startswith("Once")
    assert generate(folder, "Once", 5, temperature=0.0) == generate(folder, "Once", 5, temperature=0.0, seed=9)
    assert generate(folder, "", 5)
    assert generate(folder, "long " * 40, 100, temperature=0.0).startswith("long " * 40)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        generate(tmp_path, "Once", 5)
