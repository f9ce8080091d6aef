"""One peer of benchmarks.averaging, in a process of its own: one system, round after round until it is killed.

    python -m benchmarks.averaging_peer SYSTEM INDEX NUM_PEERS NUM_PARAMETERS FOLDER

It talks to the hub by `share`: a line of JSON out, the line of everybody's values back, so every share is a barrier
too. When the hub is gone, so is this process with all that it started. Times are of the machine's monotonic clock.

A round begins with the peer's own float32 vector (D,) in memory and ends when everybody has the result. Bytes are those
handed to libp2p streams: payloads, or serialised messages with their lengths.
"""

import asyncio
import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

Vector = NDArray[np.float32]
SAMPLE_VALUES = 1 << 16
STEP_TIMEOUT_S = 300.0
WEIGHT = 1.0


def share(value: Any) -> list[Any]:
    """Everybody's values, in the order of the peers."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        os.killpg(0, signal.SIGKILL)
    answer: list[Any] = json.loads(line)
    return answer


async def share_async(value: Any) -> list[Any]:
    return await asyncio.to_thread(share, value)


def make_vector(index: int, num_parameters: int) -> Vector:
    """Like a pseudo-gradient: normal values, on another scale every 256 of them."""
    rng = np.random.default_rng(index)
    vector = rng.standard_normal(num_parameters, dtype=np.float32)
    scales = np.exp(rng.standard_normal(-(-num_parameters // 256), dtype=np.float32))
    vector *= np.float32(0.001) * np.repeat(scales, 256)[:num_parameters]
    return vector


class Stopwatch:
    """When the round began and ended, the seconds of its phases, and the processor's seconds in all.

    The processor's seconds of a phase are this process's alone; those in all are with the processes that it started.
    """

    def __init__(self) -> None:
        own_processes()
        self._cpu_begin_s = cpu_s()
        self.cpu_s = 0.0
        self.phases_s: dict[str, float] = {}
        self.phases_cpu_s: dict[str, float] = {}
        self._lap_cpu_s = time.process_time()
        self.begin_s = self.end_s = self._lap_s = time.monotonic()

    def lap(self, phase: str) -> None:
        lap_s, lap_cpu_s = self._lap_s, self._lap_cpu_s
        self._lap_s, self._lap_cpu_s = time.monotonic(), time.process_time()
        self.phases_s[phase] = self._lap_s - lap_s
        self.phases_cpu_s[phase] = self._lap_cpu_s - lap_cpu_s

    def stop(self) -> None:
        """The round ended with the last lap; laps after this begin now."""
        self.end_s = self._lap_s
        self.cpu_s = cpu_s() - self._cpu_begin_s
        self._lap_s, self._lap_cpu_s = time.monotonic(), time.process_time()


@functools.cache
def own_processes() -> list[psutil.Process]:
    """This process and all that it started. Looking for them takes long, so it is done once, when all are there."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def cpu_s() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in own_processes())


