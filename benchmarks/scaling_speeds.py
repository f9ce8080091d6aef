"""What the cost model needs to know of this machine and of the product: speeds of codecs and merge, sizes of messages.

All from the product's own code, on one core. Messages are real documents, with one address a worker, as most home
machines have.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from benchmarks.codecs import make_vector
from benchmarks.scaling_model import Coder, Signals
from coordinator.core import effects as fx
from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.groups import QUORUM
from coordinator.core.state import State as CoreState
from protocol.codecs import get_codec
from protocol.documents import Accepted, GroupPayload, Lease, Manifest, ShardRef, sign
from protocol.envelope import pack
from protocol.error_feedback import ErrorFeedback
from protocol.identity import Identity
from protocol.outer import OuterOptimizer, get_outer
from protocol.replica import State, merge_into
from protocol.run_spec import RunSpec
from protocol.wire import coordinator_pb2 as pb

REPEATS = 5
NUM_SHARDS = 50  # of a lease: one a step
FEW, MANY = 2, 10  # payloads in a merge: the difference is what a payload costs
NESTEROV, AVERAGE = get_outer("nesterov", 0.7, 0.5), get_outer("average", 1.0, 0.0)
HASH = hashlib.sha256(b"").hexdigest()
SPEC = RunSpec.model_validate({"round": {"min_peers": 1}, "train": {"tokens": 10**12}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Coders by name, and parameters a second of everything in a merge but the payloads: outer step and digest."""

    coders: dict[str, Coder]
    finish: float


def measure_speeds(num_parameters: int, names: Sequence[str], outer: OuterOptimizer = NESTEROV) -> Speeds:
    """Of codecs with their default options."""
    finish_s: list[float] = []
    coders = {name: _measure_coder(name, num_parameters, outer, finish_s) for name in names}
    return Speeds(coders=coders, finish=num_parameters / median(finish_s))


def _measure_coder(name: str, num_parameters: int, outer: OuterOptimizer, finish_s: list[float]) -> Coder:
    codec = get_codec(name)
    delta, feedback = make_vector(num_parameters), ErrorFeedback(num_parameters)
    payload = codec.encode(delta)
    zeros = np.zeros(num_parameters, np.float32)
    state = State(0, zeros, zeros if outer.has_momentum else None)

    def merge(count: int) -> None:
        merged = merge_into(state, [(payload, 1.0, 1.0)] * count, float(count), outer)
        _ = merged.digest

    few_s, many_s = _time(lambda: merge(FEW)), _time(lambda: merge(MANY))
    decode_s = (many_s - few_s) / (MANY - FEW)
    finish_s.append(few_s - FEW * decode_s)
    return Coder(
        bytes_per_parameter=len(payload) / num_parameters,
        encode=num_parameters / _time(lambda: codec.encode(feedback.compensate(delta, 0.5))),
        decode=num_parameters / decode_s,
        check=num_parameters / _time(lambda: codec.inspect(payload, num_parameters)),
    )


def _time(call: Callable[[], object]) -> float:
    """Seconds of the processor; the first call is not counted."""
    call()
    seconds = []
    for _ in range(REPEATS):
        start_s = time.process_time()
        call()
        seconds.append(time.process_time() - start_s)
    return median(seconds)


# ---- messages


def measure_signals() -> Signals:
    """Sizes of what the coordinator sends a worker in a round."""
    identity = Identity.generate()
    peer = identity.peer_id
    address = pb.PeerAddress(peer=peer, addresses=[f"/ip4/203.0.113.77/tcp/40123/p2p/{peer}"])
    source = pb.PayloadSource(payload_hash=HASH, peer=peer, addresses=address.addresses)
    notice = pb.ManifestNotice(manifest=pack(sign(_manifest(), identity)))
    lease = pack(sign(_lease(peer), identity))
    contribution, group, groups = _accepted(peer), _group(peer), _group(*[peer] * 11)
    return Signals(
        base=notice.ByteSize() + lease.ByteSize(),
        per_named=address.ByteSize() + 3,  # a tag and a length
        per_contribution=len(contribution.model_dump_json()) + 1,
        per_source=source.ByteSize() + 3,
        per_group=len(group.model_dump_json()) + 1 - (len(peer) + 3),
        per_member=(len(groups.model_dump_json()) - len(group.model_dump_json())) / 10,
    )


