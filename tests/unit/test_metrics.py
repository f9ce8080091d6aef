"""The metrics follow Prometheus's conventions, and what is made for them names no other."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # its types come apart from it
from prometheus_client import Metric, generate_latest
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from coordinator.metrics import create_registry
from coordinator.verdict import Level

DOCS = Path(__file__).parents[2] / "docs"
PEER = {"status": "ready", "connected": True, "pause_reason": "", "accepted": 5, "refused": 1}
STATUS: dict[str, Any] = {
    "name": "tiny",
    "run_id": "00",
    "phase": "train",
    "verdict": {"level": "degraded"},
    "round": 3,
    "tokens": 300,
    "tokens_target": 1200,
    "num_parameters": 10,
    "train_loss": 5.0,
    "held_out_loss": 5.5,
    "round_seconds": 1.0,
    "last_merge_unix_s": 1e9,
    "started_unix_s": 1e9,
    "disk_free_bytes": 1 << 40,
    "commit_p99_s": 0.01,
    "validator_expected": True,
    "peers": [
        PEER | {"role": "worker"},
        PEER | {"role": "worker", "pause_reason": "on_battery", "banned": True},
        PEER | {"role": "validator", "connected": False, "status": "gone"},
    ],
}
NAME = re.compile(r"\b(?:manyhands|process)_\w+")
BASE_UNITS = ("_seconds", "_bytes", "_total", "_info")
OTHER_UNITS = ("_ms", "_milliseconds", "_minutes", "_hours", "_kb", "_mb", "_bits", "_percent")


def scrape() -> dict[str, Metric]:
    """The families by the name that their samples carry."""
    text = generate_latest(create_registry(lambda: STATUS, lambda: 7)).decode()
    return {family.samples[0].name: family for family in text_string_to_metric_families(text)}


def test_names_follow_the_conventions_when_scraped() -> None:
    families = scrape()
    for name, family in families.items():
        assert re.fullmatch(r"(manyhands|process)_[a-z0-9_]+", name)
        assert not name.endswith(OTHER_UNITS)
        assert (family.type == "counter") == name.endswith("_total")
        assert family.documentation
        assert "peer" not in {label for sample in family.samples for label in sample.labels}
    timed = [name for name in families if re.search(r"duration|timestamp|bytes", name)]
    assert all(name.endswith(BASE_UNITS) for name in timed)


def test_openmetrics_says_the_same_when_scraped() -> None:
    """Its parser is the stricter one: a family twice, a counter without _total, or no end would raise."""
    text = exposition.generate_latest(create_registry(lambda: STATUS, lambda: 7)).decode()
    families = list(openmetrics_parser.text_string_to_metric_families(text))
    found = {sample.name for family in families for sample in family.samples}
    assert found == {sample.name for family in scrape().values() for sample in family.samples}


def test_nothing_is_left_to_complain_of_for_promtool() -> None:
    """What `promtool check metrics` looks for, beside what the conventions above say."""
    for name, family in scrape().items():
        assert family.documentation.strip()
        assert not re.search(r"_(gauge|counter|summary|histogram|count|sum|bucket)(_|$)", name)
        assert not re.search(r"[A-Z]|__|:", name)
        assert family.type != "untyped"
        assert all(label == label.lower() for sample in family.samples for label in sample.labels)


def test_values_are_those_of_the_status_when_scraped() -> None:
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in scrape().values()
        for sample in family.samples
    }
    assert [samples["manyhands_verdict", level] for level in Level] == [0.0, 1.0, 0.0]
    assert samples["manyhands_connected_peers", "worker"] == 2.0
    assert samples["manyhands_connected_peers", "validator"] == 0.0
    assert samples["manyhands_paused_workers",] == samples["manyhands_banned_peers",] == 1.0
    assert samples["manyhands_unapproved_peers",] == 0.0
    assert samples["manyhands_contributions_total", "accepted"] == 15.0
    assert samples["manyhands_contributions_total", "refused"] == 3.0


def test_documentation_lists_every_metric_when_compared_with_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    # In the text format an info is a gauge.
    types = {name: "gauge" if type_ == "info" else type_ for name, type_, _ in rows}
    assert types == {name: family.type for name, family in scrape().items()}


def read_alert_expressions() -> Iterator[str]:
    rules = yaml.safe_load((DOCS / "prometheus-alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        yield rule["expr"]


def read_panel_expressions() -> Iterator[str]:
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        yield from (target["expr"] for target in panel["targets"])


@pytest.mark.parametrize("read", [read_alert_expressions, read_panel_expressions])
def test_expressions_name_only_metrics_and_labels_that_exist(read: Any) -> None:
    families = scrape()
    expressions = list(read())
    assert len(expressions) >= 5
    for expression in expressions:
        assert set(NAME.findall(expression)) <= set(families)
        for name, selector in re.findall(r"(manyhands_\w+)\{([^}]*)\}", expression):
            for label, value in re.findall(r'(\w+)="([^"$]+)"', selector):
                assert value in {sample.labels.get(label) for sample in families[name].samples}, expression
