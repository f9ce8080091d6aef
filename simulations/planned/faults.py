"""A scenario's faults, as far as a plan by rounds sees them."""

import numpy as np

from simulations.planned.crowd import Bools, Crowd
from simulations.scenario import Scenario
from simulations.virtual.sessions import LONGEST_PAUSE_S
from simulations.world.faults import FaultSpec

# Until a peer that dials in vain dials again: its pauses are drawn between half and all of the longest one.
REDIAL_S = 0.75 * LONGEST_PAUSE_S


class Faults:
    """Those still to come and those that last."""

    def __init__(self, scenario: Scenario) -> None:
        self._specs = scenario.population
        self._coming = sorted(scenario.fault, key=lambda fault: fault.start_s)
        self._lasting: list[FaultSpec] = []

    @property
    def next_s(self) -> float:
        """When the next one begins or ends; infinity when none does."""
        moments = [fault.start_s for fault in self._coming] + [fault.end_s for fault in self._lasting]
        return min(moments, default=float("inf"))

    def apply(self, crowd: Crowd, now_s: float) -> None:
        """Change links and connections to what they are at `now_s`."""
        for fault in [fault for fault in self._lasting if fault.end_s <= now_s]:
            self._lasting.remove(fault)
            self._slow(crowd, fault, 1.0 / fault.factor)
        while self._coming and self._coming[0].start_s <= now_s:
            fault = self._coming.pop(0)
            self._lasting.append(fault)
            self._slow(crowd, fault, fault.factor)
        for fault in self._lasting:
            if fault.kind == "partition":
                cut = self._hit(crowd, fault) & crowd.online
                crowd.report_s[cut] = np.maximum(crowd.report_s[cut], fault.end_s + REDIAL_S)
                crowd.synced_s[cut] = np.maximum(crowd.synced_s[cut], fault.end_s + REDIAL_S)

    def delay_s(self, from_s: float, to_s: float) -> float:
        """How much later what was due at `to_s` happens, for outages of the coordinator that began meanwhile."""
        outages = [f for f in (*self._coming, *self._lasting) if f.kind == "coordinator_outage"]
        lost = [fault.end_s - fault.start_s for fault in outages if from_s <= fault.start_s < to_s]
        return sum(lost) + len(lost) * REDIAL_S

    def _slow(self, crowd: Crowd, fault: FaultSpec, factor: float) -> None:
        if fault.kind == "slow_links":
            hit = self._hit(crowd, fault)
            crowd.up_bps[hit] *= factor
            crowd.down_bps[hit] *= factor

    def _hit(self, crowd: Crowd, fault: FaultSpec) -> Bools:
        kinds = [fault.region in (None, spec.region) and fault.population in (None, spec.name) for spec in self._specs]
        hit: Bools = np.array(kinds)[crowd.kind]
        return hit
