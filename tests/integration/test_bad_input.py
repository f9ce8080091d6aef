"""What a user gets for bad input: one line that says what to do, and a non-zero exit code. Real commands."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.documents import Invite
from protocol.identity import Identity
from protocol.invite import decode_invite, encode_invite
from tests.processes import TINY_RUN, RunningCoordinator, free_port, start_coordinator, write_text


def fail(*arguments: str, cwd: Path, timeout_s: float = 60.0) -> tuple[int, str]:
    """Run a command that must fail: its exit code, and the one line that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "manyhands", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]  # log lines are JSON
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("manyhands: ")
    return done.returncode, lines[0]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    folder = tmp_path_factory.mktemp("shared") / "run"
    with start_coordinator(folder, options=["--no-validator"], invite={"uses": 1}) as running:
        yield running


def test_nearest_key_is_named_when_run_toml_has_an_unknown_one(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nlearning_rat = 0.1\n")
    code, line = fail("coordinator", "start", "run.toml", cwd=tmp_path)
    assert code == 2
    assert "train.learning_rat" in line
    assert "did you mean `learning_rate`?" in line


def test_path_is_named_when_the_text_is_missing(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[data]\nsource = "no/such/text.txt"\n')
    code, line = fail("coordinator", "start", "run.toml", cwd=tmp_path)
    assert code == 2
    assert "no/such/text.txt" in line


def test_nearest_architecture_is_named_when_it_is_unknown(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "run.toml").write_text(f'[model]\narchitecture = "lama"\n[data]\nsource = "{text}"\n')
    code, line = fail("coordinator", "start", "run.toml", cwd=tmp_path)
    assert code == 2
    assert "llama" in line


def test_init_is_named_when_run_toml_is_missing(tmp_path: Path) -> None:
    code, line = fail("coordinator", "start", "run.toml", cwd=tmp_path)
    assert code == 2
    assert "manyhands init" in line


def test_invite_is_refused_when_it_is_truncated(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    code, line = fail("worker", "start", coordinator.invite[:-10], cwd=tmp_path)
    assert code == 3
    assert "incomplete" in line


def test_invite_is_refused_when_it_is_forged(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    """Somebody else signs an invite to the real coordinator: only the coordinator can tell."""
    genuine, _ = decode_invite(coordinator.invite)
    forged = encode_invite(genuine, Identity.generate())
    code, line = fail("worker", "start", forged, "--home", "home", "--loopback", cwd=tmp_path)
    assert code == 3
    assert "forged" in line


def test_invite_is_refused_when_it_has_expired(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    genuine, _ = decode_invite(coordinator.invite)
    identity = Identity.load_or_create(coordinator.folder / "coordinator.key")
    past = Invite.model_validate({**genuine.model_dump(), "expires_unix_s": int(time.time()) - 1})
    code, line = fail("worker", "start", encode_invite(past, identity), cwd=tmp_path)
    assert code == 3
    assert "expired" in line


def test_invite_is_refused_when_it_is_used_up(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    from tests.processes import start_worker, wait_until

    with start_worker(coordinator.invite, tmp_path / "first") as first:
        wait_until(lambda: any(p["name"] == "first" for p in coordinator.status()["peers"]), 60)
        code, line = fail("worker", "start", coordinator.invite, "--home", "second", "--loopback", cwd=tmp_path)
        assert code == 3
        assert "used up" in line
        assert first.stop() == 0  # and whoever used it may come back
    with start_worker(coordinator.invite, tmp_path / "first") as again:
        wait_until(lambda: any(p["status"] != "gone" for p in coordinator.status()["peers"]), 60)
        assert again.stop() == 0, again.last_lines()


def test_worker_says_so_when_the_coordinator_is_unreachable(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    genuine, _ = decode_invite(coordinator.invite)
    identity = Identity.load_or_create(coordinator.folder / "coordinator.key")
    elsewhere = Invite.model_validate({**genuine.model_dump(), "address": f"127.0.0.1:{free_port()}"})
    code, line = fail(
        "worker", "start", encode_invite(elsewhere, identity), "--home", "home", "--loopback", cwd=tmp_path
    )
    assert code == 4
    assert "cannot reach the coordinator" in line


def test_worker_refuses_when_another_key_answers(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    genuine, _ = decode_invite(coordinator.invite)
    identity = Identity.load_or_create(coordinator.folder / "coordinator.key")
    pinned = Invite.model_validate({**genuine.model_dump(), "tls_fingerprint": "ab" * 32})
    code, line = fail("worker", "start", encode_invite(pinned, identity), "--home", "home", "--loopback", cwd=tmp_path)
    assert code == 7
    assert "not the coordinator of this invite" in line


def test_plaintext_is_refused_when_it_is_dialled(coordinator: RunningCoordinator) -> None:
    import grpc

    channel = grpc.insecure_channel(coordinator.address)
    with pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=1.0)
    channel.close()


def test_key_is_named_when_a_port_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = tmp_path / "run.toml"
        spec.write_text(toml_of(tmp_path, listen=f"127.0.0.1:{port}", http=f"127.0.0.1:{free_port()}"))
        code, line = fail("coordinator", "start", str(spec), "--no-validator", cwd=tmp_path)
    assert code == 2
    assert "coordinator.listen" in line


def test_page_key_is_named_when_its_port_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = tmp_path / "run.toml"
        spec.write_text(toml_of(tmp_path, listen=f"127.0.0.1:{free_port()}", http=f"127.0.0.1:{port}"))
        code, line = fail("coordinator", "start", str(spec), "--no-validator", cwd=tmp_path)
    assert code == 2
    assert "coordinator.http" in line


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_disk_is_named_when_it_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        spec = tmp_path / "run.toml"
        spec.write_text(toml_of(tmp_path, listen=f"127.0.0.1:{free_port()}", http=f"127.0.0.1:{free_port()}"))
        code, line = fail("coordinator", "start", str(spec), "--folder", str(disk / "run"), cwd=tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert code == 6
    assert "full" in line
    assert str(disk) in line


def toml_of(folder: Path, **addresses: str) -> str:
    import tomlkit

    text = write_text(folder / "text.txt")
    spec = {**TINY_RUN, "data": {**TINY_RUN["data"], "source": str(text)}, "coordinator": addresses}
    return tomlkit.dumps(spec)
