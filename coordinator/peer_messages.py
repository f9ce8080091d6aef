"""What peers say in their sessions: every message is checked, its documents are opened, and it becomes an event.

Invariants: what is not well formed, not signed by the session's own peer, or too large raises VerificationError and
leaves no trace. Whether it is welcome at this moment is the core's to decide.
"""

import math
import re

import structlog

from coordinator.core import events as ev
from coordinator.engine import Engine
from coordinator.payloads import PayloadChecker
from coordinator.sessions import PeerSession
from protocol.codecs import get_codec
from protocol.documents import Contribution, EvaluationReport, Genesis, open_signed
from protocol.envelope import unpack
from protocol.errors import VerificationError
from protocol.exchange.piece_index import has_index
from protocol.exchange.store import BlobStore
from protocol.signing import Signed
from protocol.wire import coordinator_pb2 as pb

log = structlog.get_logger()


class PeerMessages:
    """Takes the messages of all sessions after their joining."""

    def __init__(self, run: Genesis, engine: Engine, payloads: PayloadChecker, store: BlobStore) -> None:
        self._run = run
        self._engine = engine
        self._payloads = payloads
        self._store = store

    def take(self, message: pb.PeerMessage, session: PeerSession) -> None:
        """Raises VerificationError for what a peer may not say, with the sentence for it."""
        match message.WhichOneof("message"):
            case "heartbeat":
                _limited(message.heartbeat.activity, 200)
                session.heartbeat = message.heartbeat
            case "contribution":
                self._take_contribution(unpack(message.contribution), session)
            case "state":
                self._engine.submit(
                    ev.StateReported(
                        peer=session.peer,
                        round=message.state.round,
                        digest=_limited(message.state.digest, 64),
                        claimed_steps_per_s=_finite(message.state.claimed_steps_per_s),
                        download_bps=_finite(message.state.download_bps),
                        optimizer_share=_finite(message.state.optimizer_share),
                    )
                )
            case "availability":
                self._engine.submit(
                    ev.AvailabilityReported(peer=session.peer, pause_reason=_word(message.availability.pause_reason))
                )
            case "lease_return":
                self._engine.submit(
                    ev.LeaseReturned(
                        peer=session.peer,
                        lease_id=message.lease_return.lease_id,
                        reason=_limited(message.lease_return.reason, 200),
                    )
                )
            case "group_merged":
                self._take_group_merged(message.group_merged, session)
            case "evaluation":
                self._take_evaluation(unpack(message.evaluation), session)
            case "leaving":
                session.goodbye = _limited(message.leaving.reason, 200) or "it said goodbye"
                log.info("leaving", peer=session.peer, reason=session.goodbye)
            case other:
                raise VerificationError(f"not a message for this moment: {other}")

    def _take_contribution(self, signed: Signed, session: PeerSession) -> None:
        header = open_signed(signed, Contribution, run_id=self._run.run_id)
        if header.peer != session.peer:
            raise VerificationError("the contribution is not signed by this session's peer")
        if has_index(header.payload_bytes) != (header.pieces_hash is not None):
            raise VerificationError("a payload of several pieces comes with the hash of its piece index, others do not")
        most = self._max_payload_bytes(header)
        if most is not None and header.payload_bytes > most:
            raise VerificationError(f"a payload of {header.payload_bytes} bytes; at most {most}")
        if self._payloads.is_known(header.payload_hash, header.peer) and not self._is_committed(signed, header.peer):
            reason = "that payload was sent before: a contribution counts once, and for its author"
            session.send(
                verdict=pb.ContributionVerdict(payload_hash=header.payload_hash, accepted=False, reason=reason)
            )
            self._engine.submit(ev.LeaseReturned(peer=header.peer, lease_id=header.lease_id, reason=reason))
            return
        self._engine.submit(
            ev.ContributionCommitted(
                peer=header.peer,
                lease_id=header.lease_id,
                base_digest=header.base_digest,
                units=tuple((shard.pass_index, shard.index) for shard in header.shards),
                inner_steps=header.inner_steps,
                tokens=header.tokens,
                mean_loss=header.mean_loss,
                codec=header.codec,
                contribution_hash=signed.hash,
                payload_hash=header.payload_hash,
                payload_bytes=header.payload_bytes,
                pieces_hash=header.pieces_hash,
            ),
            documents=(signed,),
        )

    def _max_payload_bytes(self, header: Contribution) -> int | None:
        """What the round's codec can come to; None for a contribution to no open lease, which the core refuses."""
        round_ = self._engine.state.round
        lease = round_.leases.get(header.peer) if round_ else None
        if round_ is None or lease is None or lease.lease_id != header.lease_id:
            return None
        codec = get_codec(round_.plan.codec, dict(round_.plan.options))
        return codec.payload_bytes_max(self._run.num_parameters)

    def _take_group_merged(self, merged: pb.GroupMerged, session: PeerSession) -> None:
        most = get_codec("float32").payload_bytes_max(self._run.num_parameters)
        if merged.payload_bytes > most:
            raise VerificationError(f"a merged payload of {merged.payload_bytes} bytes; at most {most}")
        self._engine.submit(
            ev.GroupMerged(
                peer=session.peer,
                round=merged.round,
                group=merged.group,
                attempt=merged.attempt,
                payload_hash=_hash_or_none(merged.payload_hash) or "",
                payload_bytes=merged.payload_bytes,
                pieces_hash=_hash_or_none(merged.pieces_hash),
                blamed=_limited(merged.blamed, 64),
            )
        )

    def _is_committed(self, signed: Signed, peer: str) -> bool:
        """Whether this very header is in the open round already: it is sent again after a broken connection."""
        lease = self._engine.state.round.leases.get(peer) if self._engine.state.round else None
        return bool(lease and lease.candidate and lease.candidate.contribution_hash == signed.hash)

    def _take_evaluation(self, signed: Signed, session: PeerSession) -> None:
        report = open_signed(signed, EvaluationReport, run_id=self._run.run_id)
        if report.peer != session.peer or session.role != "validator":
            raise VerificationError("only the validator evaluates")
        if report.checkpoint and not self._store.has(report.digest):
            raise VerificationError("the checkpoint was not pushed before it was reported")
        self._engine.submit(
            ev.EvaluationReported(
                peer=report.peer,
                round=report.round,
                digest=report.digest,
                held_out_loss=report.held_out_loss,
                checkpoint=report.checkpoint,
                report_hash=signed.hash,
            ),
            documents=(signed,),
        )


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise VerificationError("a number that is not finite")
    return value


def _hash_or_none(text: str) -> str | None:
    if text and not re.fullmatch(r"[0-9a-f]{64}", text):
        raise VerificationError("not a SHA-256 in hex")
    return text or None


def _word(text: str) -> str:
    if not re.fullmatch(r"[a-z_]{0,32}", text):
        raise VerificationError("not a word")
    return text


def _limited(text: str, most: int) -> str:
    if len(text) > most:
        raise VerificationError(f"a text of {len(text)} characters; at most {most}")
    return text
