"""Link classes: bandwidth down and up, latency, loss, and whether others can dial in.

Bandwidths are log-normal within a class, with the same draw for both directions, so that who has a good line has it
both ways. `loss` bounds the rate of one TCP stream (Mathis et al. 1997): MSS/RTT · 1.22/sqrt(loss).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MSS_BITS = 8 * 1460
MATHIS = 1.22
STREAMS = 3  # protocol.exchange.fetch draws from so many sources of one blob at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClass:
    """Medians of a class, in bits a second and seconds one way; spread: standard deviation of log(bandwidth)."""

    down_bps: float
    up_bps: float
    spread: float
    latency_s: float
    loss: float
    dialable: float  # share of the peers that others can dial


# Dialable: a worker behind a home router cannot be dialled unless its port is forwarded; 45.5 % of the addresses that
# IPFS's DHT hands out were never reachable (Trautwein et al., SIGCOMM 2022), and those were of people who run servers.
# Mobile networks put nearly everybody behind carrier-grade NAT (Richter et al., IMC 2016: above 90 % of cellular ASes).
# Loss: FCC, Measuring Broadband America (2023): fibre below, cable about and DSL above 0.1 % in busy hours with idle
# probes; a stream that fills the line sees less at its own rate, so a tenth of that stands here.
LINKS = {
    # Medians of Ookla's Speedtest Global Index for fixed lines (2024): 95 down, 50 up, 9 ms to the nearest server.
    "fixed": LinkClass(down_bps=95e6, up_bps=50e6, spread=0.8, latency_s=0.009, loss=1e-4, dialable=0.3),
    # Cable, FCC Measuring Broadband America (2023) and Ofcom UK Home Broadband Performance (2023): uplinks of 10 to 35.
    "cable": LinkClass(down_bps=200e6, up_bps=20e6, spread=0.6, latency_s=0.012, loss=1e-4, dialable=0.3),
    # Ofcom (2023): VDSL 55 down, 14 up.
    "dsl": LinkClass(down_bps=55e6, up_bps=14e6, spread=0.5, latency_s=0.016, loss=2e-4, dialable=0.3),
    "fiber": LinkClass(down_bps=500e6, up_bps=400e6, spread=0.5, latency_s=0.005, loss=2e-5, dialable=0.4),
    # Medians of Ookla's index for mobile (2024): 55 down, 11 up, 28 ms.
    "mobile": LinkClass(down_bps=55e6, up_bps=11e6, spread=0.9, latency_s=0.025, loss=3e-4, dialable=0.02),
    # A phone on its owner's home line, over Wi-Fi that both directions share: about half of the line (as "fixed").
    "home-wifi": LinkClass(down_bps=60e6, up_bps=30e6, spread=0.8, latency_s=0.012, loss=2e-4, dialable=0.2),
    # A gigabit port on a university's network.
    "campus": LinkClass(down_bps=940e6, up_bps=940e6, spread=0.1, latency_s=0.002, loss=1e-6, dialable=0.95),
    # A rented server: 10 Gbit/s, of which providers sustain a part.
    "datacenter": LinkClass(down_bps=8e9, up_bps=8e9, spread=0.1, latency_s=0.001, loss=1e-7, dialable=1.0),
}

# One way between regions, on top of both ends' own: half of the round trips in Verizon's monthly IP latency statistics
# (2024: within Europe 13 ms, within North America 33, transatlantic 71, transpacific 105, Europe to Asia about 140).
REGION_LATENCY_S = {
    ("europe", "europe"): 0.0065,
    ("america", "america"): 0.0165,
    ("asia", "asia"): 0.025,
    ("america", "europe"): 0.0355,
    ("america", "asia"): 0.0525,
    ("asia", "europe"): 0.070,
}
REGIONS = ("america", "asia", "europe")
UTC_OFFSET_HOURS = {"america": -6.0, "asia": 8.0, "europe": 1.0}


def region_latency_s(a: str, b: str) -> float:
    """Seconds one way between two regions of REGIONS."""
    return REGION_LATENCY_S[(min(a, b), max(a, b))]


def draw_bandwidth(link: LinkClass, count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """float64 (count,) twice: bits a second down and up."""
    factor = rng.lognormal(0.0, link.spread, count)
    return link.down_bps * factor, link.up_bps * factor


def stream_bps(rtt_s: Floats | float, loss: Floats | float) -> Floats:
    """What one TCP stream carries at most, in bits a second."""
    return np.asarray(MSS_BITS * MATHIS / (np.maximum(rtt_s, 1e-4) * np.sqrt(np.maximum(loss, 1e-9))))
