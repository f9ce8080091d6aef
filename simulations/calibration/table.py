"""What was fitted, in a terminal."""

from rich.console import Console
from rich.table import Table

from simulations.calibrate import Calibration
from simulations.calibration.fit import Figure
from simulations.calibration.scenario_file import name_populations

MOST_PEERS = 20


def print_calibration(calibration: Calibration) -> None:
    """The peers, then the run beside its simulation."""
    console = Console(highlight=False)
    fitted, seen = calibration.fit, calibration.seen
    console.print(f"{calibration.facts.spec.name}: {len(seen.rounds):,} rounds, {len(fitted.peers):,} workers")
    names = name_populations(fitted)
    peers = Table("peer", "steps/s", "leases", "jitter", "up Mbit/s", "down Mbit/s", "start s", "sessions", box=None)
    for name, peer in list(zip(names, fitted.peers, strict=True))[:MOST_PEERS]:
        peers.add_row(
            name,
            _show(peer.steps_per_s),
            str(peer.steps_per_s.count) if peer.speed_from == "leases" else f"none: {peer.speed_from}",
            f"{peer.jitter:.0%}",
            _show(peer.up_bps, 1e-6),
            _show(peer.down_bps, 1e-6),
            _show(peer.start_s),
            str(len(peer.sessions_hours)),
        )
    console.print(peers)
    if len(names) > MOST_PEERS:
        console.print(f"and {len(names) - MOST_PEERS:,} more")
    real, simulated = fitted.rounds, calibration.simulated
    compared = Table("a round", "real", "simulated", box=None)
    for label, key in (
        ("from opening to opening, s", "round_s"),
        ("from its close to the next, s", "merge_s"),
        ("bytes of a contribution", "payload_bytes"),
    ):
        compared.add_row(label, _show(getattr(real, key)), _show(getattr(simulated, key)) if simulated else "no round")
    console.print(compared)


def _show(figure: Figure | None, times: float = 1.0) -> str:
    """ "12.3 ±4 %" """
    if figure is None:
        return "unknown"
    value = figure.value * times
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{text} ±{figure.spread:.0%}" if figure.count > 1 else text
