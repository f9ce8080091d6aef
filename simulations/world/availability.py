"""When computers take part: a share that changes over the day, sessions that end, and owners who leave for good.

A peer alternates between sessions, whose lengths are Weibull (Nurmi, Brevik and Wolski 2005, "Modeling machine
availability in enterprise and wide-area distributed computing environments": shapes of 0.3 to 0.6 for volunteers'
machines; Javadi et al. 2011 found the same family for SETI@home), and gaps. It comes back at a rate such that the share
of peers online follows `share_online` of its local hour.
"""

from dataclasses import dataclass
from math import gamma, log

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HOUR_S, DAY_S = 3600.0, 86400.0
Shares = tuple[float, ...]  # one for each hour of the day, local time


@dataclass(frozen=True, slots=True, kw_only=True)
class AvailabilityClass:
    """`abrupt`: share of sessions that end without a goodbye; `lifetime_days`: mean until a peer leaves for good."""

    share_online: Shares
    session_hours: float  # mean
    session_shape: float
    abrupt: float
    lifetime_days: float


def _hours(night: float, day: float, evening: float) -> Shares:
    """0 to 7, 7 to 18, 18 to 24 o'clock."""
    return (night,) * 7 + (day,) * 11 + (evening,) * 6


AVAILABILITY = {
    # Never interrupted: a machine that was rented for it.
    "always": AvailabilityClass(
        share_online=(1.0,) * 24, session_hours=1e6, session_shape=1.0, abrupt=1.0, lifetime_days=1e6
    ),
    # Servers: a failure every four months or so (Schroeder and Gibson 2006, "A large-scale study of failures in
    # high-performance computing systems").
    "server": AvailabilityClass(
        share_online=(0.99,) * 24, session_hours=720.0, session_shape=0.7, abrupt=1.0, lifetime_days=1000.0
    ),
    # BOINC's desktops: powered on 81 % of the time, of that computing allowed 84 % and connected 83 %; 91 days until a
    # host is not seen any more (Anderson and Fedak 2006, "The computational and storage potential of volunteer
    # computing").
    "volunteer": AvailabilityClass(
        share_online=(0.56,) * 24, session_hours=6.0, session_shape=0.5, abrupt=0.5, lifetime_days=91.0
    ),
    # Laptops at home: on in the evening, the lid closed at any moment. The shares are ours, after the daily curve of
    # residential traffic (Sandvine and ENISA's reports put its peak at 20 to 22 o'clock).
    "evenings": AvailabilityClass(
        share_online=_hours(0.1, 0.25, 0.6), session_hours=1.5, session_shape=0.7, abrupt=0.6, lifetime_days=91.0
    ),
    # Gaming machines lend their card when nobody plays: nights and working hours.
    "when-idle": AvailabilityClass(
        share_online=_hours(0.5, 0.5, 0.25), session_hours=4.0, session_shape=0.6, abrupt=0.3, lifetime_days=91.0
    ),
    # Phones that charge, idle, on Wi-Fi: four times as many by night as by day, 6 to 10 % drop out of a round (Bonawitz
    # et al. 2019, "Towards federated learning at scale", section 9). The height of the night is ours.
    "charging-at-night": AvailabilityClass(
        share_online=_hours(0.6, 0.15, 0.25), session_hours=4.0, session_shape=0.8, abrupt=0.7, lifetime_days=91.0
    ),
    # A pool of a university's desktops: by night and at weekends theirs, by day a student reboots them (Nurmi et al.).
    "campus-pool": AvailabilityClass(
        share_online=_hours(0.9, 0.6, 0.85), session_hours=8.0, session_shape=0.6, abrupt=0.8, lifetime_days=400.0
    ),
}


def draw_session_s(kind: AvailabilityClass, rng: np.random.Generator) -> float:
    """Length of one session in seconds."""
    scale = kind.session_hours * HOUR_S / gamma(1 + 1 / kind.session_shape)
    return float(scale * rng.weibull(kind.session_shape))


def share_online(kind: AvailabilityClass, local_hour: Floats | float) -> Floats:
    """The share of such peers that are online at these local hours (0 to 24, any shape)."""
    return np.asarray(kind.share_online)[np.asarray(local_hour, np.float64).astype(np.int64) % 24]


def draw_gap_s(kind: AvailabilityClass, local_hour: float, rng: np.random.Generator) -> float:
    """Seconds until a peer that goes offline at this local hour is back: an inhomogeneous Poisson process, thinned.

    At share d the rate is d/(1-d) over the mean session, so that in a steady state a share d is online.
    """
    rates = [share / max(1.0 - share, 1e-6) / (kind.session_hours * HOUR_S) for share in kind.share_online]
    fastest = max(rates)
    waited_s = 0.0
    while True:
        waited_s -= log(1.0 - rng.random()) / fastest
        hour = int(local_hour + waited_s / HOUR_S) % 24
        if rng.random() * fastest <= rates[hour]:
            return waited_s


def leaves_for_good(kind: AvailabilityClass, session_s: float, rng: np.random.Generator) -> bool:
    """Whether a peer does not come back after a session of that length."""
    return bool(rng.random() < session_s / (kind.lifetime_days * DAY_S))
