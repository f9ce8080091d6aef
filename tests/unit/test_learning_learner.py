"""simulations.learning.learner: error feedback, codecs, attacks and merging, against the product's own pieces."""

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from coordinator.core.effects import CloseRound, Credit, GrantLease, MergedGroup
from protocol.aggregation.merge import merge
from protocol.codecs import get_codec
from protocol.error_feedback import KEPT_SHARE, ErrorFeedback, round_start
from protocol.errors import ConfigError
from protocol.outer import get_outer
from protocol.replica import State, merge_into
from protocol.signing import sha256_hex
from simulations.learner import Sent, Work
from simulations.learning.backend import make_backend
from simulations.learning.learner import OWN_SHARE, TensorLearner
from simulations.learning.problem import Problem
from tests.unit.test_learning_backends import CPU, digits_problem, ragged_jobs

PEERS = ("peer-0", "peer-1", "peer-2")


@pytest.fixture
def problem() -> Problem:
    return digits_problem("sgd")


def make_learner(problem: Problem, attacks: dict[str, str] | None = None, backend: Any = "batched") -> TensorLearner:
    return TensorLearner(problem, make_backend(backend, problem, device=CPU), attacks)


def make_work(learner: TensorLearner, peer: str, *, codec: str = "int2", num_ahead: int = 0) -> Work:
    place = PEERS.index(peer)
    grant = GrantLease(
        peer=peer,
        lease_id=place,
        round=learner.state.round,
        base_digest=learner.digest,
        units=((0, 3 * place), (0, 3 * place + 1)),
        deadline_in_s=10.0,
        tokens_before=0,
        round_tokens=6144,
        codec=codec,
        codec_options=(),
        contribute=True,
        ahead=((0, 3 * place + 2),),
    )
    return Work(grant=grant, num_units=1 + place % 2, num_ahead=num_ahead)


def make_credit(peer: str, sent: Sent, codec: str = "int2") -> Credit:
    return Credit(
        peer=peer,
        name=peer,
        lease_id=0,
        units=(),
        tokens=1,
        contribution_hash=sent.payload_hash,
        payload_hash=sent.payload_hash,
        payload_bytes=sent.payload_bytes,
        codec=codec,
        mean_loss=sent.mean_loss,
        norm=sent.norm,
        weight=1.0 + PEERS.index(peer),
        clip=0.5 if peer == PEERS[2] else 1.0,
    )


def close(learner: TensorLearner, credits_: Sequence[Credit], groups: Sequence[MergedGroup] = ()) -> None:
    learner.close_round(
        CloseRound(
            round=learner.state.round,
            base_digest=learner.digest,
            credits=tuple(sorted(credits_, key=lambda credit: credit.payload_hash)),
            divisor=6.0,
            groups=tuple(groups),
            leased_peers=len(PEERS),
            closed_because="",
            inner_steps=2,
            plan="",
            tokens_after=0,
            opened_s=0.0,
        )
    )


def play(learner: TensorLearner, credited: Sequence[str], codec: str = "int2") -> dict[str, Sent]:
    """A round in which all peers contribute and some are credited."""
    learner.open_round([make_work(learner, peer, codec=codec) for peer in PEERS])
    sent = {peer: learner.contribute(peer) for peer in PEERS}
    close(learner, [make_credit(peer, sent[peer], codec) for peer in credited])
    return sent


