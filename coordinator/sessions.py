"""Who is connected, and what waits to be sent to them. Carries the core's effects out to peers.

A peer that does not read is cut off when its outbox is full, so that it cannot make the coordinator's memory grow.
"""

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex

import structlog

from coordinator.core import effects as fx
from coordinator.core.state import Unit
from coordinator.engine import Committed, Engine
from coordinator.ledger import accepted_of
from coordinator.payloads import PayloadChecker
from coordinator.storage.database import LedgerRow
from protocol.documents import Genesis, Lease, MergeOrder, Receipt, ShardRef, sign
from protocol.envelope import pack
from protocol.identity import Identity
from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb

log = structlog.get_logger()
OUTBOX_MESSAGES = 1_000
MAX_STATE_SOURCES = 4
MAX_PAYLOAD_PEERS = 32


@dataclass(slots=True, kw_only=True)
class PeerSession:
    """One connected peer. The shell's own view of it; what counts is in the core's state."""

    peer: str
    name: str
    role: str
    waiting: bool = False  # for the operator's approval: it has no token and no state yet
    addresses: tuple[str, ...]
    seed: bool = False  # offers to serve everybody's payloads
    token: str = field(default_factory=lambda: token_hex(32))
    outbox: asyncio.Queue[pb.CoordinatorMessage | None] = field(default_factory=lambda: asyncio.Queue(OUTBOX_MESSAGES))
    heartbeat: pb.Heartbeat = field(default_factory=pb.Heartbeat)
    closed: bool = False
    goodbye: str = ""  # why the peer leaves, once it has said so

    def send(self, **message: object) -> None:
        """Queue a message; a peer whose outbox is full is closed."""
        if self.closed:
            return
        try:
            self.outbox.put_nowait(pb.CoordinatorMessage(**message))  # type: ignore[arg-type] # one field of the oneof
        except asyncio.QueueFull:
            log.warning("peer does not read its messages", peer=self.peer)
            self.close()

    def close(self) -> None:
        """End the session; what is queued is dropped when there is no room for the end mark."""
        self.closed = True
        while True:
            try:
                self.outbox.put_nowait(None)
                return
            except asyncio.QueueFull:
                self.outbox.get_nowait()


