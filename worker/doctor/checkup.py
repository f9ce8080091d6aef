"""The doctor's checks in order. Loads torch: the command line imports it when it runs."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protocol.documents import Invite
from protocol.errors import ConfigError, ManyhandsError
from protocol.identity import Identity
from protocol.invite import decode_invite
from worker.background import running_pid
from worker.device import choose_device
from worker.doctor import joined, machine, outside
from worker.doctor.findings import Finding, Level
from worker.governor.preferences import default_path, load_preferences
from worker.home import RunHome

JOIN_HINT = "`--join` measures it: it joins for some seconds without taking work"


@dataclass(kw_only=True)
class Checkup:
    """What is looked at; `findings` grows as it goes on, and `on_progress` is told what comes."""

    home: Path
    name: str
    device_name: str = "auto"
    page: str | None = None
    join: bool = False
    on_progress: Callable[[str], None] = lambda _: None
    findings: list[Finding] = field(default_factory=list)

    def look_at_machine(self) -> torch.device | None:
        """Everything that needs no coordinator; the device to compute on, None when there is none of that name."""
        self.on_progress("versions, memory, disk")
        self.findings += [machine.check_python(), machine.check_packages()]
        try:
            device = choose_device(self.device_name)
        except ConfigError as error:
            self.findings.append(Finding(topic="device", level=Level.PROBLEM, text=str(error)))
            return None
        self.on_progress("device")
        self.findings += [machine.check_device(device), machine.check_gpu(device)]
        try:
            self.findings.append(machine.check_compiling(device, load_preferences(default_path()).compile))
        except ConfigError as error:
            self.findings.append(Finding(topic="settings", level=Level.ATTENTION, text=str(error)))
        self.findings += [machine.check_memory(), machine.check_disk(self.home), machine.check_power()]
        return device

    def look_at_run(self, invite_text: str, device: torch.device | None) -> None:
        """What the invite leads to. Raises nothing that a coordinator could cause."""
        try:
            invite, key = decode_invite(invite_text, now_unix_s=time.time())
        except ManyhandsError as error:
            self.findings.append(Finding(topic="invite", level=Level.PROBLEM, text=str(error)))
            return
        run = RunHome(self.home, invite.run_id)
        self.findings.append(outside.check_invite(invite))
        self.on_progress(f"the coordinator at {invite.address}")
        seen = asyncio.run(outside.look_at(invite, self.page))
        self.findings += seen.findings
        if not seen.reached or device is None:
            return
        pid = running_pid(run)
        if self.join and pid is None:
            steps_per_s = self._visit(invite_text, invite, key, run, device)
        else:
            steps_per_s = self._recall(run, pid)
        status = seen.status
        self.findings += [
            _check_upload(status, _known_peer(run)),
            _predict_share(steps_per_s, status, _known_peer(run)),
        ]

    def _visit(self, invite_text: str, invite: Invite, key: bytes, run: RunHome, device: torch.device) -> float:
        """Measure what only those who joined can; inner steps a second, 0 when there are none."""
        self.on_progress("joining for a moment")
        try:
            visit = asyncio.run(joined.visit(invite_text, invite, key, run, self.name, device))
        except ManyhandsError as error:
            self.findings.append(Finding(topic="joining", level=Level.PROBLEM, text=str(error)))
            return 0.0
        self.findings.append(joined.check_download(visit.download_bps))
        self.on_progress("the run's model")
        findings, steps_per_s = joined.check_model(visit, device)
        self.findings += findings
        return steps_per_s

    def _recall(self, run: RunHome, pid: int | None) -> float:
        """What a worker of this run has measured while it worked here."""
        status = run.read_status()
        steps_per_s = float(str(status.get("steps_per_s", 0.0)))
        if pid is not None:
            text, advice = f"a worker of this run is at work (process {pid})", "`manyhands worker stop`, then `--join`"
        else:
            text, advice = "what the model is, the coordinator tells those who join", JOIN_HINT
        if steps_per_s > 0.0:
            tokens = float(str(status.get("tokens_per_s", 0.0)))
            text = f"{steps_per_s:.2f} inner steps/s, {tokens:,.0f} tokens/s when a worker last computed here"
            figures: dict[str, float | int | str] = {"steps_per_s": round(steps_per_s, 3)}
            self.findings.append(Finding(topic="speed", level=Level.OK, text=text, figures=figures))
        else:
            self.findings.append(
                Finding(topic="speed", level=Level.UNKNOWN, text=f"not measured: {text}", advice=advice)
            )
        text = "not measured: the coordinator sends data to those who joined only"
        self.findings.append(Finding(topic="download", level=Level.UNKNOWN, text=text, advice=advice))
        return steps_per_s


def _known_peer(run: RunHome) -> str:
    """This machine's peer id; empty before its first start."""
    return Identity.load_or_create(run.identity_path).peer_id if run.identity_path.exists() else ""


def _check_upload(status: dict[str, Any] | None, peer: str) -> Finding:
    """The coordinator takes nothing but payloads that it expects, so its own word on earlier ones is all there is."""
    rows = [row for row in (status or {}).get("peers", []) if row.get("peer") == peer and row.get("upload_bps", 0) > 0]
    if rows:
        text = f"{rows[0]['upload_bps'] / 1e6:,.1f} Mbit/s in earlier rounds, says the coordinator"
        figures: dict[str, float | int | str] = {"upload_bps": rows[0]["upload_bps"]}
        return Finding(topic="upload", level=Level.OK, text=text, figures=figures)
    text = "not measured: the coordinator takes nothing but contributions; it measures the first of them"
    return Finding(topic="upload", level=Level.UNKNOWN, text=text)


def _predict_share(steps_per_s: float, status: dict[str, Any] | None, peer: str) -> Finding:
    """This machine's part of a round: leases are sized by speed."""
    if status is None:
        text = "unknown: the run's page, which tells what others compute, cannot be seen from here"
        return Finding(
            topic="share", level=Level.UNKNOWN, text=text, advice="`--page URL` where the run has a public page"
        )
    if steps_per_s <= 0.0:
        return Finding(
            topic="share", level=Level.UNKNOWN, text="unknown without this machine's speed", advice=JOIN_HINT
        )
    workers = [row for row in status["peers"] if row["role"] == "worker" and row["status"] != "gone"]
    others = sum(float(row["steps_per_s"]) for row in workers if row["peer"] != peer)
    share = steps_per_s / (steps_per_s + others)
    num_others = sum(row["peer"] != peer for row in workers)
    text = f"about {100 * share:.0f} % of the run, beside {num_others} others that make {others:.2f} steps/s together"
    return Finding(topic="share", level=Level.OK, text=text, figures={"share": round(share, 4)})
