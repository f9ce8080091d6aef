"""What a running coordinator tells of its run: `coordinator status`, page, verdict and metrics are made of these facts.

Plain values, fit for JSON. No invite, token or key is among them: the page shows all of it to everybody.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

from coordinator.core import machine, peers
from coordinator.core.state import Peer, PeerStatus
from coordinator.engine import Engine
from coordinator.sessions import PeerSession, Sessions
from coordinator.storage.database import Database, RoundRow
from coordinator.verdict import judge
from coordinator.witness import Witness
from protocol.documents import Evaluation, EvaluationReport, Genesis
from protocol.run_spec import RunSpec
from protocol.signing import Signed


def public_address(spec: RunSpec) -> str:
    """host:port as invites give it."""
    return spec.coordinator.advertise or spec.coordinator.listen


@dataclass(kw_only=True)
class RunStatus:
    """Reads the facts. Made before the first event: what the journal left behind tells what a restart cut off."""

    run: Genesis
    spec: RunSpec  # of run.toml, where it differs from the genesis
    folder: Path
    engine: Engine
    database: Database
    sessions: Sessions
    witness: Witness
    validator_expected: bool

    def __post_init__(self) -> None:
        self._first_loss: float | None = None
        self._evaluated_at = ""
        self._restarted, self._workers_before = bool(self.engine.state.peers), self._count_workers_before()

    def read(self) -> dict[str, object]:
        """The facts, with the verdict on them."""
        state = self.engine.state
        rounds = self.database.read_rounds(last=20)
        held_out = next((row.held_out_loss for row in reversed(rounds) if row.held_out_loss is not None), None)
        last_evaluated = rounds[-1].held_out_loss if rounds and self.engine.is_finished() else None
        sessions = {session.peer: session for session in self.sessions.connected()}
        self.witness.look()
        everybody = [self._describe_peer(peer_id, p, sessions.get(peer_id)) for peer_id, p in state.peers.items()]
        facts: dict[str, object] = {
            "name": self.run.spec.name,
            "run_id": self.run.run_id,
            "phase": state.phase.value,
            "reason": machine.describe_phase(state),
            "plan": state.plan.reason if state.plan else "",
            "round_time_s": state.round_time_s,
            "approval": self.spec.invite.approval,
            "round": state.rounds_merged,
            "tokens": state.tokens_credited,
            "tokens_target": state.spec.train.tokens,
            "num_parameters": self.run.num_parameters,
            "train_loss": rounds[-1].mean_loss if rounds else None,
            "held_out_loss": held_out,
            "first_held_out_loss": self._first_held_out_loss(),
            "final_held_out_loss": last_evaluated,
            "round_seconds": rounds[-1].seconds if rounds else None,
            "ledger_head": self.engine.ledger_head,
            "reference_digest": peers.reference_digest(state),
            "digests": dict(state.reports),
            "peers": everybody,
            "workers": sum(p.role == "worker" and p.status is not PeerStatus.GONE for p in state.peers.values()),
            "page": f"http://{self.spec.coordinator.http}",
            "address": public_address(self.spec),
            **self._describe_pace(rounds),
            **self._describe_coordinator(),
        }
        has_part = [peer for peer in everybody if not peer["waiting_for_approval"]]
        return facts | {"verdict": asdict(judge(facts | {"peers": has_part}, time.time()))}

    def _describe_peer(self, peer_id: str, peer: Peer, session: PeerSession | None) -> dict[str, object]:
        round_ = self.engine.state.round
        lease = round_.leases.get(peer_id) if round_ else None
        return {
            "peer": peer_id,
            "name": peer.name,
            "role": peer.role,
            "device": peer.device,
            "software": peer.software,
            "status": peer.status.value,
            "banned": peer.banned,
            "waiting_for_approval": peer.waiting_for_approval,
            "pause_reason": peer.pause_reason,
            "joined_unix_s": peer.joined_unix_s or None,
            "reachable": bool(session.addresses) if session else None,
            "lag_rounds": self._count_lag(peer),
            "steps_per_s": round(peer.steps_per_s, 3),
            "upload_bps": round(peer.upload_bps),
            "download_bps": round(peer.download_bps),
            "optimizer_share": round(peer.optimizer_share, 3),
            "credited_tokens": peer.credited_tokens,
            "accepted": peer.accepted,
            "refused": peer.refused,
            "lease": lease.status.value if lease else "",
            **self.witness.describe_peer(peer_id, session),
        }

    def _count_lag(self, peer: Peer) -> int | None:
        """Rounds by which the state that a peer last reported is behind; None while that is not known."""
        if peer.status is PeerStatus.GONE or peer.state_round < 0:
            return None
        return self.engine.state.rounds_merged - peer.state_round

    def _describe_pace(self, rounds: Sequence[RoundRow]) -> dict[str, object]:
        """The open round's clock and the run's, from its last rounds (oldest first). Times are Unix seconds."""
        state, to_unix_s = self.engine.state, time.time() - self.engine.now_s()
        round_ = state.round
        seconds = median(row.seconds for row in rounds[-5:]) if rounds else round_.expected_s if round_ else 0.0
        span_s = rounds[-1].unix_s - rounds[0].unix_s if rounds else 0.0
        speed = (rounds[-1].tokens_after - rounds[0].tokens_after) / span_s if span_s > 0.0 else None
        left = max(0, state.spec.train.tokens - state.tokens_credited)
        return {
            "last_merge_unix_s": rounds[-1].unix_s if rounds else None,
            "round_opened_unix_s": round_.opened_s + to_unix_s if round_ else None,
            "round_expected_unix_s": round_.opened_s + to_unix_s + seconds if round_ else None,
            "round_deadline_unix_s": round_.deadline_s + to_unix_s if round_ else None,
            "tokens_per_s": speed,
            "eta_s": left / speed if speed else None,
        }

    def _describe_coordinator(self) -> dict[str, object]:
        commits = self.engine.commit_seconds
        return {
            "started_unix_s": self.engine.started_unix_s,
            "restarted": self._restarted,
            "workers_before_restart": self._workers_before,
            "min_peers": self.engine.state.spec.round.min_peers,
            "heartbeat_timeout_s": self.engine.state.spec.round.heartbeat_timeout_s,
            "disk_free_bytes": shutil.disk_usage(self.folder).free,
            "validator_expected": self.validator_expected,
            "commit_p99_s": quantiles(commits, n=100)[-1] if len(commits) > 1 else None,
            "troubles": self.witness.describe_troubles(
                {peer_id: p.name for peer_id, p in self.engine.state.peers.items()}
            ),
        }

    def _count_workers_before(self) -> int:
        """Workers that a restart cut off: those that were there, or, after an orderly stop, those of the last round."""
        there = sum(p.role == "worker" and p.status is not PeerStatus.GONE for p in self.engine.state.peers.values())
        last = self.database.read_rounds(last=1)
        return max(there, last[0].contributions if last else 0)

    def _first_held_out_loss(self) -> float | None:
        if self._first_loss is None and self._evaluated_at != self.engine.ledger_head:
            self._evaluated_at = self.engine.ledger_head  # nothing new until it is another
            entry = next(self.database.read_ledger(kinds=("evaluation",)), None)
            if entry is not None:
                report = Signed.from_json(Evaluation.model_validate_json(entry.body).report)
                self._first_loss = EvaluationReport.model_validate_json(report.body).held_out_loss
        return self._first_loss
