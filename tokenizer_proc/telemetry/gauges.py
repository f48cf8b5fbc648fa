"""The gauges of /metrics, and the counters that the scheduler keeps, made of a snapshot at each scrape."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import Capacity, Stats, WaitReason

RANK_PAGE = 16  # the units of LoRA rank that a rank page has


class MetricsSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state that the gauges show. Adapters are given by name; `max_loras` is None if LoRA is off.

    `tiers` holds each adapter's state, `footprints` the rank pages by group of those that were loaded. `wanted` are
    adapters that requests wait for while they are being loaded, and that the scheduler does not know yet.
    """

    stats: Stats = Stats()
    capacity: Capacity | None = None
    max_loras: int | None = None
    running: dict[str, int] = {}
    waiting: dict[str, int] = {}
    wanted: list[str] = []
    tiers: dict[str, str] = {}
    footprints: list[dict[str, int]] = []


class Gauges(Collector):
    """Collects what a snapshot shows; each scrape takes a new one."""

    def __init__(self, model: str, snapshot: Callable[[], MetricsSnapshot]) -> None:
        self._model = model
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot()
        stats = snapshot.stats
        used = stats.kv_pages_used / stats.kv_pages if stats.kv_pages else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests that hold a row.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for a row.", stats.waiting)
        yield _waiting_for(stats.waiting_reasons)
        yield self._gauge("vllm:kv_cache_usage_perc", "KV pages in use, from 0 to 1.", used)
        yield self._gauge("vllm:gpu_cache_usage_perc", "The same under vLLM's former name.", used)
        yield self._sum("vllm:num_preemptions", "Rows preempted, to be recomputed later.", stats.preemptions)
        yield self._sum("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix tree.", stats.prompt_tokens)
        yield self._sum("vllm:prefix_cache_hits", "Prompt tokens found there, not computed.", stats.cached_tokens)
        yield self._gauge("chorus:kv_pages_cached", "KV pages in the prefix tree.", stats.kv_pages_cached)
        yield self._sum("chorus:kv_evictions", "KV pages evicted from the prefix tree.", stats.kv_evictions)
        if snapshot.capacity is not None:
            yield _cache_config(snapshot.capacity)
        if snapshot.max_loras is not None:
            yield _lora_info(snapshot, snapshot.max_loras)
            yield _by_adapter("chorus:adapter_requests_running", "Rows by adapter.", snapshot.running)
            yield _by_adapter("chorus:adapter_requests_waiting", "Waiting requests by adapter.", snapshot.waiting)
            yield from _lora_memory(snapshot)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._model], value)
        return gauge

    def _sum(self, name: str, text: str, value: float) -> Metric:
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([self._model], value)
        return counter


def _waiting_for(reasons: Mapping[WaitReason, int]) -> Metric:
    gauge = GaugeMetricFamily("chorus:requests_waiting_for", "Waiting requests by what they lack.", labels=["reason"])
    for reason in get_args(WaitReason):
        gauge.add_metric([reason], reasons.get(reason, 0))
    return gauge


def _cache_config(capacity: Capacity) -> Metric:
    gauge = GaugeMetricFamily("vllm:cache_config_info", "KV pages.", labels=["block_size", "num_gpu_blocks"])
    gauge.add_metric([str(capacity.page_size), str(capacity.kv_pages)], 1)
    return gauge


def _lora_info(snapshot: MetricsSnapshot, max_loras: int) -> Metric:
    """Returns the series by which inference gateways route: the resident adapters, and those that requests wait for."""
    gauge = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters that are ready, and adapters that requests wait for; the value is the time of the scrape.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    ready = {adapter for adapter, tier in snapshot.tiers.items() if tier == "resident"}
    waiting = {*snapshot.waiting, *snapshot.wanted} - ready
    most = most_resident(snapshot.capacity, max_loras, len(ready), snapshot.footprints)
    gauge.add_metric([str(most), ",".join(sorted(ready)), ",".join(sorted(waiting))], time.time())
    return gauge


def most_resident(
    capacity: Capacity | None, max_loras: int, resident: int, footprints: Sequence[Mapping[str, int]]
) -> int:
    """Returns how many adapters can be resident: as many as fit the rank pages, with the mean footprint of the known.

    While no adapter is known, each is taken to have the largest rank in every group. At least `max_loras` and the
    number of `resident` ones.
    """
    pages = {} if capacity is None else capacity.rank_pages
    if footprints:
        needs = {group: sum(one.get(group, 0) for one in footprints) / len(footprints) for group in pages}
    else:
        largest = 0 if capacity is None else capacity.max_lora_rank
        needs = dict.fromkeys(pages, float(math.ceil(largest / RANK_PAGE)))
    fits = [int(pages[group] / need) for group, need in needs.items() if need > 0]
    return max(max_loras, resident, min(fits, default=0))


def _lora_memory(snapshot: MetricsSnapshot) -> Iterable[Metric]:
    """Returns the adapters' tiers, the use of the pool and of host memory, and counts of loads, fills and evictions."""
    stats, capacity = snapshot.stats, snapshot.capacity
    tiers = GaugeMetricFamily("chorus:adapter_tier", "1: where the adapter is now.", labels=["adapter", "tier"])
    for adapter, tier in sorted(snapshot.tiers.items()):
        tiers.add_metric([adapter, tier], 1)
    yield tiers
    used = GaugeMetricFamily("chorus:lora_pool_pages_used", "Rank pages in use.", labels=["group"])
    size = GaugeMetricFamily("chorus:lora_pool_pages", "Rank pages there are.", labels=["group"])
    for group, pages in sorted(capacity.rank_pages.items() if capacity is not None else ()):
        used.add_metric([group], stats.rank_pages_used.get(group, 0))
        size.add_metric([group], pages)
    yield from (used, size)
    yield GaugeMetricFamily("chorus:lora_host_adapters", "Adapters in host memory.", stats.host_adapters)
    yield GaugeMetricFamily("chorus:lora_host_bytes", "Bytes of adapters in host memory.", stats.host_bytes)
    yield CounterMetricFamily("chorus:lora_hits", "Admissions that found their adapter resident.", stats.adapter_hits)
    yield CounterMetricFamily("chorus:lora_fills", "Misses: copies into rank pages.", stats.adapter_fills)
    yield CounterMetricFamily("chorus:lora_loads", "Reads from disk into host memory.", stats.adapter_loads)
    evictions = CounterMetricFamily("chorus:lora_evictions", "Adapters evicted, by tier.", labels=["tier"])
    evictions.add_metric(["resident"], stats.adapter_evictions)
    evictions.add_metric(["host"], stats.host_evictions)
    yield evictions
    yield CounterMetricFamily(
        "chorus:lane_preemptions",
        "Rows preempted because their lane was given to another adapter.",
        stats.lane_preemptions,
    )


def _by_adapter(name: str, text: str, values: dict[str, int]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=["adapter"])
    for adapter, value in sorted(values.items()):
        gauge.add_metric([adapter], value)
    return gauge
