"""The validator beside the coordinator: reports its state, checkpoints, evaluates (worker/validator.py)."""

from typing import TYPE_CHECKING

from coordinator.core import events as ev
from protocol.signing import sha256_hex
from simulations.virtual.peers import World
from simulations.world.devices import DEVICES

if TYPE_CHECKING:
    from simulations.virtual.coordinator import VirtualCoordinator

VALIDATOR = "validator"
START_S = 3.0  # of its process
MERGE_S = 0.2
DEVICE = DEVICES["server-gpu"]


class Validator:
    """It holds every state a moment after its manifest."""

    def __init__(self, world: World, coordinator: "VirtualCoordinator") -> None:
        self._world = world
        self._coordinator = coordinator
        self._link = 0

    def start(self) -> None:
        self._world.clock.after(START_S, self._join, self._link)

    def start_again(self) -> None:
        """The coordinator is back, and starts it with itself."""
        self._link += 1
        if self._world.scenario.validator:
            self.start()

    def evaluate(self, rounds: int) -> float | None:
        """The held-out loss of the newest state, when one is due for it."""
        if not self._world.scenario.validator or not self._is_due(rounds):
            return None
        return self._world.learner.held_out_loss()

    def merge(self, rounds: int) -> None:
        """A manifest came: report the state, and later its checkpoint."""
        if self._world.scenario.validator:
            self._world.clock.after(MERGE_S, self._report, rounds, self._link)

    def _is_due(self, rounds: int) -> bool:
        state = self._coordinator.state
        return rounds % state.spec.checkpoint.every_rounds == 0 or state.tokens_credited >= state.spec.train.tokens

    def _join(self, link: int) -> None:
        if link != self._link or not self._coordinator.up:
            return
        self._coordinator.send(
            ev.PeerJoined(
                peer=VALIDATOR, name=VALIDATOR, device="", role="validator", token_id=VALIDATOR, lease_id=None
            )
        )
        self._report(self._coordinator.state.rounds_merged, link)

    def _report(self, rounds: int, link: int) -> None:
        if link != self._link or not self._coordinator.up:
            return
        digest = self._coordinator.digests[rounds]
        self._coordinator.send(ev.StateReported(peer=VALIDATOR, round=rounds, digest=digest))
        if self._is_due(rounds):
            held_out = self._world.spec.data.held_out_max_tokens / self._world.spec.step_tokens
            forward_s = held_out * self._world.scenario.flops_per_step(self._world.learner.num_parameters) / 3
            self._world.clock.after(forward_s / DEVICE.flops, self._checkpoint, rounds, link)

    def _checkpoint(self, rounds: int, link: int) -> None:
        if link != self._link or not self._coordinator.up:
            return
        self._coordinator.send(
            ev.EvaluationReported(
                peer=VALIDATOR,
                round=rounds,
                digest=self._coordinator.digests[rounds],
                held_out_loss=0.0,  # the core does not look at it
                checkpoint=True,
                report_hash=sha256_hex(f"evaluation {rounds}".encode()),
            )
        )
