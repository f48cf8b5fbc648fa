"""Percentiles, fairness and a table from the request log. Does not depend on schedulers or machines.

hot     requests for the busiest adapters; cold: for all other adapters; base: without an adapter
passed  how long a request waited after a later one was admitted: the cost of sharing lanes
speed   an adapter's or tenant's generated tokens per second, over the time that its requests were open. Jain's index of
        the speeds is 1 when all are equal, and 1/n when one of n gets all (Jain, Chiu, Hawe 1984)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from engine.messages import Stats
from scheduler.simulate.results.request_log import GapHistogram, RequestLog, RequestTimeline, passed

CLASSES = ("all", "hot", "cold", "base")
PERCENTILES = (50, 90, 99)
Summary = dict[str, Any]


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile by the nearest-rank method; 0 without values. `values` need not be sorted."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100).__int__() - 1)]


def jain(values: Iterable[float]) -> float:
    """Returns Jain's fairness index of the values; 1 without values."""
    found = list(values)
    squares = sum(value * value for value in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0


def class_of(timeline: RequestTimeline, hot: set[str]) -> str:
    """Returns the class of a request: "hot", "cold" or "base"."""
    adapter = timeline.request.adapter
    return "base" if adapter is None else "hot" if adapter in hot else "cold"


def summarise(log: RequestLog, hot: set[str], stats: Sequence[Stats], seconds: float) -> Summary:
    """Returns all numbers of one run; times are in seconds. `stats` has one entry per replica."""
    served = [timeline for timeline in log.timelines.values() if timeline.served]
    by_class: dict[str, list[RequestTimeline]] = {name: [] for name in CLASSES}
    for timeline in served:
        by_class["all"].append(timeline)
        by_class[class_of(timeline, hot)].append(timeline)
    seconds_passed = passed(served)
    tokens, prompts = sum(t.tokens for t in served), sum(t.request.prompt for t in served)
    span = max(seconds, 1e-9)
    return {
        "requests": len(log.timelines),
        "failed": sum(timeline.error is not None for timeline in log.timelines.values()),
        "seconds": seconds,
        "requests_per_s": len(served) / span,
        "tokens_per_s": tokens / span,
        "ttft": {name: _spread([t.ttft for t in group]) for name, group in by_class.items()},
        "e2e": {name: _spread([t.e2e for t in group]) for name, group in by_class.items()},
        "itl": _gaps(log.gaps),
        "passed": {name: _spread([seconds_passed[t.number] for t in group]) for name, group in by_class.items()},
        "fairness": {
            "adapters": jain(_speeds(served, lambda timeline: timeline.request.adapter)),
            "tenants": jain(_speeds(served, lambda timeline: timeline.request.tenant or None)),
        },
        "prefix_hits": sum(t.cached for t in served) / max(1, prompts),
        **{name: sum(getattr(each, name) for each in stats) for name in SUMS},
    }


SUMS = ("adapter_loads", "adapter_fills", "adapter_evictions", "host_evictions", "preemptions", "steps")


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {**spread, "max": max(values, default=0.0), "count": len(values)}


def _gaps(gaps: GapHistogram) -> dict[str, float]:
    return {**{f"p{percent}": gaps.percentile(percent) for percent in PERCENTILES}, "max": gaps.longest}


def _speeds(timelines: Iterable[RequestTimeline], key: Callable[[RequestTimeline], str | None]) -> list[float]:
    sums: dict[str, tuple[int, float]] = {}
    for timeline in timelines:
        if (name := key(timeline)) is not None:
            tokens, seconds = sums.get(name, (0, 0.0))
            sums[name] = tokens + timeline.tokens, seconds + timeline.e2e
    return [tokens / max(seconds, 1e-9) for tokens, seconds in sums.values()]


# ---------------------------------------------------------------------------------------------------------- the table


def table(columns: Sequence[tuple[str, Summary]]) -> str:
    """Returns a text table with one column per configuration and one line per number."""
    lines = [["", *(name for name, _ in columns)]]
    for label, show in _LINES:
        cells = [show(summary) for _, summary in columns]
        if any(cell is not None for cell in cells):
            lines.append([label, *("-" if cell is None else cell for cell in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _times(kind: str, name: str, *which: str) -> Callable[[Summary], str | None]:
    def show(summary: Summary) -> str | None:
        found = summary[kind] if kind == "itl" else summary[kind][name]
        if not found.get("count", 1):
            return None
        return " / ".join(f"{found[each]:.3g}" for each in which)

    return show


def _number(key: str, form: str = ".4g") -> Callable[[Summary], str | None]:
    return lambda summary: format(summary[key], form) if summary.get(key) is not None else None


def _fairness(key: str) -> Callable[[Summary], str | None]:
    return lambda summary: f"{summary['fairness'][key]:.3f}"


_LINES: list[tuple[str, Callable[[Summary], str | None]]] = [
    ("capacity, requests/s", _number("capacity")),
    ("requests/s", _number("requests_per_s")),
    ("tokens/s", _number("tokens_per_s")),
    ("failed", lambda summary: str(summary["failed"]) if summary["failed"] else None),
    ("TTFT all, p50 / p99 s", _times("ttft", "all", "p50", "p99")),
    ("TTFT hot, p50 / p99 s", _times("ttft", "hot", "p50", "p99")),
    ("TTFT cold, p50 / p99 s", _times("ttft", "cold", "p50", "p99")),
    ("TTFT base, p50 / p99 s", _times("ttft", "base", "p50", "p99")),
    ("TTFT longest, s", _times("ttft", "all", "max")),
    ("ITL p50 / p99 / longest s", _times("itl", "", "p50", "p99", "max")),
    ("e2e p50 / p99 s", _times("e2e", "all", "p50", "p99")),
    ("passed, hot, p99 / longest s", _times("passed", "hot", "p99", "max")),
    ("passed, cold, p99 / longest s", _times("passed", "cold", "p99", "max")),
    ("fairness of adapters", _fairness("adapters")),
    ("fairness of tenants", _fairness("tenants")),
    ("prefix hits", lambda summary: f"{summary['prefix_hits']:.1%}" if summary["prefix_hits"] else None),
    ("loads from disk", _number("adapter_loads", "d")),
    ("fills", _number("adapter_fills", "d")),
    ("evictions", _number("adapter_evictions", "d")),
    ("preemptions", _number("preemptions", "d")),
    ("busy", lambda summary: f"{summary['busy']:.0%}"),
    ("rows, lanes in a step", lambda summary: f"{summary['rows']:.0f}, {summary['lanes']:.0f}"),
]
