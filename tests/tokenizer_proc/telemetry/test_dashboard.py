"""The Grafana dashboard asks only for series that /metrics shows, with labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from engine.messages import Capacity, Stats
from tokenizer_proc.telemetry.gauges import MetricsSnapshot
from tokenizer_proc.telemetry.metrics import Metrics

DASHBOARD = Path(__file__).parents[3] / "scripts" / "grafana" / "dashboard.json"
SERIES = re.compile(r"\b(?:(?:vllm|chorus):\w+|process_\w+)")


def shown() -> dict[str, set[str]]:
    """Returns the labels of every series of a server that has served, by the series' name."""
    capacity = Capacity(
        kv_pages=8, page_size=16, rows=2, max_length=64, max_batched_tokens=8, vocab_size=10, rank_pages={"qkv": 4}
    )
    snapshot = MetricsSnapshot(stats=Stats(), capacity=capacity, max_loras=2, tiers={"sql": "host"}, running={"sql": 1})
    metrics = Metrics("base", lambda: snapshot)
    metrics.began(["sql"], 3)
    metrics.generated(["sql"], 1)
    metrics.finished("stop", 1.0)
    metrics.failed("invalid_request_error")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_series_of_the_dashboard_exists() -> None:
    found = {name for query in queries() for name in SERIES.findall(query)}
    assert len(found) > 30
    assert found - set(shown()) == set()


def test_every_label_of_the_dashboard_exists() -> None:
    labels = shown()
    for query in queries():
        names = SERIES.findall(query)
        used = {name for group in re.findall(r"by\(([\w, ]+)\)", query) for name in re.split(r",\s*", group)}
        used |= {name for inside in re.findall(r"\{([^}]*)\}", query) for name in re.findall(r"(\w+)=", inside)}
        assert all(used <= labels[name] for name in names), query


def test_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(cells)) == len(panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