@pytest.mark.parametrize("kept_share", [KEPT_SHARE, 0.0])
def test_the_state_is_bitwise_what_trainer_feedback_codec_and_merge_make(problem: Problem, kept_share: float) -> None:
    learner = TensorLearner(problem, make_backend("sequential", problem, device=CPU), kept_share=kept_share)
    trainer = make_backend("sequential", problem, device=CPU)
    feedback = {peer: ErrorFeedback(learner.num_parameters) for peer in PEERS}
    codec, outer = get_codec("int2"), problem.spec.outer
    state = learner.state
    for credited in (PEERS, PEERS[:2], PEERS):
        works = [make_work(learner, peer) for peer in PEERS]
        payloads = {}
        for work, job in zip(works, ragged_jobs(problem, 0), strict=False):
            peer, grant = work.grant.peer, work.grant
            own = type(job)(
                peer=peer,
                shards=tuple(index for _, index in grant.units[: work.num_units]),
                tokens_before=0,
                round_tokens=grant.round_tokens,
                lease_tokens=2 * problem.spec.shard_tokens,
            )
            start = round_start(state.theta, feedback[peer].state(), np.empty_like(state.theta), kept_share)
            moved = (state.theta - start) + trainer.train(start, [own]).pseudo_gradients[0]
            payloads[peer] = codec.encode(feedback[peer].compensate(moved, 1.0 - kept_share))
        sent = play(learner, credited)
        assert {peer: one.payload_hash for peer, one in sent.items()} == {
            peer: sha256_hex(payload) for peer, payload in payloads.items()
        }
        chosen = sorted((make_credit(peer, sent[peer]) for peer in credited), key=lambda credit: credit.payload_hash)
        merging = [(payloads[credit.peer], credit.weight, credit.clip) for credit in chosen]
        state = merge_into(state, merging, 6.0, get_outer(outer.optimizer, outer.learning_rate, outer.momentum))
        for peer in credited:
            feedback[peer].settle(payloads[peer])
        assert learner.digest == state.digest


def test_work_that_is_not_credited_is_in_the_next_contribution(problem: Problem) -> None:
    once, twice = make_learner(problem), make_learner(problem)
    play(once, PEERS, "float32")
    play(twice, [], "float32")
    assert twice.state.round == 1
    assert twice.digest == State(0, twice.state.theta).digest
    first, second = play(once, PEERS, "float32"), play(twice, PEERS, "float32")
    assert second["peer-0"].norm > 1.5 * first["peer-0"].norm


def test_lossless_contributions_leave_nothing_behind(problem: Problem) -> None:
    learner = make_learner(problem)
    play(learner, PEERS, "float32")
    learner.open_round([make_work(learner, PEERS[0], codec="float32")])
    other = make_learner(problem)
    other.state, other.digest = learner.state, learner.digest
    other.open_round([make_work(other, PEERS[0], codec="float32")])
    assert learner.contribute(PEERS[0]).payload_hash == other.contribute(PEERS[0]).payload_hash


def test_payload_is_the_same_when_it_is_made_together_or_alone(problem: Problem) -> None:
    learner = make_learner(problem)
    learner.open_round([make_work(learner, peer, codec="float32") for peer in PEERS])
    together = [learner.contribute(peer) for peer in PEERS]
    assert [learner.contribute(peer) for peer in PEERS] == together


def test_the_loss_falls(problem: Problem) -> None:
    learner = make_learner(problem)
    before = learner.held_out_loss()
    for _ in range(5):
        play(learner, PEERS)
    assert learner.held_out_loss() < before


def test_a_pickled_learner_goes_on_as_the_first(problem: Problem) -> None:
    learner = make_learner(problem)
    play(learner, PEERS[:2])
    learner.open_round([make_work(learner, peer) for peer in PEERS])
    learner.contribute(PEERS[0])
    other = pickle.loads(pickle.dumps(learner))  # noqa: S301  # our own bytes
    assert [learner.contribute(peer) for peer in PEERS] == [other.contribute(peer) for peer in PEERS]


def test_what_was_trained_ahead_is_in_the_next_contribution(problem: Problem) -> None:
    learner = make_learner(problem)
    theta = learner.state.theta
    learner.open_round([make_work(learner, PEERS[0], codec="float32", num_ahead=1)])
    sent = learner.contribute(PEERS[0])
    close(learner, [make_credit(PEERS[0], sent, "float32")])
    after = learner.state.theta
    learner.open_round([make_work(learner, PEERS[0], codec="float32")])
    norm = learner.contribute(PEERS[0]).norm

    backend = make_backend("batched", problem, device=CPU)
    job = ragged_jobs(problem, 0)[0]
    own = {"peer": PEERS[0], "round_tokens": 6144, "tokens_before": 0, "lease_tokens": 2 * problem.spec.shard_tokens}
    first = backend.train(theta, [type(job)(shards=(0,), **own)]).pseudo_gradients[0]
    on = {"tokens_before": 6144, "round_tokens": 0, "lease_tokens": problem.spec.shard_tokens}
    ahead = type(job)(peer=PEERS[0], shards=(2,), **on)
    lead = backend.train(theta - np.float32(OWN_SHARE) * first, [ahead]).pseudo_gradients[0]
    second = backend.train(after - lead, [type(job)(shards=(0,), **own)]).pseudo_gradients[0]
    assert norm == pytest.approx(float(np.linalg.norm(second + lead)), rel=1e-5)


