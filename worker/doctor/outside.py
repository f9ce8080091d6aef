"""What can be found out about a coordinator without joining its run: that it is the one, how far, and its clock.

Of the protocol only the challenge is read, which the coordinator says first; the session is then ended. Of its page,
where it can be seen from here, the status is read; the page belongs to the run when it names the run's id.
"""

import asyncio
import ipaddress
import json
import socket
import statistics
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protocol.documents import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Invite
from protocol.errors import ConnectionFailedError, ManyhandsError
from protocol.exchange.dial import dial, split_address
from protocol.wire import coordinator_pb2 as pb
from protocol.wire.coordinator_pb2_grpc import CoordinatorServiceStub
from worker.doctor.findings import Finding, Level

DEFAULT_PAGE_PORT = 7641
NUM_PINGS = 5
TIMEOUT_S = 5.0
MAX_CLOCK_OFFSET_S = 60.0
_MAX_STATUS_BYTES = 8 << 20


@dataclass(slots=True)
class Outside:
    """What was found, and the run's status where its page could be read."""

    findings: list[Finding] = field(default_factory=list)
    reached: bool = False
    status: dict[str, Any] | None = None


def check_invite(invite: Invite) -> Finding:
    """An invite that was decoded: how long it is good for."""
    hours = (invite.expires_unix_s - time.time()) / 3600
    text = f"run {invite.run_id[:8]} at {invite.address}, valid for {hours:.0f} h"
    if hours < 24:
        advice = "join soon: whoever has joined may come back later with the same invite"
        return Finding(topic="invite", level=Level.ATTENTION, text=text, advice=advice)
    return Finding(topic="invite", level=Level.OK, text=text)


async def look_at(invite: Invite, page: str | None) -> Outside:
    """Everything that shows from outside. page: the URL of the run's page; None: the usual port is tried."""
    found = Outside()
    try:
        channel = await dial(invite.address, invite.tls_fingerprint)
    except ManyhandsError as error:
        advice = "ask whoever invited you whether the run is up; check this machine's network"
        found.findings.append(Finding(topic="coordinator", level=Level.PROBLEM, text=str(error), advice=advice))
        return found
    try:
        found.findings += await _greet(channel, invite.address)
        found.reached = True
    except ConnectionFailedError as error:
        found.findings.append(Finding(topic="coordinator", level=Level.PROBLEM, text=str(error)))
    finally:
        await channel.close(grace=None)
    found.findings.append(check_reachability(invite.address))
    found.status, offset_s = await asyncio.to_thread(_read_page, invite, page)
    found.findings.append(check_clock(offset_s))
    return found


def check_protocol(theirs: int) -> Finding:
    """The version that a coordinator offers: its newest."""
    if theirs == PROTOCOL_VERSION:
        return Finding(topic="protocol", level=Level.OK, text=f"version {theirs} on both sides")
    text = f"the coordinator speaks version {theirs}, this worker {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
    if theirs < OLDEST_PROTOCOL_VERSION:
        advice = "the run's operator should type `pip install --upgrade manyhands`"
        return Finding(topic="protocol", level=Level.PROBLEM, text=text, advice=advice)
    if theirs < PROTOCOL_VERSION:
        return Finding(topic="protocol", level=Level.OK, text=text)
    advice = "`pip install --upgrade manyhands`: one version back is supported, not more"
    return Finding(topic="protocol", level=Level.ATTENTION, text=text, advice=advice)


def check_clock(offset_s: float | None) -> Finding:
    """This machine's clock against the coordinator's; None when nothing of it was seen."""
    if offset_s is None:
        text = "not compared: the protocol carries no time, and the run's page cannot be seen from here"
        return Finding(
            topic="clock", level=Level.UNKNOWN, text=text, advice="`--page URL` where the run has a public page"
        )
    figures: dict[str, float | int | str] = {"offset_s": round(offset_s, 1)}
    text = f"{abs(offset_s):.1f} s {'ahead of' if offset_s > 0 else 'behind'} the coordinator's (to a second or two)"
    if abs(offset_s) > MAX_CLOCK_OFFSET_S:
        advice = "set the clock, best by NTP: certificates and invites are judged by it"
        return Finding(topic="clock", level=Level.ATTENTION, text=text, advice=advice, figures=figures)
    return Finding(topic="clock", level=Level.OK, text=text, figures=figures)


