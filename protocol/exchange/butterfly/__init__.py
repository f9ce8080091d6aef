"""The butterfly: one round of hivemind's all-reduce, for a group of trusted peers that the coordinator names.

    group = ButterflyGroup(group_id=group_id_of(run_id, round), peers=..., weights=..., addresses=...)
    average = await average_butterfly(node, group=group, vector=vector, codec="float16")

Each of N peers reduces 1/N of the vector, so everyone sends and receives 2(N-1)/N of its encoded size, whatever N is:
for dense vectors between well-connected peers. It is not private, survives no failing peer, and knows no upload limit.

| module | what |
|---|---|
| `round` | one round as one peer goes through it: what is awaited, and how it ends |
| `group` | who takes part, and how long they wait |
| `links` | what peers tell each other beside the parts: their view of the group, digests, failures |
| `reduce` | hivemind's all-reduce, made to fail loudly |
| `parts` | how parts are encoded, and every check of what comes |
| `streams` | frames of bounded length over libp2p |
"""

from protocol.exchange.butterfly.group import ButterflyGroup, ButterflyTimeouts, group_id_of
from protocol.exchange.butterfly.round import average_butterfly

__all__ = ["ButterflyGroup", "ButterflyTimeouts", "average_butterfly", "group_id_of"]
