"""Hosts on slow links, in network namespaces of this machine, and the network between them.

    coordinator ─────────────┐
    worker ──── 20/100 Mbit ─┤ router
    worker ─ nat ─ 20/100 ───┘

Every host is a network namespace, joined to the router's by a veth pair. `tc tbf` limits both directions of a worker's
link; there is no delay but that of its queue. A worker behind NAT shares its link with nobody, but its address means
nothing outside: the router drops what is sent there, and its NAT box lets in answers only.

Addresses are those set aside for tests of networks (198.18.0.0/15) and, behind NAT, for carriers (100.64.0.0/10).
Namespaces carry this process's id; they and all processes in them end with the network. What a killed benchmark left
behind is removed by the next one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "mhwan"
QUEUE = "burst 64kb latency 100ms"
TOOLS = ("ip", "tc", "iptables")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A namespace in which processes can be started. `port`: the router's end of its link."""

    namespace: str
    address: str
    port: str
    behind_nat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What went over a host's link so far, in bytes with all headers."""

    up_bytes: int
    down_bytes: int


class Network:
    """The router and its hosts. Made by `open_network`."""

    def __init__(self, up_mbps: int, down_mbps: int) -> None:
        self._limits = {"up": up_mbps, "down": down_mbps}
        self._num_links = 0
        self._router = self._add_namespace("router", forwards=True)
        _run("ip", "-n", self._router, "route", "add", "blackhole", "100.64.0.0/10")

    def add_coordinator(self) -> Host:
        """A host whose link is not limited."""
        namespace = self._add_namespace("coordinator")
        address, port = self._link(namespace)
        return Host(namespace=namespace, address=address, port=port)

    def add_worker(self, name: str, *, behind_nat: bool) -> Host:
        """A host on a limited link; its address is the one that it sees itself."""
        namespace = self._add_namespace(name)
        if not behind_nat:
            address, port = self._link(namespace, limited=True)
            return Host(namespace=namespace, address=address, port=port)
        box = self._add_namespace(f"nat-{name}", forwards=True)
        _, port = self._link(box, limited=True)
        _connect(namespace, "eth0", "100.64.0.2", box, "inside", "100.64.0.1")
        _run("ip", "-n", namespace, "route", "add", "default", "via", "100.64.0.1")
        _translate(box)
        return Host(namespace=namespace, address="100.64.0.2", port=port, behind_nat=True)

    def read_traffic(self, host: Host) -> Traffic:
        """Counted at the router's end of the link."""
        answer = _run("ip", "-n", self._router, "-json", "-statistics", "link", "show", "dev", host.port)
        counters = json.loads(answer)[0]["stats64"]
        return Traffic(up_bytes=counters["rx"]["bytes"], down_bytes=counters["tx"]["bytes"])

    def _add_namespace(self, name: str, *, forwards: bool = False) -> str:
        namespace = f"{PREFIX}-{os.getpid()}-{name}"
        _run("ip", "netns", "add", namespace)
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        if forwards:
            _run(*inside(namespace), "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        return namespace

    def _link(self, namespace: str, *, limited: bool = False) -> tuple[str, str]:
        """Join a namespace to the router; its address and the router's end."""
        self._num_links += 1
        subnet, port = f"198.18.{self._num_links}", f"port{self._num_links}"
        _connect(namespace, "eth0", f"{subnet}.2", self._router, port, f"{subnet}.1")
        _run("ip", "-n", namespace, "route", "add", "default", "via", f"{subnet}.1")
        if limited:
            _limit(namespace, "eth0", self._limits["up"])
            _limit(self._router, port, self._limits["down"])
        return f"{subnet}.2", port


@contextmanager
def open_network(*, up_mbps: int, down_mbps: int) -> Iterator[Network]:
    """A network that is gone at the end, with every process in it."""
    for pid in {pid for pid, _ in _list_namespaces() if not Path(f"/proc/{pid}").exists()}:
        _remove(pid)
    try:
        yield Network(up_mbps, down_mbps)
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C leaves nothing behind
        _remove(os.getpid())
        signal.signal(signal.SIGINT, before)


def find_obstacle() -> str | None:
    """What is missing here for a network, in one line; None when nothing is."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"missing: {', '.join(missing)} (packages iproute2 and iptables)" if missing else None


def _connect(one: str, one_end: str, one_address: str, other: str, other_end: str, other_address: str) -> None:
    pair = ("link", "add", one_end, "netns", one, "type", "veth", "peer", "name", other_end, "netns", other)
    _run("ip", *pair)
    for namespace, end, address in ((one, one_end, one_address), (other, other_end, other_address)):
        _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", end)
        _run("ip", "-n", namespace, "link", "set", end, "up")


def _limit(namespace: str, end: str, mbps: int) -> None:
    _run("tc", "-n", namespace, "qdisc", "add", "dev", end, "root", "tbf", "rate", f"{mbps}mbit", *QUEUE.split())


def _translate(box: str) -> None:
    """Let what is inside out under the box's address, and nothing in but answers."""
    for rule in (
        "-t nat -A POSTROUTING -o eth0 -j MASQUERADE",
        "-P FORWARD DROP",
        "-A FORWARD -i inside -j ACCEPT",
        "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
    ):
        _run(*inside(box), "iptables", *rule.split())


def _remove(owner: int) -> None:
    """Kill what runs in the namespaces of that process, and remove them."""
    for pid, namespace in _list_namespaces():
        if pid != owner:
            continue
        while processes := _run("ip", "netns", "pids", namespace).split():
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            time.sleep(0.01)
        _run("ip", "netns", "delete", namespace)


def _list_namespaces() -> list[tuple[int, str]]:
    """Those that this benchmark made: the process that did, and the name."""
    names = re.findall(rf"^({PREFIX}-(\d+)-\S+)", _run("ip", "netns", "list"), re.MULTILINE)
    return [(int(pid), name) for name, pid in names]


def inside(namespace: str) -> Sequence[str]:
    """What to put before a command that shall run in a namespace."""
    return ("ip", "netns", "exec", namespace)


def _run(*command: str) -> str:
    """Raises RuntimeError with what the command said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