def test_groups_merge_their_members_first(problem: Problem) -> None:
    learner = make_learner(problem)
    learner.open_round([make_work(learner, peer) for peer in PEERS])
    sent = {peer: learner.contribute(peer) for peer in PEERS}
    payloads = {peer: learner._payloads.read(one.payload_hash) for peer, one in sent.items()}
    credits_ = sorted((make_credit(peer, sent[peer]) for peer in PEERS), key=lambda credit: credit.payload_hash)
    groups = [
        MergedGroup(
            peers=members,
            mergers=(),
            payload_hash="",
            payload_bytes=0,
            pieces_hash=None,
            codec="int8",
            weight=sum(credit.weight for credit in credits_ if credit.peer in members),
        )
        for members in (PEERS[:2], PEERS[2:])
    ]
    expected, outer = [], problem.spec.outer
    for group in groups:
        own = [(payloads[c.peer], c.weight, c.clip) for c in credits_ if c.peer in group.peers]
        expected.append((get_codec("int8").encode(merge(own, group.weight, learner.num_parameters)), group.weight, 1.0))
    before = learner.state
    close(learner, credits_, groups)
    optimizer = get_outer(outer.optimizer, outer.learning_rate, outer.momentum)
    assert learner.digest == merge_into(before, expected, 6.0, optimizer).digest


def first_round(problem: Problem, attacks: dict[str, str]) -> tuple[TensorLearner, dict[str, np.ndarray[Any, Any]]]:
    """What every peer sends in its first round, decoded."""
    learner = make_learner(problem, attacks)
    learner.open_round([make_work(learner, peer, codec="float32") for peer in PEERS])
    sent = {peer: learner.contribute(peer) for peer in PEERS}
    codec = get_codec("float32")
    decoded = {
        peer: codec.decode(learner._payloads.read(one.payload_hash), learner.num_parameters)
        for peer, one in sent.items()
    }
    return learner, decoded


def test_attackers_send_what_their_attack_says(problem: Problem) -> None:
    _, honest = first_round(problem, {})
    for attack, expected in {"sign_flip": -honest["peer-1"], "scaled": 10 * honest["peer-1"], "zeros": 0.0}.items():
        _, sent = first_round(problem, {"peer-1": attack})
        np.testing.assert_allclose(sent["peer-1"], expected + 0 * honest["peer-1"], rtol=1e-6)
        assert np.array_equal(sent["peer-2"], honest["peer-2"])
    _, sent = first_round(problem, {"peer-1": "noise"})
    assert np.linalg.norm(sent["peer-1"]) == pytest.approx(np.linalg.norm(honest["peer-1"]), rel=1e-4)
    _, sent = first_round(problem, {"peer-1": "copies"})
    assert np.array_equal(sent["peer-1"], honest["peer-0"])


def test_attackers_keep_nothing_when_they_are_refused(problem: Problem) -> None:
    learner, once = first_round(problem, {"peer-1": "sign_flip"})
    close(learner, [])
    sent = play(learner, [], "float32")
    assert sent["peer-1"].norm == pytest.approx(float(np.linalg.norm(once["peer-1"])), rel=1e-5)


def test_an_unknown_attack_is_refused(problem: Problem) -> None:
    with pytest.raises(ConfigError, match="sign_flip"):
        make_learner(problem, {"peer-1": "signflip"})


def test_a_dropped_peer_leaves_nothing(problem: Problem) -> None:
    learner = make_learner(problem)
    play(learner, [])
    learner.drop("peer-1")
    learner.open_round([make_work(learner, "peer-1")])
    fresh = make_learner(problem)
    fresh.open_round([make_work(fresh, "peer-1")])
    learner.open_round([make_work(fresh, "peer-1")])
    assert learner.contribute("peer-1") == fresh.contribute("peer-1")
