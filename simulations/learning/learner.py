"""The learner of fidelity `learn`: what all virtual peers train, send and merge, with the product's own pieces.

There is one state for all peers, since all replicas are equal. Per peer there is what differs: the error feedback, what
was trained ahead, the inner optimizer's state (in the backend). They wait in files (simulations.learning.stores).

It does not know the time, the network, or who is let in: simulations.virtual_run tells it.

Shape letters: P peers, D parameters.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from coordinator.core.effects import CloseRound, Credit, MergedGroup
from protocol import parameters
from protocol.aggregation.merge import merge
from protocol.codecs import Codec, codec_of, get_codec
from protocol.error_feedback import KEPT_SHARE, round_start
from protocol.outer import get_outer
from protocol.replica import State, merge_into
from protocol.signing import sha256_hex
from simulations.learner import Sent, Work
from simulations.learning.attacks import ATTACKS, COPIES, check_attack
from simulations.learning.backend import Backend, Job, Merge, Trained, Vector
from simulations.learning.problem import Problem
from simulations.learning.stores import PayloadSpool, PeerVectors
from worker.optimizers import sum_rates

OWN_SHARE = 0.5  # as worker.contributor
EVALUATION_BATCH = 64
_LOSSLESS = "float32"


class TensorLearner:
    """See simulations.learner.Learner. attacks: by peer id, names of simulations.learning.attacks.

    kept_share, turns_momentum: for comparisons with methods that begin every round at θ (0.0), and that leave Muon's
    momentum as it is at a merge; workers do both.
    """

    def __init__(
        self,
        problem: Problem,
        backend: Backend,
        attacks: Mapping[str, str] | None = None,
        *,
        kept_share: float = KEPT_SHARE,
        turns_momentum: bool = True,
    ) -> None:
        self._problem = problem
        self._backend = backend
        self._attacks = dict(attacks or {})
        self._kept_share = kept_share
        self._turns_momentum = turns_momentum and problem.optimizer == "muon"
        for attack in self._attacks.values():
            check_attack(attack)
        self._model = problem.build_model()
        self._outer = get_outer(
            problem.spec.outer.optimizer, problem.spec.outer.learning_rate, problem.spec.outer.momentum
        )
        self.state = State(0, parameters.flatten(self._model))
        self.digest = self.state.digest
        self.num_parameters = self.state.theta.size
        self._residuals = PeerVectors(self.num_parameters)
        self._leads = PeerVectors(self.num_parameters)  # λ of worker.contributor
        self._trained_from: dict[str, int] = {}  # the round of the state of each peer's last lease
        self._merge: Merge | None = None  # that made `state`
        self._payloads = PayloadSpool()
        self._waiting: dict[str, Work] = {}
        self._works: dict[str, Work] = {}
        self._losses: dict[str, float] = {}
        self._encoded: dict[str, Sent] = {}  # what will be sent in this round, where it could be encoded at once
        self._sent: dict[str, str] = {}  # payload hash of those that no manifest has listed
        self._honest: Sent | None = None  # the first honest contribution of this round

    def open_round(self, works: Sequence[Work]) -> None:
        """See Learner. Nothing is computed yet."""
        for work in works:
            self._waiting[work.grant.peer] = self._works[work.grant.peer] = work

    def contribute(self, peer: str) -> Sent:
        """See Learner. The first peer's contribution has all peers of the round trained."""
        self._train_waiting()
        attack = self._attacks.get(peer)
        if attack == COPIES and self._honest is not None:
            return replace(self._honest, mean_loss=self._losses.get(peer, math.nan))
        sent = self._encoded.pop(peer, None) or self._encode_one(peer, attack)
        if attack is None:
            self._sent[peer] = sent.payload_hash
            self._honest = self._honest or sent
        return sent

    def close_round(self, closed: CloseRound) -> None:
        """See Learner. Raises VerificationError when the next state would not be finite."""
        self._train_waiting()  # those who have sent nothing have worked all the same, from this state
        before, self._merge = self.state.theta, None
        if closed.credits:
            merging = self._read_groups(closed) if closed.groups else self._read(closed.credits)
            self.state = merge_into(self.state, merging, closed.divisor, self._outer)
            if self._turns_momentum:
                tokens = [credit.tokens for credit in closed.credits]
                rate_sum = sum_rates(tokens, closed.tokens_after, self._problem.spec, closed.learning_rate)
                self._merge = Merge(moved=before - self.state.theta, rate_sum=rate_sum)
        else:
            self.state = State(self.state.round + 1, self.state.theta, self.state.momentum)
        self.digest = self.state.digest
        for credit in closed.credits:
            if self._sent.get(credit.peer) == credit.payload_hash:
                self._settle(credit)
        self._encoded.clear()
        self._sent.clear()
        self._payloads.clear()
        self._honest = None

    def drop(self, peer: str) -> None:
        """See Learner."""
        for kept in (self._waiting, self._works, self._losses, self._encoded, self._sent, self._trained_from):
            kept.pop(peer, None)
        self._residuals.clear(peer)
        self._leads.clear(peer)
        self._backend.forget(peer)

    def held_out_loss(self) -> float:
        """Nats a token of the state, without dropout."""
        model, rows = self._model, self._problem.data.held_out
        parameters.assign(model, self.state.theta)
        model.eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(rows), EVALUATION_BATCH):
                part = torch.from_numpy(rows[start : start + EVALUATION_BATCH])
                total += self._problem.task.loss(model, part).item() * len(part)
        return total / len(rows)

    # ---- training

    def _train_waiting(self) -> None:
        """Train the peers whose leases build on this state; most steps first, so that chunks are even."""
        works = [work for work in self._waiting.values() if work.grant.base_digest == self.digest]
        for work in works:
            del self._waiting[work.grant.peer]
        if not works:
            return
        works = sorted((work for work in works if work.num_units > 0), key=lambda work: -work.num_units)
        num_chunks = -(-len(works) // self._backend.chunk)
        for number in range(num_chunks):
            start, stop = (len(works) * place // num_chunks for place in (number, number + 1))
            self._train_chunk(works[start:stop])

    def _train_chunk(self, works: Sequence[Work]) -> None:
        peers = [work.grant.peer for work in works]
        attackers = [place for place, peer in enumerate(peers) if peer in self._attacks]
        residuals = None
        if any(peer in self._leads or peer in self._residuals for peer in peers):
            residuals = self._residuals.read(peers)
            residuals[attackers] = 0.0
        trained, displacements = self._run(works, residuals)
        if residuals is None:
            residuals = displacements
        else:
            residuals *= np.float32(self._problem.spec.exchange.error_feedback_decay - self._kept_share)
            residuals += displacements
        self._residuals.write(peers, residuals)
        self._losses.update(zip(peers, trained.mean_losses.tolist(), strict=True))
        if all(work.grant.codec == _LOSSLESS for work in works) and not attackers:
            self._encode_together(peers, residuals)
        ahead = [place for place, work in enumerate(works) if work.num_ahead > 0]
        if ahead:
            self._run_ahead([works[place] for place in ahead], displacements[ahead])

    def _run(self, works: Sequence[Work], residuals: Vector | None) -> tuple[Trained, Vector]:
        """The works' own shards; also θ minus where each peer has come to, (P, D), what it was ahead included.

        residuals, (P, D): the peers' error feedback, part of which is in where they begin. None: all begin at θ.
        """
        peers = [work.grant.peer for work in works]
        shard_tokens, last_round = self._problem.spec.shard_tokens, self.state.round - 1
        jobs = [
            Job(
                peer=grant.peer,
                shards=tuple([index for _, index in grant.units[: work.num_units]]),
                tokens_before=grant.tokens_before,
                round_tokens=grant.round_tokens,
                lease_tokens=len(grant.units) * shard_tokens,
                highest_rate=grant.learning_rate,
                turns=self._merge is not None and self._trained_from.get(grant.peer) == last_round,
            )
            for work in works
            for grant in (work.grant,)
        ]
        self._trained_from.update(dict.fromkeys(peers, self.state.round))
        if residuals is None:
            trained = self._backend.train(self.state.theta, jobs, self._merge)
            return trained, trained.pseudo_gradients
        starts = round_start(self.state.theta, residuals, np.empty_like(residuals), self._kept_share)
        if any(peer in self._leads for peer in peers):
            starts -= self._leads.read(peers)
        for peer in peers:
            self._leads.clear(peer)
        trained = self._backend.train(starts, jobs, self._merge)
        displacements = np.subtract(self.state.theta, starts, out=starts)
        displacements += trained.pseudo_gradients
        return trained, displacements

    def _run_ahead(self, works: Sequence[Work], displacements: Vector) -> None:
        jobs = [
            Job(
                peer=work.grant.peer,
                shards=tuple(index for _, index in work.grant.ahead[: work.num_ahead]),
                tokens_before=work.grant.tokens_before + work.grant.round_tokens,
                round_tokens=0,
                lease_tokens=len(work.grant.ahead) * self._problem.spec.shard_tokens,
                highest_rate=work.grant.learning_rate,
            )
            for work in works
        ]
        trained = self._backend.train(self.state.theta - np.float32(OWN_SHARE) * displacements, jobs)
        self._leads.write([job.peer for job in jobs], trained.pseudo_gradients)

    # ---- what is sent

    def _encode_one(self, peer: str, attack: str | None) -> Sent:
        grant, vector = self._works[peer].grant, self._residuals.read_one(peer)
        if attack is not None:
            seed = sha256_hex(f"{self._problem.spec.seed}:{grant.round}:{peer}".encode())
            vector = ATTACKS[attack](vector, np.random.Generator(np.random.PCG64(int(seed, 16))))
        codec = _codec(grant.codec, grant.codec_options)
        payload = codec.encode(vector)
        lossless = codec.name == _LOSSLESS
        return self._keep(
            peer, payload, _norms(vector[None])[0] if lossless else codec.inspect(payload, self.num_parameters).norm
        )

    def _encode_together(self, peers: Sequence[str], vectors: Vector) -> None:
        """What honest peers will send of vectors (P, D), lossless: in less than half the time that one by one takes."""
        payloads = get_codec(_LOSSLESS).encode_rows(vectors)
        for peer, payload, norm in zip(peers, payloads, _norms(vectors), strict=True):
            self._encoded[peer] = self._keep(peer, payload, norm)

    def _keep(self, peer: str, payload: bytes, norm: float) -> Sent:
        payload_hash = sha256_hex(payload)
        self._payloads.add(payload_hash, payload)
        return Sent(
            payload_hash=payload_hash,
            payload_bytes=len(payload),
            norm=norm,
            mean_loss=self._losses.get(peer, math.nan),
        )

    # ---- merging

    def _read(self, credits_: Iterable[Credit]) -> Iterator[tuple[bytes, float, float]]:
        return ((self._payloads.read(credit.payload_hash), credit.weight, credit.clip) for credit in credits_)

    def _read_groups(self, closed: CloseRound) -> Iterator[tuple[bytes, float, float]]:
        for group in closed.groups:
            yield self._merge_group(group, closed.credits), group.weight, 1.0

    def _merge_group(self, group: MergedGroup, credits_: Sequence[Credit]) -> bytes:
        """What a group's mergers would have made of its contributions: see protocol.replica.merge_group."""
        members = [credit for credit in credits_ if credit.peer in group.peers]
        mean = merge(self._read(members), sum(credit.weight for credit in members), self.num_parameters)
        return get_codec(group.codec).encode(mean)

    def _settle(self, credit: Credit) -> None:
        if credit.codec == _LOSSLESS:
            self._residuals.clear(credit.peer)  # it has sent everything
            return
        payload = self._payloads.read(credit.payload_hash)
        residual = self._residuals.read([credit.peer])
        codec_of(payload).accumulate(payload, -1.0, residual[0])
        self._residuals.write([credit.peer], residual)


def _norms(vectors: Vector) -> list[float]:
    """What `Codec.inspect` gives for lossless payloads of vectors (P, D), which `Codec.encode` has checked."""
    wide = vectors.astype(np.float64)
    norms: list[float] = np.sqrt(np.square(wide, out=wide).sum(axis=1)).tolist()
    return norms


@cache
def _codec(name: str, options: tuple[tuple[str, int | float], ...]) -> Codec:
    return get_codec(name, dict(options))
