"""The table of metrics, from the series that /metrics shows."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from engine.messages import Capacity
from tables.markdown import table
from tokenizer_proc.telemetry.gauges import MetricsSnapshot
from tokenizer_proc.telemetry.metrics import Metrics

CAPACITY = Capacity(kv_pages=1, page_size=16, rows=1, max_length=1, max_batched_tokens=1, vocab_size=1)


def metrics() -> str:
    """Returns a table with one row for each series."""
    picture = MetricsSnapshot(capacity=CAPACITY, max_loras=1)
    text = Metrics("base", lambda: picture).render().decode()
    families = [family for family in text_string_to_metric_families(text) if not family.name.endswith("_created")]
    rows = [(f"`{family.name}`", family.type, re.sub(r"\.$", "", family.documentation)) for family in families]
    return table(("metric", "type", "what it counts"), sorted(rows, key=lambda row: row[0].strip("`")))
