"""A round's payloads merged in groups first, as simulations.virtual.group_work has it: by whom, and in what time.

Nobody leaves meanwhile: what that costs is seen by fidelity `time` alone.
"""

from dataclasses import dataclass

import numpy as np

from coordinator.core.groups import GROUP_CODEC, QUORUM
from protocol.policy import ExchangePlan
from protocol.run_spec import BUTTERFLY
from simulations.planned.crowd import Crowd, Ints
from simulations.planned.site import Site
from simulations.time_learner import payload_bytes
from simulations.virtual.coordinator import INSPECT_BPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """The payloads that everybody merges: who made them, their codec and bytes; the time until they were there."""

    makers: Ints
    codec: str
    size: float
    num_groups: int
    seconds: float
    left_out: Ints  # peers whose group was not merged by the deadline


def merge_groups(site: Site, crowd: Crowd, accepted: Ints, plan: ExchangePlan, rng: np.random.Generator) -> Grouped:
    """Merge these peers' payloads in groups; where the run has none, the payloads stay what they are."""
    exchange = site.spec.exchange
    is_butterfly = exchange.method == BUTTERFLY
    size = float(payload_bytes(plan.codec, plan.options, site.num_parameters))
    if not (is_butterfly or 0 < exchange.group_size < len(accepted)):
        return Grouped(makers=accepted, codec=plan.codec, size=size, num_groups=0, seconds=0.0, left_out=accepted[:0])
    dealt = rng.permutation(accepted)
    num_groups = -(-len(dealt) // (exchange.group_size or len(dealt)))
    codec = plan.codec if is_butterfly else GROUP_CODEC
    merged = size if is_butterfly else float(payload_bytes(codec, (), site.num_parameters))
    limit_s, inspect_s = site.spec.round.exchange_s, site.float32_bytes / INSPECT_BPS
    took_s, makers, left_out = [], [], [accepted[:0]]
    for members in (dealt[index::num_groups] for index in range(num_groups)):
        maker = int(members[0])
        seconds = _all_reduce_s(crowd, members, size) if is_butterfly else _gather_s(site, crowd, members, size)
        seconds += 8.0 * merged / float(min(crowd.up_bps[maker], crowd.stream_bps[maker])) + inspect_s
        took_s.append(min(seconds, limit_s))
        if seconds > limit_s:
            left_out.append(members)
            continue
        crowd.sent_bytes[maker] += merged
        makers.append(maker)
    return Grouped(
        makers=np.array(makers, np.int64),
        codec=codec,
        size=merged,
        num_groups=len(makers),
        seconds=max(took_s),
        left_out=np.concatenate(left_out),
    )


def _all_reduce_s(crowd: Crowd, members: Ints, size: float) -> float:
    """In equal parts: everybody sends and gets 2 (N-1)/N vectors; the slowest link holds all up."""
    exchanged = 2.0 * (len(members) - 1) / len(members) * size
    slowest_bps = float(min(crowd.up_bps[members].min(), crowd.down_bps[members].min()))
    return 8.0 * exchanged / slowest_bps + 6 * float(crowd.latency_s[members].max())


def _gather_s(site: Site, crowd: Crowd, members: Ints, size: float) -> float:
    """Some members fetch the others' payloads and merge them."""
    mergers = members[:QUORUM]
    latency_s = 4 * float(crowd.latency_s.max()) + 2 * crowd.latency_s[mergers]
    down_s = 8.0 * size * (len(members) - 1) / crowd.down_bps[mergers]
    up_s = len(mergers) * 8.0 * size / float(crowd.up_bps[members].min())
    merge_s = site.float32_bytes * (len(members) + 1) / crowd.codec_bps[mergers]
    crowd.sent_bytes[members] += len(mergers) * size
    crowd.sent_bytes[mergers] -= size
    crowd.received_bytes[mergers] += size * (len(members) - 1)
    return float((np.maximum(down_s, up_s) + merge_s + latency_s).max())
