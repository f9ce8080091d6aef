"""A worker that the machine starts by itself: a systemd user unit, or a launchd agent on macOS.

Invariants: the invite is in a file that only this user reads, never on a command line; nothing needs root; what is
removed is what was written, by name, so that a wrong folder is not emptied.

The unit's sandbox hides the home folder but for the worker's own files and the Python that runs it. Memory that is
both writable and executable stays allowed: torch compiles its CPU kernels at run time and fails without it.
"""

import os
import platform
import plistlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError, ManyhandsError
from protocol.exchange.store import naming_full_disks
from worker.governor.preferences import default_path
from worker.home import RunHome

LABEL = "org.manyhands.worker"
PERMANENT_FAILURES = "2 3 5 7"  # configuration, invite, refused, verification: trying again changes nothing
COMMAND_TIMEOUT_S = 90.0
_GROWING_PAUSES = "RestartSec=20s\nRestartSteps=8\nRestartMaxDelaySec=30min\n"
_EVEN_PAUSES = "RestartSec=60s\n"  # before systemd 254
_UNIT = """\
# Written by `manyhands worker install-service`; `manyhands worker uninstall` removes it.
[Unit]
Description=manyhands worker for run {run_id}
Documentation=https://github.com/manyhands/manyhands
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
Restart=on-failure
RestartPreventExitStatus={permanent}
{backoff}TimeoutStopSec=60s

# what is left over, and no more
Nice=19
IOSchedulingClass=idle
CPUWeight=20
IOWeight=20
OOMScoreAdjust=500

# what it may do
NoNewPrivileges=yes
CapabilityBoundingSet=
UMask=0077
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

# what it sees of the disk and the kernel
PrivateUsers=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=tmpfs
{binds}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes

[Install]
WantedBy=default.target

[X-Manyhands]
Home={home}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service of this user that starts a worker."""

    path: Path  # the unit or the plist
    home: Path  # the worker's

    @property
    def name(self) -> str:
        """What systemctl or launchctl call it."""
        return self.path.name if self.path.suffix == ".service" else self.path.stem


def render_unit(run: RunHome, options: Sequence[str], *, systemd_version: int) -> str:
    """The systemd user unit of a worker whose invite is in its run's folder. options: of `worker start`."""
    settings = default_path().parent
    writable = [run.home.absolute(), settings]
    # what the governor listens to: the session's bus and its display
    sockets = ["-%t/bus", "-%t/wayland-0", "-/tmp/.X11-unix", f"-{_escape(str(Path.home() / '.Xauthority'))}"]
    binds = [f"BindPaths={_escape(str(path))}" for path in writable]
    binds += [f"BindReadOnlyPaths={_escape(str(path))}" for path in _python_folders() if path not in writable]
    binds += [f"BindReadOnlyPaths={socket}" for socket in sockets]
    return _UNIT.format(
        run_id=run.run_id,
        command=" ".join(_quote(part) for part in _command(run, options)),
        permanent=PERMANENT_FAILURES,
        backoff=_GROWING_PAUSES if systemd_version >= 254 else _EVEN_PAUSES,
        binds="\n".join(binds),
        home=run.home.absolute(),
    )


def render_plist(run: RunHome, options: Sequence[str]) -> bytes:
    """The launchd agent of a worker whose invite is in its run's folder. options: of `worker start`."""
    out = str(run.folder.absolute() / "worker.out")
    return plistlib.dumps(
        {
            "Label": f"{LABEL}.{run.run_id[:8]}",
            "ProgramArguments": _command(run, options),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 60,
            "ProcessType": "Background",
            "LowPriorityIO": True,
            "Nice": 19,
            "Umask": 0o077,
            "StandardOutPath": out,
            "StandardErrorPath": out,
        }
    )


def find_services(which: str | None = None) -> list[Service]:
    """The services that were installed here; with `which`, those of runs whose id begins so."""
    if platform.system() == "Darwin":
        pattern, folder = f"{LABEL}.*.plist", _agents_folder()
    else:
        pattern, folder = "manyhands-*.service", _units_folder()
    found = [Service(path=path, home=home) for path in sorted(folder.glob(pattern)) if (home := _home_of(path))]
    return [service for service in found if which is None or _run_of(service.path).startswith(which[:8])]


def install(run: RunHome, options: Sequence[str]) -> Service:
    """Write the service of a run whose invite is stored, enable and start it.

    Raises ConfigError on a system without systemd or launchd, ManyhandsError, saying what to type, when the service was
    written but could not be started.
    """
    system = platform.system()
    if system not in ("Linux", "Darwin"):
        raise ConfigError(f"{system} has no service that is known here; `manyhands worker start INVITE --detach`")
    short = run.run_id[:8]
    if system == "Darwin":
        service = Service(path=_agents_folder() / f"{LABEL}.{short}.plist", home=run.home)
        content = render_plist(run, options)
    else:
        service = Service(path=_units_folder() / f"manyhands-{short}.service", home=run.home)
        default_path().parent.mkdir(parents=True, exist_ok=True)  # what is bound must be there
        content = render_unit(run, options, systemd_version=systemd_version()).encode()
    with naming_full_disks(service.path.parent):
        service.path.parent.mkdir(parents=True, exist_ok=True)
        service.path.write_bytes(content)
    _enable(service)
    return service


