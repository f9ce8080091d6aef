"""What is known of each virtual peer, and what all parts of a virtual run share."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.core.effects import GrantLease
from coordinator.core.events import ContributionCommitted
from coordinator.core.state import Unit
from protocol.run_spec import RunSpec
from simulations.learner import Learner
from simulations.network import Network
from simulations.scenario import Scenario
from simulations.virtual.clock import Clock
from simulations.world.population import Population

Floats = NDArray[np.float64]
NEVER = -1


@dataclass(slots=True, kw_only=True)
class VirtualPeer:
    """One worker. `session` and `link` number its processes and connections: what an older one set off is void."""

    index: int
    id: str
    session: int = 0
    link: int = 0
    running: bool = False  # its process
    connected: bool = False
    ready: bool = False  # holds a state and follows the manifests
    held: int = NEVER  # rounds in its state
    merging: int = NEVER  # rounds in the state that it is merging
    session_started_s: float = 0.0
    ends_s: float = 0.0  # of the session
    retry_s: float = 0.5
    lease: GrantLease | None = None
    num_done: int = 0  # shards of the lease that it finishes
    header: ContributionCommitted | None = None  # of the open lease, as sent or to be sent again
    norm: float = 0.0
    named: tuple[Unit, ...] = ()  # in a contribution that no manifest has listed yet
    carried: tuple[Unit, ...] = ()
    lead: tuple[Unit, ...] = ()  # trained ahead
    sync_flow: int = 0
    push_flow: int = 0
    idle_since_s: float = 0.0  # since when it has had nothing to train, for what it may train ahead
    online_s: float = 0.0
    compute_s: float = 0.0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    trained_units: int = 0
    sessions: int = 0


@dataclass(slots=True, kw_only=True)
class World:
    """Shared by the parts of one virtual run. Arrays have an entry a peer, those of links one more: the coordinator."""

    scenario: Scenario
    spec: RunSpec
    clock: Clock
    network: Network
    learner: Learner
    population: Population
    rng: np.random.Generator
    peers: list[VirtualPeer]
    by_id: dict[str, VirtualPeer]
    step_s: Floats  # of one inner step
    latency_s: Floats
    stream_bps: Floats
    dialable: NDArray[np.bool_]
    cuts: NDArray[np.int64]  # how many faults keep the peer from the coordinator
    train_from_s: Floats
    train_until_s: Floats
    merging_until_s: Floats
    start_s: Floats  # of a process, before it has a state
    lease_s: Floats  # what calibration found between lease and header, beyond what is modelled
    reveal_s: Floats  # so between header and payload
    merge_s: Floats  # and between manifest and new state
    claimed_steps_per_s: Floats
    running: NDArray[np.bool_]
    sending: NDArray[np.bool_]
    connected: NDArray[np.bool_]
    ready: NDArray[np.bool_]

    @property
    def coordinator(self) -> int:
        """The coordinator's node in the network."""
        return len(self.peers)

    def stop_training(self, peer: VirtualPeer, now_s: float) -> None:
        """What it would have computed from now on it does not."""
        until_s = self.train_until_s[peer.index]
        if until_s > now_s:
            peer.compute_s -= until_s - max(now_s, self.train_from_s[peer.index])
            self.train_until_s[peer.index] = max(now_s, self.train_from_s[peer.index])
