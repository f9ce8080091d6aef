"""What a worker is doing: for the terminal, status.json and heartbeats."""

from dataclasses import asdict, dataclass


@dataclass(slots=True, kw_only=True)
class WorkerStatus:
    """What the worker is doing, for the terminal, status.json and heartbeats."""

    name: str
    peer: str
    activity: str = "joining"
    pause_reason: str = ""  # a worker.governor.reasons.PauseReason; empty: none
    pause_detail: str = ""
    run: str = ""
    round: int = -1
    inner_step: int = 0
    loss: float = 0.0
    steps_per_s: float = 0.0
    tokens_per_s: float = 0.0
    credited_tokens: int = 0
    accepted: int = 0
    late_or_refused: int = 0
    bytes_sent: int = 0  # payloads: pushed to the coordinator and served to other workers
    bytes_received: int = 0  # payloads from other workers
    steps_trained: int = 0
    compute_s: float = 0.0  # inside inner steps
    digest: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self)
