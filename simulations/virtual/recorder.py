"""What a virtual run leaves behind: a row for each round, samples of what everybody does, counts."""

from dataclasses import dataclass, field
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.core.effects import AnnouncePhase, CloseRound, JudgeContribution, VoidRound
from coordinator.core.state import Round
from simulations.virtual.peers import World
from simulations.world.faults import FaultSpec

SAMPLES_A_ROW = 12
ACTIVITIES = ("training", "sending", "merging", "waiting", "fetching", "cut off", "offline")


@dataclass(slots=True)
class Recorder:
    """Filled by the parts of the run; read by simulations.results."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    phases: list[tuple[float, str, str]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    voids: list[tuple[float, str]] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    copies_refused: int = 0
    too_small: int = 0  # peers without the memory for the model
    coordinator_sent_bytes: float = 0.0
    coordinator_received_bytes: float = 0.0
    trained_s: float = 0.0
    first_loss: float | None = None  # held out, of the initial state
    _opened_s: float = 0.0
    _due: int = 0
    _refused: int = 0
    _sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(ACTIVITIES) + 1))
    _num_sums: int = 0

    def open_round(self, round_: Round, now_s: float) -> None:
        if self.rounds and self.rounds[-1]["merged_s"] is None:
            self.rounds[-1]["merged_s"] = now_s
        self._opened_s, self._due, self._refused = now_s, round_.unsettled, 0

    def close_round(self, closed: CloseRound, held_out_loss: float | None, now_s: float) -> None:
        tokens = sum(credit.tokens for credit in closed.credits)
        loss = sum(credit.mean_loss * credit.tokens for credit in closed.credits) / max(tokens, 1)
        self.rounds.append(
            {
                "round": closed.round,
                "opened_s": self._opened_s,
                "trained_s": min(self.trained_s, now_s),
                "closed_s": now_s,
                "merged_s": None,  # when the next round opens
                "tokens": tokens,
                "tokens_after": closed.tokens_after,
                "leased_peers": closed.leased_peers,
                "due": self._due,
                "contributions": len(closed.credits),
                "refused": self._refused,
                "groups": len(closed.groups),
                "payload_bytes": sum(credit.payload_bytes for credit in closed.credits),
                "codec": closed.credits[0].codec,
                "inner_steps": closed.inner_steps,
                "clipped": sum(credit.clip < 1.0 for credit in closed.credits),
                "mean_loss": None if loss == 0.0 or isnan(loss) else loss,
                "held_out_loss": held_out_loss,
                "closed_because": closed.closed_because,
                "plan": closed.plan,
            }
        )

    def note_verdict(self, verdict: JudgeContribution) -> None:
        if not verdict.accepted:
            self._refused += 1
            reason = verdict.reason.partition(":")[0]
            self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def note_void(self, void: VoidRound, now_s: float) -> None:
        self.voids.append((now_s, void.reason))

    def note_phase(self, phase: AnnouncePhase, now_s: float) -> None:
        self.phases.append((now_s, phase.phase.value, phase.reason))

    def note_fault(self, fault: FaultSpec) -> None:
        self.faults.append({"kind": fault.kind, "start_s": fault.start_s, "end_s": fault.end_s})

    def sample(self, world: World) -> None:
        """Count what everybody does at this moment; a row of `samples` is the mean of SAMPLES_A_ROW such counts."""
        now_s, ready, connected = world.clock.now_s, world.ready, world.connected
        running = world.running
        training = running & (world.train_from_s <= now_s) & (now_s < world.train_until_s)
        sending = ready & world.sending & ~training
        merging = ready & (world.merging_until_s > now_s) & ~training & ~sending
        flops = world.population.flops
        online = float(flops @ running)
        counts = (
            training,
            sending,
            merging,
            ready & ~training & ~sending & ~merging,
            connected & ~ready & ~training,
            running & ~connected & ~training,
            ~running,
        )
        share = float(flops @ training) / online if online else 0.0
        self._sums += np.array([*(np.count_nonzero(who) for who in counts), share], np.float64)
        self._num_sums += 1
        if self._num_sums == SAMPLES_A_ROW:
            self.end_row(world)

    def end_row(self, world: World) -> None:
        """Write the row of what was sampled since the last one."""
        means = (self._sums / max(self._num_sums, 1)).tolist()
        self._sums, self._num_sums = np.zeros(len(ACTIVITIES) + 1), 0
        self.samples.append(
            {
                "t_s": world.clock.now_s,
                **dict(zip((*ACTIVITIES, "utilisation"), means, strict=True)),
                "sent_bytes": sum(peer.sent_bytes for peer in world.peers),
                "coordinator_sent_bytes": self.coordinator_sent_bytes,
            }
        )