def check_reachability(coordinator_address: str) -> Finding:
    """Whether other machines could dial this one, as far as its own addresses tell."""
    host, port = split_address(coordinator_address)
    own = _own_address(host, port)
    public = _global_addresses()
    if own is None:
        return Finding(topic="reachability", level=Level.UNKNOWN, text="no route to the coordinator was found")
    if own.is_loopback:
        text = "the coordinator is on this machine; what other machines could reach cannot be told from here"
        return Finding(topic="reachability", level=Level.UNKNOWN, text=text)
    if own.is_global or public:
        shown = ", ".join(str(address) for address in public[:2]) or str(own)
        text = f"public address {shown}; whether a firewall lets others in is not known"
        advice = "with bandwidth to spare, `worker start --seed` passes everybody's payloads on"
        return Finding(topic="reachability", level=Level.OK, text=text, advice=advice)
    text = f"{own} is private: behind NAT; whether the router lets others in is not known"
    advice = "nothing needs to be done: a worker dials out, and the coordinator passes its payloads on"
    return Finding(topic="reachability", level=Level.OK, text=text, advice=advice)


async def _greet(channel: grpc.aio.Channel, address: str) -> list[Finding]:
    """The coordinator's protocol version and how long it takes to answer. Raises ConnectionFailedError."""
    call = CoordinatorServiceStub(channel).Session(_silence())
    health = health_pb2_grpc.HealthStub(channel)
    durations_s = []
    try:
        async with asyncio.timeout(TIMEOUT_S):
            challenge = (await anext(call.__aiter__())).challenge
        for _ in range(NUM_PINGS):
            started_s = time.perf_counter()
            await health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            durations_s.append(time.perf_counter() - started_s)
    except (TimeoutError, StopAsyncIteration, grpc.aio.AioRpcError) as error:
        raise ConnectionFailedError(f"{address} took the connection, but does not answer") from error
    finally:
        call.cancel()
    round_trip_ms = 1e3 * statistics.median(durations_s)
    text = f"{address} is the one that the invite names, and answers in {round_trip_ms:.1f} ms"
    figures: dict[str, float | int | str] = {"round_trip_ms": round(round_trip_ms, 2)}
    findings = [Finding(topic="coordinator", level=Level.OK, text=text, figures=figures)]
    findings.append(check_protocol(challenge.protocol_version))
    return findings


async def _silence() -> Any:
    """A session in which nothing is said."""
    await asyncio.Event().wait()
    yield pb.PeerMessage()


def _read_page(invite: Invite, page: str | None) -> tuple[dict[str, Any] | None, float | None]:
    """The run's status, and this clock minus the page's in seconds; None for what cannot be had."""
    host, _ = split_address(invite.address)
    url = (page or f"http://{f'[{host}]' if ':' in host else host}:{DEFAULT_PAGE_PORT}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        return None, None
    with suppress(OSError, ValueError):
        status, _ = _get_status(url)
        if isinstance(status, dict) and status.get("run_id") == invite.run_id:
            # asked again for the time: a first answer may have been long in coming
            return _get_status(url)
    return None, None


def _get_status(url: str) -> tuple[dict[str, Any], float | None]:
    """What the page says, and this clock minus its own."""
    before_s = time.time()
    with urllib.request.urlopen(f"{url}/api/status", timeout=TIMEOUT_S) as answer:  # noqa: S310 - http(s), see above
        after_s = time.time()
        sent = answer.headers["Date"]
        status: dict[str, Any] = json.loads(answer.read(_MAX_STATUS_BYTES))
    if sent is None:
        return status, None
    # the header has whole seconds: the moment was half a second later, on average
    return status, (before_s + after_s) / 2 - (parsedate_to_datetime(sent).timestamp() + 0.5)


def _own_address(host: str, port: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address of this machine from which the coordinator is reached. Nothing is sent."""
    with suppress(OSError, ValueError):
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            return ipaddress.ip_address(str(probe.getsockname()[0]).partition("%")[0])
    return None


def _global_addresses() -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses of this machine's interfaces that the whole internet can route to."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            with suppress(ValueError):
                parsed = ipaddress.ip_address(address.address.partition("%")[0])
                if parsed.is_global:
                    found.append(parsed)
    return found
