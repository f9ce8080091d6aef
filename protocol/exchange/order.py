"""Whom to ask first for a payload, so that nobody's uplink carries it once for every peer.

With seeds (peers that offer their bandwidth) everybody asks a seed, spread over them by hash. Seeds among each other,
and everybody where there are none, form a binary tree for each payload. All peers of a round stand in one ring, drawn
by hash; a payload's contributor is the root of its tree, and the ring from there on fills the places below. So every
peer computes the same trees from the same list of members, and when each contributes one payload, each stands once in
every place: all send equally much. Pieces flow down a tree while it is being filled (protocol.exchange.pieces).

A peer asks upwards only: its parent, and if that fails the parent's parent, up to the contributor. So no two peers ever
wait for each other. The coordinator, which the caller puts last, has everything.

Everything here is pure, and a hint: what comes is checked by its hash.
"""

from collections.abc import Collection
from dataclasses import dataclass

from protocol.signing import sha256_hex

FANOUT = 2
MAX_PARALLEL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Peers to ask, the first first; `parallel` of them at a time."""

    peers: tuple[str, ...]
    parallel: int


def order_sources(
    payload_hash: str,
    *,
    me: str,
    contributor: str,
    seeds: Collection[str],
    others: Collection[str],
    salt: str = "",
    contributor_dialable: bool = True,
) -> Order:
    """The order in which `me` asks for a payload.

    `seeds` and `others`: all peers that can be dialled; they and `salt`, which changes the ring from round to round,
    must be the same for everybody. Where the contributor cannot be dialled the coordinator takes its place, and the
    order may be empty. A peer that is in neither list stands below the tree, and nobody asks it.
    """
    members = {contributor, *(seeds if me in seeds else others)}
    ring = sorted(members, key=lambda peer: _rank(salt, peer))
    start = ring.index(contributor)
    upwards = _path_to_root(_rank(payload_hash, me), me, ring[start:] + ring[:start])
    if not contributor_dialable:
        upwards = [peer for peer in upwards if peer != contributor]
    if not seeds or me in seeds:
        return Order(peers=tuple(upwards), parallel=1)
    spread = sorted(seeds, key=lambda seed: _rank(payload_hash, me, seed))
    return Order(peers=tuple(dict.fromkeys((*spread, *upwards))), parallel=min(MAX_PARALLEL, len(spread)))


def _path_to_root(chance: str, me: str, places: list[str]) -> list[str]:
    """From the parent up. Place 0 is the root, the children of place p are 2p + 1 and 2p + 2."""
    if me in places:
        place = places.index(me)
    else:
        first_leaf = len(places) // FANOUT
        leaf = first_leaf + int(chance, 16) % (len(places) - first_leaf)
        place = FANOUT * leaf + 1
    path = []
    while place:
        place = (place - 1) // FANOUT
        path.append(places[place])
    return path


def _rank(*parts: str) -> str:
    return sha256_hex("\n".join(parts).encode())
