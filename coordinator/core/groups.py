"""Merging in groups before the round is merged: the two-level form, and the butterfly.

When a round's contributions are settled, they are dealt into groups. Some peers (mergers) merge a group into one
payload and say its hash; the manifest then names the groups' payloads, and everybody merges those.

    two-level    mergers fetch the group's payloads; two of them must come to the same bits, else others are asked
    butterfly    all peers of the group average their vectors among themselves; all must hold the same bits, else those
                 who answered try again without whoever most of them blame

A group that is not merged by the deadline is left out: its peers keep their work for the next contribution.
"""

from collections import Counter
from collections.abc import Sequence

from coordinator.core.credits import find_accepted, weigh
from coordinator.core.effects import CheckPayload, Credit, Effect, MergedGroup, OrderMerge
from coordinator.core.events import GroupMerged, PayloadChecked
from coordinator.core.state import Group, GroupResult, LeaseRecord, PeerStatus, Round, State
from protocol.run_spec import BUTTERFLY
from protocol.signing import sha256_hex

QUORUM = 2
MAX_ATTEMPTS = 3
GROUP_CODEC = "int8"  # of a merged group: its error is not fed back, so it must be small


def are_needed(state: State, accepted: Sequence[LeaseRecord]) -> bool:
    """Whether this round's contributions are merged in groups first."""
    exchange = state.spec.exchange
    return exchange.method == BUTTERFLY or 0 < exchange.group_size < len(accepted)


def describe(round_: Round, credits_: Sequence[Credit]) -> tuple[MergedGroup, ...]:
    """The merged groups as the manifest has them; none when the round was not merged in groups."""
    weights = {credit.peer: credit.weight for credit in credits_}
    return tuple(
        MergedGroup(
            peers=tuple(group.peers),
            mergers=tuple(peer for peer in group.mergers if group.results.get(peer) == group.merged),
            payload_hash=group.merged.payload_hash,
            payload_bytes=group.merged.payload_bytes,
            pieces_hash=group.merged.pieces_hash,
            codec=group.codec,
            weight=sum(weights[peer] for peer in group.peers),
        )
        for group in round_.groups
        if group.merged is not None
    )


