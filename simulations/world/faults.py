"""Faults of the coordinator and of the network, as a scenario lists them.

    coordinator_outage   its process is gone; peers compute on, and dial again until it is back
    partition            the peers of a region or population cannot reach the coordinator, nor be reached
    slow_links           their bandwidth falls to `factor`

That such things happen, and for how long, is in operators' post-mortems: AWS us-east-1, December 2021, about seven
hours; cut transatlantic cables are repaired in days, with less capacity meanwhile (TeleGeography).
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.run_spec import Section


class FaultSpec(Section):
    """One fault: what, when, how long, and whom it hits."""

    kind: Literal["coordinator_outage", "partition", "slow_links"]
    at_hours: Annotated[float, Field(ge=0.0)]
    minutes: Annotated[float, Field(gt=0.0)]
    region: str | None = Field(None, description="only the peers of this region")
    population: str | None = Field(None, description="only the peers of this population")
    factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.1, description="slow_links: of the bandwidth")

    @model_validator(mode="after")
    def _check(self) -> "FaultSpec":
        if self.kind == "coordinator_outage" and (self.region or self.population):
            raise ValueError("a coordinator_outage is everybody's; leave out region and population")
        return self

    @property
    def start_s(self) -> float:
        return self.at_hours * 3600.0

    @property
    def end_s(self) -> float:
        return self.start_s + self.minutes * 60.0
