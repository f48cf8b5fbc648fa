"""Prometheus metrics of one engine, in a separate registry. A metric that vLLM has too has vLLM's name.

Gauges are collected from a new snapshot at each scrape, so the series of an adapter ends once the adapter is gone.
Counters and histograms are updated by the caller, with times and counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import Capacity, Stats, WaitReason

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class MetricsSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state that the gauges show. Adapters are given by name; `max_loras` is None if LoRA is off.

    `tiers` holds each adapter's state. `wanted` are adapters that requests wait for while they are being loaded, and
    that the scheduler does not know yet.
    """

    stats: Stats = Stats()
    capacity: Capacity | None = None
    max_loras: int | None = None
    running: dict[str, int] = {}
    waiting: dict[str, int] = {}
    wanted: list[str] = []
    tiers: dict[str, str] = {}


class _Live(Collector):
    """The gauges, and the counters that the scheduler keeps, collected from a snapshot that each scrape takes."""

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
    gauge.add_metric([str(max_loras), ",".join(sorted(ready)), ",".join(sorted(waiting))], time.time())
    return gauge


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


class Metrics:
    """All metrics of one server. Each scrape calls `snapshot`."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model: str, snapshot: Callable[[], MetricsSnapshot] = MetricsSnapshot) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Live(model, snapshot))
        self._model = model
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.")
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "Between tokens of one stream.")
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.")
        self._step = self._histogram("chorus:step_seconds", "One forward of the whole batch.")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens taken in.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._finished = self._counter("vllm:request_success", "Finished choices.", "finished_reason")
        self._failed = self._counter("chorus:request_failures", "Requests refused or failed.", "kind")
        self._load_failures = self._counter("chorus:adapter_load_failures", "Loads of adapters that failed.")
        self._adapter_seconds = {
            what: self._histogram(f"chorus:adapter_{what}_seconds", text)
            for what, text in (
                ("load", "From disk to host memory."),
                ("fill", "From host memory to rank pages."),
                ("unload", "From the removal of the name to free memory."),
            )
        }
        self._adapters = [
            Counter(f"chorus:adapter_{what}", text, ["adapter"], registry=self._registry)
            for what, text in (
                ("requests", "Requests begun, by adapter."),
                ("prompt_tokens", "Prompt tokens, by adapter."),
                ("generation_tokens", "Tokens generated, by adapter."),
            )
        ]

    def _histogram(self, name: str, text: str) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], buckets=_SECONDS, registry=self._registry)
        histogram.labels(self._model)  # creates the series, so that the first scrape shows it already
        return histogram

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, ["model_name", *labels], registry=self._registry)
        if not labels:
            counter.labels(self._model)
        return counter

    def began(self, adapters: Sequence[str], prompt_tokens: int) -> None:
        """Counts a request that was sent to the scheduler. `prompt_tokens` includes the prompt once for each choice."""
        self._prompt_tokens.labels(self._model).inc(prompt_tokens)
        for adapter in adapters:
            self._adapters[0].labels(adapter).inc()
            self._adapters[1].labels(adapter).inc(prompt_tokens)

    def generated(self, adapters: Sequence[str], tokens: int) -> None:
        """Counts `tokens` generated tokens, in total and for each of `adapters`."""
        self._generated.labels(self._model).inc(tokens)
        for adapter in adapters:
            self._adapters[2].labels(adapter).inc(tokens)

    def first_token(self, seconds: float) -> None:
        """Records the seconds from a request's arrival to the first token of a choice."""
        self._ttft.labels(self._model).observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Records the seconds between two tokens of a choice."""
        self._itl.labels(self._model).observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """Counts a choice that finished for `reason`, and records the seconds since its request's arrival."""
        self._finished.labels(self._model, reason).inc()
        self._e2e.labels(self._model).observe(seconds)

    def failed(self, kind: str) -> None:
        """Counts a request that ended with an error of this kind."""
        self._failed.labels(self._model, kind).inc()

    def load_failed(self) -> None:
        """Counts a failed load of an adapter."""
        self._load_failures.labels(self._model).inc()

    def adapter_seconds(self, what: Literal["load", "fill", "unload"], seconds: float) -> None:
        """Records the duration of an adapter's load, fill or unload."""
        self._adapter_seconds[what].labels(self._model).observe(seconds)

    def steps(self, seconds: Iterable[float]) -> None:
        """Records the durations of steps."""
        for each in seconds:
            self._step.labels(self._model).observe(each)

    def forget_adapter(self, adapter: str) -> None:
        """Removes an adapter's series."""
        for counter in self._adapters:
            counter.remove(adapter)

    def render(self) -> bytes:
        """Returns the metrics in Prometheus' text format; their content type is `content_type`."""
        return generate_latest(self._registry)
