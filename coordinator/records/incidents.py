"""Incidents, found from what the core was told and what it decided, and from what a Watch sees beside it.

One that comes again soon after it ended is the same incident, counted: a peer that fails every minute is one line.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.core.state import State
from coordinator.storage.record_batch import RecordBatch, Values
from coordinator.storage.records import MAX_INCIDENTS

AGAIN_WITHIN_S = 600.0
MAX_OPEN = 1_000
MAX_EVIDENCE_CHARS = 300


@dataclass(slots=True, kw_only=True)
class Episode:
    """An incident that lasts, or ended lately."""

    id: int
    kind: str
    peer: str
    name: str
    since_unix_s: float
    until_unix_s: float | None
    first_round: int
    last_round: int
    count: int
    evidence: dict[str, Any] = field(default_factory=dict)
    action: str = ""

    def columns(self) -> Values:
        return {
            "kind": self.kind,
            "peer": self.peer,
            "name": self.name,
            "since_unix_s": self.since_unix_s,
            "until_unix_s": self.until_unix_s,
            "first_round": self.first_round,
            "last_round": self.last_round,
            "count": self.count,
            "evidence": json.dumps(self.evidence),
            "action": self.action,
        }


class IncidentLog:
    """What lasts now. `begin` and `end` are cheap; what changed is written with the next transaction."""

    def __init__(self, lasting: list[Episode], next_id: int) -> None:
        self._recent = {(episode.kind, episode.peer): episode for episode in lasting}
        self._next_id = next_id
        self._new: set[int] = set()
        self._changed: dict[int, Episode] = {}

    @property
    def has_news(self) -> bool:
        return bool(self._changed)

    def lasts(self, kind: str, peer: str = "") -> bool:
        episode = self._recent.get((kind, peer))
        return episode is not None and episode.until_unix_s is None

    def lasting(self, kind: str) -> set[str]:
        """The peers of the incidents of this kind that last."""
        return {peer for (of, peer), episode in self._recent.items() if of == kind and episode.until_unix_s is None}

    def begin(
        self,
        kind: str,
        state: State,
        unix_s: float,
        *,
        evidence: Mapping[str, Any],
        action: str,
        peer: str = "",
        since_unix_s: float | None = None,
        is_over: bool = False,
    ) -> None:
        """Something went wrong. `is_over`: it is a moment, not a state that lasts until `end`."""
        known = peer in state.peers
        until = unix_s if is_over else None
        episode = self._recent.get((kind, peer))
        if episode is not None and (episode.until_unix_s or unix_s) > unix_s - AGAIN_WITHIN_S:
            episode.count += 1
            episode.until_unix_s, episode.last_round = until, state.rounds_merged
        else:
            self._make_room(unix_s)
            episode = self._recent[kind, peer] = Episode(
                id=self._next_id,
                kind=kind,
                peer=peer,
                name=state.peers[peer].name if known else "",
                since_unix_s=unix_s if since_unix_s is None else since_unix_s,
                until_unix_s=until,
                first_round=state.rounds_merged,
                last_round=state.rounds_merged,
                count=1,
            )
            self._next_id += 1
            self._new.add(episode.id)
        episode.evidence = {
            key: value[:MAX_EVIDENCE_CHARS] if isinstance(value, str) else value for key, value in evidence.items()
        }
        episode.action = action[:MAX_EVIDENCE_CHARS]
        self._changed[episode.id] = episode

    def end(self, kind: str, state: State, unix_s: float, peer: str = "", action: str | None = None) -> None:
        """It is over; nothing when it did not last."""
        episode = self._recent.get((kind, peer))
        if episode is None or episode.until_unix_s is not None:
            return
        episode.until_unix_s, episode.last_round = unix_s, state.rounds_merged
        if action is not None:
            episode.action = action
        self._changed[episode.id] = episode

    def write(self, batch: RecordBatch) -> None:
        """Put what changed into the batch."""
        for id_, episode in self._changed.items():
            if id_ in self._new:
                batch.new_incidents[id_] = {"id": id_, **episode.columns()}
            else:
                batch.incidents[id_] = episode.columns()
        if self._new:
            batch.forget_incidents_before = max(0, self._next_id - MAX_INCIDENTS)
        self._new.clear()
        self._changed.clear()

    def _make_room(self, unix_s: float) -> None:
        """Forget what ended long ago; of what lasts, the oldest when it is too much."""
        if len(self._recent) < MAX_OPEN:
            return
        for key, episode in list(self._recent.items()):
            if episode.until_unix_s is not None and episode.until_unix_s < unix_s - AGAIN_WITHIN_S:
                del self._recent[key]
        while len(self._recent) >= MAX_OPEN:
            del self._recent[next(iter(self._recent))]
