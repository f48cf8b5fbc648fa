"""Results: percentiles, throughput, errors by kind, results by adapter, and ratios of two servers. Sends nothing.

TTFT  due time to first tokens               ITL   time between two chunks with tokens
E2E   due time to last tokens                TPOT  (E2E - TTFT) / (tokens - 1), per request
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.client import Sample
from bench.loops import Run

QUANTILES = (50, 90, 99)
BASE = "(base)"


def percentile(values: Sequence[float], q: float) -> float:
    """Returns the q-th percentile with linear interpolation between the two nearest values; nan without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Summary:
    """Pooled results of one server's runs. Times in milliseconds, rates per second; failed requests have no times."""

    requests: int
    answered: int
    short: int
    errors: dict[str, int]
    seconds: float
    input_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    times_ms: dict[str, dict[str, float]]


def summarise(runs: Sequence[Run]) -> Summary:
    """Pools the runs of one server. Rates are over the sum of durations; `short` counts outputs with too few tokens."""
    samples = [sample for run in runs for sample in run.samples]
    good = [sample for sample in samples if sample.error is None]
    seconds = sum(run.seconds for run in runs)
    tokens = sum(sample.tokens for sample in good)
    return Summary(
        requests=len(samples),
        answered=len(good),
        short=sum(sample.tokens < sample.wanted for sample in good),
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None).most_common()),
        seconds=seconds,
        input_tokens=sum(sample.input_tokens for sample in good),
        output_tokens=tokens,
        requests_per_s=len(good) / seconds if seconds else math.nan,
        output_tokens_per_s=tokens / seconds if seconds else math.nan,
        times_ms={name: _spread(values) for name, values in _times(good).items()},
    )


def _times(samples: Sequence[Sample]) -> dict[str, list[float]]:
    return {
        "TTFT": [sample.pieces[0] for sample in samples],
        "ITL": [b - a for sample in samples for a, b in zip(sample.pieces, sample.pieces[1:], strict=False)],
        "TPOT": [(s.latency - s.pieces[0]) / (s.tokens - 1) for s in samples if s.tokens > 1],
        "E2E": [sample.latency for sample in samples],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = {"mean": statistics.fmean(values) * 1000 if values else math.nan}
    return spread | {f"p{q}": percentile(values, q) * 1000 for q in QUANTILES}


def by_adapter(runs: Sequence[Run]) -> dict[str, Summary]:
    """Returns a summary for each adapter, most requests first. An adapter's rates are its share of the total."""
    split: dict[str, list[Run]] = {}
    for name, _ in Counter(sample.adapter or BASE for run in runs for sample in run.samples).most_common():
        split[name] = [Run([s for s in run.samples if (s.adapter or BASE) == name], run.seconds) for run in runs]
    return {name: summarise(part) for name, part in split.items()}


def table(summary: Summary) -> str:
    """Returns a summary as text."""
    lines = [
        f"requests {summary.requests}   answered {summary.answered}   seconds {summary.seconds:.2f}",
        f"requests/s {summary.requests_per_s:.2f}   output tokens/s {summary.output_tokens_per_s:.1f}"
        f"   tokens in {summary.input_tokens}, out {summary.output_tokens}",
        "ms".ljust(6) + "".join(name.rjust(11) for name in ("mean", *(f"p{q}" for q in QUANTILES))),
    ]
    for name, spread in summary.times_ms.items():
        lines.append(name.ljust(6) + "".join(f"{value:11.2f}" for value in spread.values()))
    if summary.short:
        lines.append(f"short: {summary.short} answers have fewer tokens than asked (does the server know ignore_eos?)")
    lines += [f"error: {kind} x {count}" for kind, count in summary.errors.items()]
    return "\n".join(lines)


def adapter_table(summaries: dict[str, Summary]) -> str:
    """Returns a table with one line for each adapter."""
    head = "adapter".ljust(24) + "".join(
        h.rjust(11) for h in ("requests", "errors", "tokens/s", "TTFT p50", "TPOT p50")
    )
    lines = [head]
    for name, summary in summaries.items():
        failed = summary.requests - summary.answered
        ttft, tpot = summary.times_ms["TTFT"]["p50"], summary.times_ms["TPOT"]["p50"]
        rate = summary.output_tokens_per_s
        lines.append(f"{name:24}{summary.requests:11}{failed:11}{rate:11.1f}{ttft:11.2f}{tpot:11.2f}")
    return "\n".join(lines)


def ratios(first: Sequence[Run], second: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Returns second / first by round (both ran the same workload): the median, lowest and highest of the rounds."""
    rounds: dict[str, list[float]] = {}
    for a, b in zip(first, second, strict=True):
        one, two = _measures(summarise([a])), _measures(summarise([b]))
        for name, value in one.items():
            rounds.setdefault(name, []).append(two[name] / value if value else math.nan)
    return {n: {"median": statistics.median(v), "lowest": min(v), "highest": max(v)} for n, v in rounds.items()}


def _measures(summary: Summary) -> dict[str, float]:
    measures = {"output tokens/s": summary.output_tokens_per_s, "requests/s": summary.requests_per_s}
    return measures | {f"{name} p{q}": spread[f"p{q}"] for name, spread in summary.times_ms.items() for q in QUANTILES}


def ratio_table(measured: dict[str, dict[str, float]]) -> str:
    """Returns the ratios as text."""
    lines = ["second / first".ljust(18) + "".join(head.rjust(10) for head in ("median", "lowest", "highest"))]
    for name, row in measured.items():
        lines.append(name.ljust(18) + "".join(f"{value:10.3f}" for value in row.values()))
    return "\n".join(lines)


def plain(summary: Summary) -> dict[str, object]:
    """Returns a summary as JSON values; a time that was not measured is None."""
    data = asdict(summary)
    times = {name: {k: None if math.isnan(v) else v for k, v in row.items()} for name, row in summary.times_ms.items()}
    return {**data, "times_ms": times}
