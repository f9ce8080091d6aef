"""What accepted contributions count for: tokens, weights, clip factors."""

from coordinator.core.effects import Credit
from coordinator.core.state import LeaseRecord, LeaseStatus, Round, State
from protocol.aggregation import Vote, cap_weights, get_rule
from protocol.run_spec import BUTTERFLY


def find_accepted(round_: Round) -> list[LeaseRecord]:
    """The leases whose contributions were accepted."""
    return [lease for lease in round_.leases.values() if lease.status is LeaseStatus.ACCEPTED]


def count_tokens(state: State, lease: LeaseRecord) -> int:
    units = lease.candidate.lease_units + lease.candidate.carried_units if lease.candidate else []
    return len(units) * state.spec.shard_tokens


def weigh(state: State, accepted: list[LeaseRecord]) -> list[Credit]:
    """Weights from verified tokens, capped; clip factors by the run's rule. Canonical order: by payload hash.

    The butterfly's vectors are never seen here, so they are not clipped.
    """
    rule = state.spec.aggregation
    rule_name = "mean" if state.spec.exchange.method == BUTTERFLY else rule.rule
    candidates = sorted(
        ((lease, lease.candidate) for lease in accepted if lease.candidate),
        key=lambda pair: (pair[1].payload_hash, pair[0].peer),
    )
    weights = cap_weights([float(count_tokens(state, lease)) for lease, _ in candidates], rule.max_weight_fraction)
    votes = [Vote(weight=w, norm=c.norm) for w, (_, c) in zip(weights, candidates, strict=True)]
    clips = get_rule(rule_name)(votes, rule.clip_factor)
    return [
        Credit(
            peer=lease.peer,
            name=state.peers[lease.peer].name,
            lease_id=lease.lease_id,
            units=(*candidate.lease_units, *candidate.carried_units),
            tokens=count_tokens(state, lease),
            contribution_hash=candidate.contribution_hash,
            payload_hash=candidate.payload_hash,
            payload_bytes=candidate.payload_bytes,
            codec=candidate.codec,
            mean_loss=candidate.mean_loss,
            norm=candidate.norm,
            weight=weight,
            clip=clip,
            pieces_hash=candidate.pieces_hash,
        )
        for (lease, candidate), weight, clip in zip(candidates, weights, clips, strict=True)
    ]
