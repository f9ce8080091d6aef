"""What a round needs to know beside the peers: the run, its model, and where the coordinator stands."""

from dataclasses import dataclass

from protocol.replica import state_bytes_size
from protocol.run_spec import RunSpec
from simulations.scenario import Scenario
from simulations.world.links import LINKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Bits a second and seconds."""

    spec: RunSpec
    num_parameters: int
    up_bps: float
    down_bps: float
    latency_s: float

    @property
    def float32_bytes(self) -> float:
        return 4.0 * self.num_parameters

    def state_bytes(self, rounds_merged: int) -> float:
        """What a peer that joins fetches at least."""
        spec = self.spec
        has_momentum = spec.outer.momentum > 0.0 and rounds_merged >= spec.checkpoint.every_rounds
        return float(state_bytes_size(self.num_parameters, has_momentum))


def describe_site(scenario: Scenario) -> Site:
    """The coordinator's place in this scenario."""
    link = LINKS[scenario.coordinator.link]
    return Site(
        spec=scenario.spec,
        num_parameters=scenario.model.parameters,
        up_bps=link.up_bps,
        down_bps=link.down_bps,
        latency_s=link.latency_s,
    )