def report(watch: Stopwatch, result: Vector, sent_bytes: int, folder: Path, **more: Any) -> None:
    """Give the hub a round's figures; of the result its hash, and a sample in a file."""
    stride = max(1, result.size // SAMPLE_VALUES)
    np.save(folder / "sample.npy", result[::stride])
    digest = hashlib.sha256(result.data).hexdigest()
    figures = {
        "begin_s": watch.begin_s,
        "end_s": watch.end_s,
        "cpu_s": watch.cpu_s,
        "phases_s": watch.phases_s,
        "phases_cpu_s": watch.phases_cpu_s,
    }
    share({**figures, "sent_bytes": sent_bytes, "digest": digest, **more})


@asynccontextmanager
async def started_node(folder: Path) -> Any:
    """Our node, its store, and (peer id, addresses) of all."""
    from protocol.exchange.peer import PeerNode
    from protocol.exchange.store import BlobStore

    store = BlobStore(folder / "blobs")
    async with await PeerNode.start(store, folder / "key", public=False) as node:
        yield node, store, await share_async((node.peer_id, node.addresses))


async def run_sparse(index: int, num_peers: int, num_parameters: int, folder: Path) -> None:
    """manyhands, as a run does it: all payloads by hash, from the peers that made them; the same merge at everyone."""
    from protocol.codecs import get_codec
    from protocol.error_feedback import ErrorFeedback
    from protocol.exchange.fetch import Wanted, fetch_blobs
    from protocol.exchange.peer import PeerSource
    from protocol.outer import get_outer
    from protocol.replica import State, merge_into

    codec, outer, feedback = get_codec("sparse"), get_outer("average", 1.0, 0.0), ErrorFeedback(num_parameters)
    delta = make_vector(index, num_parameters)
    state = State(0, np.zeros(num_parameters, np.float32))
    async with started_node(folder) as (node, store, peers):

        def encode(watch: Stopwatch) -> tuple[str, int]:
            residual = feedback.compensate(delta, 1.0)
            watch.lap("error feedback")
            payload = codec.encode(residual)
            watch.lap("encode")
            blob_hash = store.put(payload)
            watch.lap("store")
            return blob_hash, len(payload)

        def merge(before: State, manifest: list[Any], watch: Stopwatch) -> State:
            contributions = ((store.read(blob_hash), WEIGHT, 1.0) for blob_hash, _ in manifest)
            merged = merge_into(before, contributions, WEIGHT * num_peers, outer)
            watch.lap("merge and outer step")
            return merged

        def finish(merged: State, own_hash: str, watch: Stopwatch) -> None:
            _ = merged.digest
            watch.lap("afterwards: digest")
            feedback.settle(store.read(own_hash))
            watch.lap("afterwards: settle")

        while True:
            sent_bytes = node.bytes_sent
            await share_async("begin")
            watch = Stopwatch()
            own = await asyncio.to_thread(encode, watch)
            manifest = await share_async(own)  # in a run, the coordinator's manifest
            watch.lap("wait for all")
            wanted = [
                Wanted(blob_hash=blob_hash, size_bytes=size, sources=[PeerSource(node, *peer)])
                for (blob_hash, size), peer in zip(manifest, peers, strict=True)
            ]
            await fetch_blobs(store, wanted, concurrency=num_peers)
            watch.lap("fetch")
            state = await asyncio.to_thread(merge, state, manifest, watch)
            await share_async("end")  # nobody fetches any more
            watch.stop()
            await asyncio.to_thread(finish, state, own[0], watch)
            await asyncio.to_thread(
                report, watch, state.theta, node.bytes_sent - sent_bytes, folder, state=state.digest
            )
            store.prune(set(), 0)


async def run_butterfly(index: int, num_peers: int, num_parameters: int, folder: Path) -> None:
    """manyhands' all-reduce for trusted groups, float16."""
    from protocol.errors import ManyhandsError
    from protocol.exchange.butterfly import ButterflyGroup, average_butterfly, group_id_of
    from protocol.exchange.butterfly.streams import FrameStream

    sent = [0]
    send = FrameStream.send

    async def counting_send(stream: FrameStream, frame: bytes, timeout_s: float) -> None:
        sent[0] += len(frame)
        await send(stream, frame, timeout_s)

    FrameStream.send = counting_send  # type: ignore[method-assign,assignment]
    vector = make_vector(index, num_parameters)
    async with started_node(folder) as (node, _, peers):
        for round_number in itertools.count():
            group = ButterflyGroup(
                group_id=group_id_of("benchmark", round_number),
                peers=tuple(peer_id for peer_id, _ in peers),
                weights=(WEIGHT,) * num_peers,
                addresses=dict(peers),
            )
            sent[0] = 0
            await share_async("begin")
            watch = Stopwatch()
            try:
                average, met = await average_butterfly(node, group=group, vector=vector, codec="float16"), num_peers
            except ManyhandsError:  # it broke off, for everybody: a round to play again
                average, met = vector, 0
            watch.lap("all-reduce and digests")
            watch.stop()
            await asyncio.to_thread(report, watch, average, sent[0], folder, group=met)


def run_hivemind(codec: str, index: int, num_peers: int, num_parameters: int, folder: Path) -> None:
    """hivemind.DecentralizedAverager with its defaults: a DHT process, an averager process, matchmaking."""
    import hivemind
    import torch

    sent = count_hivemind_bytes(folder)
    here = ["/ip4/127.0.0.1/tcp/0"]
    dht = hivemind.DHT(host_maddrs=here, start=True) if index == 0 else None
    first = share([str(maddr) for maddr in dht.get_visible_maddrs()] if dht else [])[0]
    dht = dht or hivemind.DHT(host_maddrs=here, initial_peers=first, start=True)
    vector = torch.from_numpy(make_vector(index, num_parameters))
    averager = hivemind.DecentralizedAverager(
        [vector.clone()],
        dht,
        prefix="benchmark",
        target_group_size=num_peers,
        compression=getattr(hivemind.compression, codec)(),
        start=True,
    )
    while True:
        with averager.get_tensors() as (tensor,):
            tensor.copy_(vector)
        sent.value = 0
        share("begin")
        watch = Stopwatch()
        step = averager.step(gather=index, timeout=STEP_TIMEOUT_S, wait=False)
        met_s = watch_step(step, hivemind.averaging.control.AveragingStage.RUNNING_ALLREDUCE)
        try:
            group = step.result()
        except hivemind.averaging.partition.AllreduceException:  # it found no group in time: a round to play again
            group = {}
        watch.lap("all-reduce")
        share("end")
        watch.stop()
        matchmaking_s = met_s - watch.begin_s
        watch.phases_s = {"matchmaking": matchmaking_s, "all-reduce": watch.phases_s["all-reduce"] - matchmaking_s}
        watch.phases_cpu_s = {}  # it averages in another process
        with averager.get_tensors() as (tensor,):
            report(watch, tensor.numpy(), sent.value, folder, met_s=met_s, group=len(group))


def watch_step(step: Any, running: Any) -> float:
    """When the (last) all-reduce of a hivemind step began."""
    met_s = time.monotonic()
    stage = None
    while not step.done():
        was, stage = stage, step.stage
        if stage == running != was:
            met_s = time.monotonic()
        time.sleep(0.002)
    return met_s


def count_hivemind_bytes(folder: Path) -> Any:
    """A number that the averager's process, which is forked from this one, adds to. Its sockets go to `folder`."""
    import multiprocessing

    from hivemind.p2p import P2P

    sent = multiprocessing.Value("q", 0)
    send = P2P.send_raw_data

    async def counting_send(data: bytes, writer: Any, **options: Any) -> None:
        with sent.get_lock():
            sent.value += len(data) + P2P.HEADER_LEN
        await send(data, writer, **options)

    P2P.send_raw_data = staticmethod(counting_send)
    P2P._UNIX_SOCKET_PREFIX = f"/unix{folder}/"
    return sent


SYSTEMS: dict[str, Callable[..., Any]] = {
    "sparse": lambda *arguments: asyncio.run(run_sparse(*arguments)),
    "butterfly": lambda *arguments: asyncio.run(run_butterfly(*arguments)),
    "float16": lambda *arguments: run_hivemind("Float16Compression", *arguments),
    "uniform8": lambda *arguments: run_hivemind("Uniform8BitQuantization", *arguments),
}


def main() -> None:
    system, index, num_peers, num_parameters, folder = sys.argv[1:]
    warnings.filterwarnings("ignore")  # hivemind uses what numpy and torch have deprecated
    SYSTEMS[system](int(index), int(num_peers), int(num_parameters), Path(folder))


if __name__ == "__main__":
    main()