def uninstall(service: Service) -> None:
    """Stop, disable and remove a service."""
    if service.path.suffix == ".plist":
        _run("launchctl", "bootout", f"gui/{os.getuid()}/{service.name}")
    else:
        _run("systemctl", "--user", "disable", "--now", service.name)
        # without a manager nothing runs, but the link that `enable` made may be there
        (service.path.parent / "default.target.wants" / service.name).unlink(missing_ok=True)
    service.path.unlink(missing_ok=True)
    if service.path.suffix == ".service":
        _run("systemctl", "--user", "daemon-reload")


def purge(home: Path) -> list[Path]:
    """Remove what workers wrote in `home`, and the settings; returns what was there."""
    found = list_data(home)
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for folder in (home, default_path().parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return found


def list_data(home: Path) -> list[Path]:
    """What `purge` removes: the runs with their logs, the key, what the governor keeps, the settings."""
    names = ("runs", "identity.key", "pause.json", "traffic.json", "traffic.lock")
    return [path for path in (*(home / name for name in names), default_path()) if path.exists()]


def systemd_version() -> int:
    """Of the systemd that is installed; 0 when there is none."""
    answer = _run("systemctl", "--version")
    found = re.match(r"systemd (\d+)", answer.stdout) if answer else None
    return int(found[1]) if found else 0


def _enable(service: Service) -> None:
    if service.path.suffix == ".plist":
        domain = f"gui/{os.getuid()}"
        _run("launchctl", "bootout", f"{domain}/{service.name}")  # an older one
        answer = _run("launchctl", "bootstrap", domain, str(service.path))
        retry = f"launchctl bootstrap {domain} {service.path}"
    else:
        retry = f"systemctl --user enable --now {service.name}"
        running = _run("systemctl", "--user", "show-environment")
        if running is None or running.returncode != 0:
            raise ManyhandsError(
                f"wrote {service.path}, but no systemd user manager runs here (in a container there is none); "
                f"where one runs type `{retry}`, here `manyhands worker start INVITE --detach`"
            )
        _run("systemctl", "--user", "daemon-reload")
        answer = _run("systemctl", "--user", "enable", "--now", service.name)
    if answer is None or answer.returncode != 0:
        why = answer.stderr.strip().splitlines()[-1:] if answer else []
        raise ManyhandsError(
            f"wrote {service.path}, but it did not start{': ' if why else ''}{''.join(why)}; `{retry}`"
        )


def _run(*command: str) -> "subprocess.CompletedProcess[str] | None":
    """None when there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise ManyhandsError(f"`{' '.join(command)}` did not answer within {COMMAND_TIMEOUT_S:.0f} s") from error


def _command(run: RunHome, options: Sequence[str]) -> list[str]:
    home = str(run.home.absolute())
    start = [sys.executable, "-m", "manyhands", "worker", "start", str(run.folder.absolute() / "invite")]
    return [*start, "--home", home, "--quiet", *options]


def _python_folders() -> list[Path]:
    """Where the interpreter and the packages that it runs are: they may be below the home folder, which is hidden."""
    here = Path(__file__).resolve().parents[1]  # the packages themselves, installed or in a working copy
    places = [Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("purelib")), here]
    folders = {place.absolute() for place in places} | {Path(sys.executable).resolve().parents[1]}
    hidden = (Path.home(), Path("/home"), Path("/root"))
    inside = [folder for folder in folders if any(folder.is_relative_to(top) for top in hidden)]
    return sorted(f for f in inside if not any(f != other and f.is_relative_to(other) for other in inside))


def _units_folder() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(configured) if configured else Path.home() / ".config") / "systemd" / "user"


def _agents_folder() -> Path:
    return Path.home() / "Library" / "LaunchAgents"


def _home_of(path: Path) -> Path | None:
    """The worker's home that a service names; None for a file that is not ours."""
    if path.suffix == ".plist":
        command = plistlib.loads(path.read_bytes()).get("ProgramArguments", [])
        return Path(command[command.index("--home") + 1]) if "--home" in command else None
    found = re.search(r"^\[X-Manyhands\]\nHome=(.+)$", path.read_text(), re.MULTILINE)
    return Path(found[1]) if found else None


def _run_of(path: Path) -> str:
    return path.stem.removeprefix("manyhands-").removeprefix(f"{LABEL}.")


def _quote(text: str) -> str:
    """A word of ExecStart as it is, whatever it holds."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[^\w@%+=:,./\\$-]", escaped) else escaped


def _escape(path: str) -> str:
    """A path of BindPaths as it is: colons and blanks part its fields."""
    return re.sub(r"([\\: ])", r"\\\1", path).replace("%", "%%")