def measure_decisions(num_workers: int) -> float:
    """Seconds of the processor, a worker and round, for the core's decisions and a signed lease.

    The core plays one round: its contributors contribute, everybody reports the new state and is leased anew.
    """
    state = machine.create(SPEC, num_shards=10**8, num_parameters=10**6, initial_digest=HASH)
    names = [f"worker{index}" for index in range(num_workers)]
    joins = [
        ev.PeerJoined(peer=name, name=name, device="", role="worker", token_id=HASH, lease_id=None) for name in names
    ]
    pause, resume = ev.PauseRequested(paused=True), ev.PauseRequested(paused=False)
    _handle(state, [pause, ev.InviteIssued(token_id=HASH, uses=num_workers), *joins, *_reports(state, names)])
    leases = [effect for effect in _handle(state, [resume]) if isinstance(effect, fx.GrantLease)]
    start_s = time.process_time()
    for lease in leases:
        if lease.contribute:
            _handle(state, _contribute(lease))
    _handle(state, _reports(state, names))
    core_s = time.process_time() - start_s
    if state.round is None or state.round.index != 1:
        raise RuntimeError("the core has not played a round")
    identity = Identity.generate()
    lease_s = _time(lambda: pack(sign(_lease(identity.peer_id), identity)))
    return core_s / num_workers + lease_s


def _handle(state: CoreState, events: Sequence[ev.Event]) -> list[fx.Effect]:
    return [effect for event in events for effect in machine.handle(state, event, 0.0)]


def _reports(state: CoreState, names: Sequence[str]) -> list[ev.Event]:
    rounds = state.rounds_merged
    return [ev.StateReported(peer=name, round=rounds, digest=HASH, claimed_steps_per_s=1.0) for name in names]


def _contribute(lease: fx.GrantLease) -> list[ev.Event]:
    hash_ = hashlib.sha256(lease.peer.encode()).hexdigest()
    header = ev.ContributionCommitted(
        peer=lease.peer,
        lease_id=lease.lease_id,
        base_digest=lease.base_digest,
        units=lease.units,
        inner_steps=len(lease.units),
        tokens=len(lease.units) * SPEC.shard_tokens,
        mean_loss=2.0,
        codec=lease.codec,
        contribution_hash=hash_,
        payload_hash=hash_,
        payload_bytes=1,
    )
    return [header, ev.PayloadChecked(peer=lease.peer, payload_hash=hash_, norm=1.0)]


def _manifest() -> Manifest:
    return Manifest(
        run_id=HASH[:16],
        seq=10_000,
        previous=HASH,
        round=1_000,
        base_digest=HASH,
        rule="norm_clip",
        outer_optimizer="nesterov",
        outer_learning_rate=0.7,
        outer_momentum=0.5,
        divisor=1_000_000.0,
        contributions=(),
        leased_peers=1_000,
        closed_because="every lease is settled",
        inner_steps=50,
        plan="sparse k=64, 50 inner steps: 1.90 MB up and 31 payloads down take 4.71 s of 54.7 s (8.6%)",
        tokens_after=10**9,
    )


def _accepted(peer: str) -> Accepted:
    return Accepted(
        peer=peer,
        name="kitchen-laptop",
        contribution_hash=HASH,
        payload_hash=HASH,
        payload_bytes=1_900_000,
        pieces_hash=HASH,
        codec="sparse",
        tokens=819_200,
        norm=1.2345678901234567,
        weight=819_200.0,
        clip=1.0,
    )


def _group(*peers: str) -> GroupPayload:
    return GroupPayload(
        peers=peers,
        mergers=peers[:1] * QUORUM,
        payload_hash=HASH,
        payload_bytes=100_000_000,
        pieces_hash=HASH,
        codec="int8",
        weight=819_200.0,
    )


def _lease(peer: str) -> Lease:
    return Lease(
        run_id=HASH[:16],
        lease_id=100_000,
        peer=peer,
        round=1_000,
        base_digest=HASH,
        shards=tuple(ShardRef(pass_index=1, index=1_000 + index) for index in range(NUM_SHARDS)),
        steps_per_shard=1,
        deadline_in_s=110.0,
        tokens_before=10**9,
        round_tokens=10**6,
        codec="sparse",
        codec_options={"k": 64},
    )
