"""What a round exchanges, and whose contributions: decided when it opens, from what was measured until then."""

from collections.abc import Collection
from dataclasses import replace

from coordinator.core.state import State
from protocol.policy import ExchangePlan, Links, choose_learning_rate, choose_optimizer, describe_links, plan_exchange
from protocol.run_spec import AUTO
from protocol.signing import sha256_hex


def plan_round(state: State, workers: Collection[str]) -> ExchangePlan:
    """Codec and inner steps for a round of these workers, of which there must be one (protocol.policy)."""
    exchange, inner_steps, before = state.spec.exchange, state.spec.round.inner_steps, state.plan
    train = state.spec.train
    run_steps = train.tokens / (state.spec.step_tokens * len(workers))
    plan = plan_exchange(
        num_parameters=state.num_parameters,
        contributors=min(len(workers), exchange.max_contributors),
        links=_describe_links(state, workers),
        share=exchange.share,
        codec=exchange.codec,
        options=exchange.codec_options,
        inner_steps=None if inner_steps == AUTO else inner_steps,
        progress=state.tokens_credited / train.tokens,
        run_steps=run_steps,
        round_s=state.round_time_s,
        held_steps=before.inner_steps if before and before.round_s == state.round_time_s else None,
        overlap=exchange.overlap,
    )
    if train.learning_rate != AUTO:
        return plan
    optimizer, said = str(train.optimizer), "learning rate"
    if train.optimizer == AUTO:
        shares = [share for peer in workers if (share := state.peers[peer].optimizer_share) > 0.0]
        optimizer, why = choose_optimizer(shares, before.optimizer if before else None)
        plan, said = replace(plan, optimizer=optimizer), f"{why}, rate"
    rate = choose_learning_rate(
        optimizer, num_parameters=state.num_parameters, run_steps=run_steps, workers=len(workers)
    )
    return replace(plan, learning_rate=rate, reason=f"{plan.reason}; {said} {rate:.2g}, {len(workers)} workers")


def choose_contributors(state: State, workers: Collection[str]) -> set[str]:
    """At most `max_contributors` of them, those whose last turn is longest ago first; among equals by lot.

    So with N workers everybody's turn comes in every ceil(N / max_contributors) rounds.
    """
    most = state.spec.exchange.max_contributors
    if len(workers) <= most:
        return set(workers)

    def lot(peer: str) -> str:
        return sha256_hex(f"{state.spec.seed}:{state.rounds_merged}:{peer}".encode())

    return set(sorted(workers, key=lambda peer: (state.peers[peer].last_turn, lot(peer)))[:most])


def _describe_links(state: State, workers: Collection[str]) -> Links:
    peers = [state.peers[peer] for peer in workers]
    speeds = [peer.steps_per_s for peer in peers if peer.observed] or [peer.steps_per_s for peer in peers]
    return describe_links(
        step_s=[1.0 / max(speed, 1e-6) for speed in speeds],
        upload_bps=[peer.upload_bps for peer in peers if peer.upload_bps],
        download_bps=[peer.download_bps for peer in peers if peer.download_bps],
    )