def begin(state: State, round_: Round, credits_: Sequence[Credit], because: str, now_s: float) -> list[Effect]:
    """Deal the contributions into groups of equal size and have each merged.

    Who is with whom follows from all payloads together, so nobody can choose.
    """
    size = state.spec.exchange.group_size or len(credits_)
    num_groups = -(-len(credits_) // size)
    salt = sha256_hex("".join(credit.payload_hash for credit in credits_).encode())
    dealt = sorted(credits_, key=lambda credit: sha256_hex((salt + credit.peer).encode()))
    round_.because = because
    round_.deadline_s = now_s + state.exchange_s
    round_.groups = [
        Group(index=index, peers=sorted(credit.peer for credit in dealt[index::num_groups]))
        for index in range(num_groups)
    ]
    return [effect for group in round_.groups for effect in _advance(state, round_, group, now_s)]


def record_result(state: State, event: GroupMerged, now_s: float) -> list[Effect]:
    """A merger says what it came to, or that it could not."""
    round_ = state.round
    if round_ is None or event.round != round_.index or event.group >= len(round_.groups):
        return []
    group = round_.groups[event.group]
    if event.peer not in group.mergers or event.attempt != group.attempt or event.peer in group.results:
        return []
    group.results[event.peer] = GroupResult(
        payload_hash=event.payload_hash,
        payload_bytes=event.payload_bytes,
        pieces_hash=event.pieces_hash,
        blamed=event.blamed,
    )
    return _advance(state, round_, group, now_s)


def record_check(round_: Round, event: PayloadChecked) -> list[Effect]:
    """A group's payload has come and was looked at."""
    for group in round_.groups:
        if group.source == event.peer and group.results[event.peer].payload_hash == event.payload_hash:
            group.source = None
            group.merged = group.results[event.peer] if not event.refused_because else None
            group.failed = bool(event.refused_because)
    return []


def leave(state: State, peer: str, now_s: float) -> list[Effect]:
    """A merger is gone: others are asked in its place."""
    round_ = state.round
    if round_ is None:
        return []
    effects = []
    for group in round_.groups:
        if peer in group.mergers and group.merged is None:
            group.results.setdefault(peer, GroupResult(payload_hash="", payload_bytes=0, blamed=peer))
            group.source = None if group.source == peer else group.source
            effects += _advance(state, round_, group, now_s)
    return effects


def order_again(state: State, peer: str, now_s: float) -> list[Effect]:
    """What a peer that has joined again still owes."""
    round_ = state.round
    if round_ is None:
        return []
    owed = [g for g in round_.groups if g.merged is None and peer in g.mergers and peer not in g.results]
    return [_order(state, round_, group, peer, now_s) for group in owed]


def check_payload(group: Group) -> CheckPayload | None:
    """The effect that has a group's payload fetched and looked at, when it waits for that."""
    if group.source is None:
        return None
    result = group.results[group.source]
    return CheckPayload(
        peer=group.source,
        payload_hash=result.payload_hash,
        payload_bytes=result.payload_bytes,
        codec=group.codec,
        codec_options=(),
        pieces_hash=result.pieces_hash,
    )


def are_settled(round_: Round) -> bool:
    """Whether every group is merged or given up."""
    return all(group.merged is not None or group.failed for group in round_.groups)


def _advance(state: State, round_: Round, group: Group, now_s: float) -> list[Effect]:
    """Ask for the payload when enough mergers agree, else ask the mergers that are needed, else give the group up."""
    if group.merged is not None or group.failed or group.source is not None:
        return []
    group.codec = round_.plan.codec if state.spec.exchange.method == BUTTERFLY else GROUP_CODEC
    source = _find_agreed(state, group)
    if source is not None:
        group.source = source
        check = check_payload(group)
        return [check] if check else []
    asked = _ask_all(state, group) if state.spec.exchange.method == BUTTERFLY else _ask_more(state, group)
    group.failed = not asked and set(group.mergers) <= set(group.results)
    return [_order(state, round_, group, peer, now_s) for peer in asked]


def _find_agreed(state: State, group: Group) -> str | None:
    """A connected merger whose result enough others came to, too."""
    tally = Counter(result.payload_hash for result in group.results.values() if result.payload_hash)
    wanted = len(group.mergers) if state.spec.exchange.method == BUTTERFLY else min(QUORUM, len(group.peers))
    for peer, result in group.results.items():
        if tally[result.payload_hash] >= max(1, wanted) and state.peers[peer].status is not PeerStatus.GONE:
            return peer
    return None


def _ask_more(state: State, group: Group) -> list[str]:
    """Two-level: so many that with those who still work the quorum can be reached."""
    working = sum(peer not in group.results for peer in group.mergers)
    tally = Counter(result.payload_hash for result in group.results.values() if result.payload_hash)
    needed = min(QUORUM, len(group.peers)) - max(tally.values(), default=0) - working
    free = [peer for peer in group.peers if peer not in group.mergers and _is_here(state, peer)]
    asked = sorted(free, key=lambda peer: sha256_hex(f"{state.rounds_merged}:{peer}".encode()))[: max(0, needed)]
    group.mergers += asked
    return asked


def _ask_all(state: State, group: Group) -> list[str]:
    """Butterfly: everybody; and when all have answered without success, those who did, without the one they blame."""
    if group.mergers and not set(group.mergers) <= set(group.results):
        return []
    if group.attempt >= MAX_ATTEMPTS:
        return []
    blamed = Counter(result.blamed for result in group.results.values() if result.blamed)
    culprit, votes = max(blamed.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    dropped = {culprit} if 2 * votes > len(group.results) else set()
    group.peers = [peer for peer in group.peers if _is_here(state, peer) and peer not in dropped]
    group.mergers, group.results, group.attempt = list(group.peers), {}, group.attempt + 1
    return list(group.peers)


def _is_here(state: State, peer: str) -> bool:
    return state.peers[peer].status is not PeerStatus.GONE


def _order(state: State, round_: Round, group: Group, peer: str, now_s: float) -> OrderMerge:
    return OrderMerge(
        peer=peer,
        round=round_.index,
        base_digest=round_.base_digest,
        group=group.index,
        attempt=group.attempt,
        butterfly=state.spec.exchange.method == BUTTERFLY,
        contributions=tuple(credit for credit in weigh(state, find_accepted(round_)) if credit.peer in group.peers),
        codec=group.codec,
        deadline_in_s=round_.deadline_s - now_s,
    )
