"""Prometheus metrics of one engine, in a separate registry. A metric that vLLM has too has vLLM's name.

Gauges are collected from a new snapshot at each scrape, so the series of an adapter ends once the adapter is gone.
Counters and histograms are updated by the caller, with times and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from tokenizer_proc.telemetry.gauges import Gauges, MetricsSnapshot
from tokenizer_proc.telemetry.without_adapters import WithoutAdapters

_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """All metrics of one server. Each scrape calls `snapshot`."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model: str, snapshot: Callable[[], MetricsSnapshot] = MetricsSnapshot) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Gauges(model, snapshot))
        ProcessCollector(registry=self._registry)
        self._model = model
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.")
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "Between tokens of one stream.")
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.")
        self._tpot = self._histogram("vllm:time_per_output_token_seconds", "The same under vLLM's former name.")
        self._per_token = self._histogram("vllm:request_time_per_output_token_seconds", "Decode time by output token.")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "In the queue, until a choice got a row.")
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "From the row to the first token.")
        self._decode = self._histogram("vllm:request_decode_time_seconds", "From the first token to the last.")
        self._inference = self._histogram("vllm:request_inference_time_seconds", "From the row to the last token.")
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output = self._histogram("vllm:request_generation_tokens", "Tokens that a choice generated.", _TOKENS)
        self._longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest choice of a request.", _TOKENS
        )
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

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
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

    def first_token(self, seconds: float, queued: float, prefill: float) -> None:
        """Records the seconds from a request's arrival to the first token of a choice.

        Those that the choice was in the scheduler's queue, and those from then to the token, are recorded too.
        """
        self._ttft.labels(self._model).observe(seconds)
        self._queue.labels(self._model).observe(queued)
        self._prefill.labels(self._model).observe(prefill)

    def next_token(self, seconds: float) -> None:
        """Records the seconds between two tokens of a choice."""
        self._itl.labels(self._model).observe(seconds)
        self._tpot.labels(self._model).observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """Counts a choice that finished for `reason`, and records the seconds since its request's arrival."""
        self._finished.labels(self._model, reason).inc()
        self._e2e.labels(self._model).observe(seconds)

    def choice_ended(self, tokens: int, prefill: float, decode: float) -> None:
        """Records a finished choice's tokens, and the seconds from its first token to its last."""
        self._output.labels(self._model).observe(tokens)
        self._decode.labels(self._model).observe(decode)
        self._inference.labels(self._model).observe(prefill + decode)
        if tokens > 1:
            self._per_token.labels(self._model).observe(decode / (tokens - 1))

    def request_ended(self, prompt_tokens: int, longest: int) -> None:
        """Records a request, all of whose choices have finished: its prompt tokens, and those of the longest choice."""
        self._prompt.labels(self._model).observe(prompt_tokens)
        self._longest.labels(self._model).observe(longest)

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

    def render(self, with_adapters: bool = True) -> bytes:
        """Returns the metrics in Prometheus' text format; their content type is `content_type`.

        Without `with_adapters` no adapter is named: see `WithoutAdapters`.
        """
        return generate_latest(self._registry if with_adapters else WithoutAdapters(self._registry))
