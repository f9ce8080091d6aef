"""Prometheus metrics of a run, made from the status when somebody asks; nothing is counted in between.

Names follow Prometheus's conventions: base units, `_total` for what only grows. No metric has a label for each peer:
volunteers come and go by the thousand, and their names are nobody's business but the page's.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.core.state import Phase


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
        yield _phases(status["phase"])
        yield _counter("rounds_merged", "Rounds that were merged.", status["round"])
        yield _counter("tokens_credited", "Tokens of accepted contributions.", status["tokens"])
        yield _counter("payload_bytes", "Bytes of the payloads that were merged.", self._read_payload_bytes())
        yield _gauge("target_tokens", "Tokens after which the run is finished.", status["tokens_target"])
        yield _gauge("parameters", "Parameters of the model.", status["num_parameters"])
        yield _gauge("train_loss", "Mean training loss of the last round.", status["train_loss"])
        yield _gauge("held_out_loss", "Last loss on held-out text.", status["held_out_loss"])
        yield _gauge("round_duration_seconds", "How long the last round was open.", status["round_seconds"])
        yield _peers(status["peers"])


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"manyhands_{name}", text, value=value)


def _gauge(name: str, text: str, value: float | None) -> Metric:
    """A gauge; without a sample while its value is not known."""
    return GaugeMetricFamily(f"manyhands_{name}", text, value=value)


def _phases(current: str) -> Metric:
    family = GaugeMetricFamily("manyhands_phase", "1 for the phase that the run is in.", labels=["phase"])
    for phase in Phase:
        family.add_metric([phase.value], float(phase.value == current))
    return family


def _peers(peers: list[dict[str, Any]]) -> Metric:
    family = GaugeMetricFamily("manyhands_peers", "Peers that ever joined.", labels=["role", "status"])
    for labels, count in sorted(Counter((peer["role"], peer["status"]) for peer in peers).items()):
        family.add_metric(labels, count)
    return family
