"""Prometheus metrics of a run, made from the status when somebody asks; nothing is counted in between.

Names follow Prometheus's conventions: base units, `_total` for what only grows. No metric has a label for each peer:
volunteers come and go by the thousand, and their names are nobody's business but the page's.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.core.state import Phase
from coordinator.verdict import Level


def create_registry(read_status: Callable[[], Mapping[str, Any]], read_payload_bytes: Callable[[], int]) -> Any:
    """A registry of its own with this run's metrics and this process's.

    `read_status` gives what Server.status() gives; `read_payload_bytes` the bytes of all merged payloads.
    """
    registry = CollectorRegistry()
    registry.register(_RunCollector(read_status, read_payload_bytes))
    ProcessCollector(registry=registry)
    return registry


class _RunCollector(Collector):
    def __init__(self, read_status: Callable[[], Mapping[str, Any]], read_payload_bytes: Callable[[], int]) -> None:
        self._read_status = read_status
        self._read_payload_bytes = read_payload_bytes

    def collect(self) -> Iterator[Metric]:
        status = self._read_status()
        yield InfoMetricFamily("manyhands_run", "The run.", {"name": status["name"], "run_id": status["run_id"]})
        yield _one_of("phase", "1 for the phase that the run is in.", Phase, status["phase"])
        yield _one_of("verdict", "1 for the verdict on the run.", Level, status["verdict"]["level"], label="level")
        yield _counter("rounds_merged", "Rounds that were merged.", status["round"])
        yield _counter("tokens_credited", "Tokens of accepted contributions.", status["tokens"])
        yield _counter("payload_bytes", "Bytes of the payloads that were merged.", self._read_payload_bytes())
        yield _gauge("target_tokens", "Tokens after which the run is finished.", status["tokens_target"])
        yield _gauge("parameters", "Parameters of the model.", status["num_parameters"])
        yield _gauge("train_loss", "Mean training loss of the last round.", status["train_loss"])
        yield _gauge("held_out_loss", "Last loss on held-out text.", status["held_out_loss"])
        yield _gauge("round_duration_seconds", "How long the last round was open.", status["round_seconds"])
        yield _gauge("last_merge_timestamp_seconds", "When the last round was merged.", status["last_merge_unix_s"])
        yield _gauge("start_timestamp_seconds", "When this coordinator was started.", status["started_unix_s"])
        yield _gauge("disk_free_bytes", "Free space on the run folder's disk.", status["disk_free_bytes"])
        yield _gauge("commit_duration_p99_seconds", "Of the last 1000 transactions.", status["commit_p99_s"])
        yield _gauge("validator_expected", "1 when the coordinator keeps a validator.", status["validator_expected"])
        yield from _peers(status["peers"])


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"manyhands_{name}", text, value=value)


def _gauge(name: str, text: str, value: float | None) -> Metric:
    """A gauge; without a sample while its value is not known."""
    return GaugeMetricFamily(f"manyhands_{name}", text, value=value)


def _one_of(name: str, text: str, values: Iterable[str], current: str, label: str | None = None) -> Metric:
    """A gauge for each of `values`: 1 for the current one, 0 for the others."""
    family = GaugeMetricFamily(f"manyhands_{name}", text, labels=[label or name])
    for value in values:
        family.add_metric([str(value)], float(value == current))
    return family


def _peers(peers: list[dict[str, Any]]) -> Iterator[Metric]:
    family = GaugeMetricFamily("manyhands_peers", "Peers that ever joined.", labels=["role", "status"])
    for labels, count in sorted(Counter((peer["role"], peer["status"]) for peer in peers).items()):
        family.add_metric(labels, count)
    yield family
    connected = GaugeMetricFamily("manyhands_connected_peers", "Peers with an open session.", labels=["role"])
    for role in ("worker", "validator"):
        connected.add_metric([role], sum(peer["connected"] and peer["role"] == role for peer in peers))
    yield connected
    paused = sum(bool(peer["pause_reason"]) for peer in peers)
    yield _gauge("paused_workers", "Connected workers that take no leases for now.", paused)
    banned = sum(peer.get("banned", False) for peer in peers)
    yield _gauge("banned_peers", "Peers that the operator has banned.", banned)
    held = sum(peer.get("waiting_for_approval", False) for peer in peers)
    yield _gauge("unapproved_peers", "Peers that wait for the operator's approval.", held)
    judged = CounterMetricFamily("manyhands_contributions", "Contributions, by what became of them.", labels=["result"])
    for result in ("accepted", "refused"):
        judged.add_metric([result], sum(peer[result] for peer in peers))
    yield judged
