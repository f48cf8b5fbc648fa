"""A view of a metrics registry in which no adapter is named."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

BY_ADAPTER = "adapter"
"""The label of series that exist once for each adapter. These series are left out."""

LISTS = ("running_lora_adapters", "waiting_lora_adapters")
"""The labels that list adapters. They are shown as empty."""


class WithoutAdapters(CollectorRegistry):
    """Collects what `registry` collects, without the names of adapters."""

    def __init__(self, registry: Collector) -> None:
        super().__init__()
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """Yields every metric, some of them without samples."""
        for metric in self._registry.collect():
            shown = copy.copy(metric)
            shown.samples = [
                sample._replace(labels={name: "" if name in LISTS else text for name, text in sample.labels.items()})
                for sample in metric.samples
                if BY_ADAPTER not in sample.labels
            ]
            yield shown