class Sessions:
    """All connected peers; implements the engine's Carrier."""

    def __init__(self, engine: Engine, identity: Identity, genesis: Signed, payloads: PayloadChecker) -> None:
        self._engine = engine
        self._identity = identity
        self._genesis = genesis
        self._run_id = Genesis.model_validate_json(genesis.body).run_id
        self._payloads = payloads
        self._by_peer: dict[str, PeerSession] = {}
        self._by_token: dict[str, PeerSession] = {}

    def add(self, session: PeerSession) -> None:
        """Register a peer that was let in; an older session of the same peer ends."""
        older = self._by_peer.get(session.peer)
        if older is not None:
            older.send(refused=pb.Refused(code="replaced", reason="the same identity joined from elsewhere"))
            older.close()
            self._by_token.pop(older.token, None)
        self._by_peer[session.peer] = session
        self._by_token[session.token] = session

    def welcome(self, session: PeerSession) -> None:
        """Let a registered peer in: from now on it may fetch what the run is made of."""
        state = self._engine.state
        session.waiting = False
        session.send(
            welcome=pb.Welcome(
                genesis=pack(self._genesis),
                session_token=session.token,
                round=state.rounds_merged,
                checkpoint_round=state.checkpoint_round,
                checkpoint_digest=state.checkpoint_digest,
                heartbeat_every_s=state.spec.round.heartbeat_timeout_s / 5,
                state_sources=self.find_state_sources(session.peer),
            )
        )

    def remove(self, session: PeerSession) -> bool:
        """Forget a session that ended. True when it was the peer's current one."""
        self._by_token.pop(session.token, None)
        if self._by_peer.get(session.peer) is not session:
            return False
        del self._by_peer[session.peer]
        return True

    def find_by_token(self, token: str) -> PeerSession | None:
        return self._by_token.get(token)

    def find_state_sources(self, joiner: str) -> list[pb.PeerAddress]:
        """Some connected workers that can be dialled: each kept its state when the last checkpoint was due."""
        dialable = [session for session in self._dialable_workers() if session.peer != joiner]
        return _sample(dialable, MAX_STATE_SOURCES)  # so that joiners spread

    def find_payload_peers(self) -> list[pb.PeerAddress]:
        """Who may pass the payloads of a round on: workers that can be dialled, seeds first."""
        dialable = self._dialable_workers()
        seeds = _sample([session for session in dialable if session.seed], MAX_PAYLOAD_PEERS)
        return seeds + _sample([session for session in dialable if not session.seed], MAX_PAYLOAD_PEERS - len(seeds))

    def _dialable_workers(self) -> list[PeerSession]:
        return [
            session
            for session in self._by_peer.values()
            if session.addresses and session.role == "worker" and not session.waiting
        ]

    def connected(self) -> list[PeerSession]:
        return list(self._by_peer.values())

    def close_all(self) -> None:
        for session in self.connected():
            session.goodbye = session.goodbye or "the coordinator stopped"
            session.close()

    # ---- the engine's Carrier

    def carry_out(self, committed: Committed) -> None:
        for effect in committed.effects:
            match effect:
                case fx.AdmitPeer() | fx.DismissPeer():
                    self._change_admission(effect)
                case fx.GrantLease():
                    self._to(effect.peer, lease=pack(sign(self._lease(effect), self._identity)))
                case fx.CheckPayload():
                    self._payloads.expect(effect)
                    self._to(effect.peer, wanted=pb.PayloadWanted(payload_hash=effect.payload_hash))
                case fx.JudgeContribution():
                    self._tell_verdict(effect)
                case fx.OrderMerge():
                    self._to(effect.peer, merge_order=self._merge_order(effect))
                case fx.CloseRound():
                    self._payloads.forget()
                    self._announce_round(effect, committed.entries)
                case fx.VoidRound():
                    self._payloads.forget()
                    log.warning("round void", round=effect.round, reason=effect.reason)
                case fx.RequestResync():
                    log.warning("digest differs", peer=effect.peer, reason=effect.reason)
                    self._to(effect.peer, resync=pb.Resync(reason=effect.reason))
                case fx.AnnouncePhase():
                    self._to_all(phase=pb.PhaseNotice(phase=effect.phase.value, reason=effect.reason))
                case fx.RefusePeer() | fx.HoldPeer() | fx.RecordEvaluation() | fx.AnnouncePlan():
                    pass  # the session that asked is told by the service; the ledger entry and the log are all of it

    def _change_admission(self, effect: fx.AdmitPeer | fx.DismissPeer) -> None:
        """Let a waiting session in; or end one and forget it at once, whether or not the peer reads that it is over."""
        session = self._by_peer.get(effect.peer)
        if session is None:
            return
        if isinstance(effect, fx.DismissPeer):
            session.send(refused=pb.Refused(code=effect.code, reason=effect.reason))
            session.close()
            self.remove(session)
        elif session.waiting:
            self.welcome(session)

    def _tell_verdict(self, judged: fx.JudgeContribution) -> None:
        verdict = pb.ContributionVerdict(
            payload_hash=judged.payload_hash, accepted=judged.accepted, reason=judged.reason
        )
        self._to(judged.peer, verdict=verdict)
        if not judged.accepted:
            log.warning("contribution refused", peer=judged.peer, reason=judged.reason)

    def _announce_round(self, closed: fx.CloseRound, entries: Sequence[LedgerRow]) -> None:
        payloads = [(group.payload_hash, peer) for group in closed.groups for peer in group.mergers]
        sources = self._sources(payloads or [(credit.payload_hash, credit.peer) for credit in closed.credits])
        notice = pb.ManifestNotice(manifest=pack(entries[0].signed), sources=sources, peers=self.find_payload_peers())
        self._to_all(manifest=notice)
        for entry in entries[1:]:
            receipt = Receipt.model_validate_json(entry.body)
            self._to(receipt.peer, receipt=pack(entry.signed))
        log.info(
            "round closed",
            round=closed.round,
            contributions=len(closed.credits),
            leased=closed.leased_peers,
            tokens=closed.tokens_after,
            because=closed.closed_because,
        )

    def _lease(self, grant: fx.GrantLease) -> Lease:
        return Lease(
            run_id=self._run_id,
            lease_id=grant.lease_id,
            peer=grant.peer,
            round=grant.round,
            base_digest=grant.base_digest,
            shards=_refs(grant.units),
            steps_per_shard=self._engine.state.spec.data.shard_steps,
            deadline_in_s=grant.deadline_in_s,
            tokens_before=grant.tokens_before,
            round_tokens=grant.round_tokens,
            codec=grant.codec,
            codec_options=dict(grant.codec_options),
            learning_rate=grant.learning_rate,
            optimizer=grant.optimizer,
            contribute=grant.contribute,
            ahead=_refs(grant.ahead),
        )

    def _merge_order(self, order: fx.OrderMerge) -> pb.MergeOrderNotice:
        document = MergeOrder(
            run_id=self._run_id,
            peer=order.peer,
            round=order.round,
            base_digest=order.base_digest,
            group=order.group,
            attempt=order.attempt,
            butterfly=order.butterfly,
            contributions=tuple(accepted_of(credit) for credit in order.contributions),
            codec=order.codec,
            deadline_in_s=order.deadline_in_s,
        )
        sources = self._sources((credit.payload_hash, credit.peer) for credit in order.contributions)
        return pb.MergeOrderNotice(order=pack(sign(document, self._identity)), sources=sources)

    def _sources(self, payloads: Iterable[tuple[str, str]]) -> list[pb.PayloadSource]:
        """Where payloads (hash, peer) can be had."""
        return [
            pb.PayloadSource(payload_hash=payload_hash, peer=peer, addresses=self._addresses(peer))
            for payload_hash, peer in payloads
        ]

    def _addresses(self, peer: str) -> tuple[str, ...]:
        session = self._by_peer.get(peer)
        return session.addresses if session else ()

    def _to(self, peer: str, **message: object) -> None:
        session = self._by_peer.get(peer)
        if session is not None:
            session.send(**message)

    def _to_all(self, **message: object) -> None:
        for session in self.connected():
            if not session.waiting:
                session.send(**message)


def _refs(units: Sequence[Unit]) -> tuple[ShardRef, ...]:
    return tuple(ShardRef(pass_index=pass_index, index=index) for pass_index, index in units)


def _sample(sessions: Sequence[PeerSession], most: int) -> list[pb.PeerAddress]:
    chosen = random.sample(sessions, min(most, len(sessions)))
    return [pb.PeerAddress(peer=session.peer, addresses=session.addresses, seed=session.seed) for session in chosen]
