"""Plots waiting times of several runs by class of adapter. Needs matplotlib, which is not installed by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from scheduler.simulate.results.report import Summary, class_of
from scheduler.simulate.results.request_log import RequestLog

STYLES = {"hot": "-", "cold": "--", "base": ":"}


def draw(path: Path, runs: Sequence[tuple[str, Summary, RequestLog, set[str]]]) -> None:
    """Draws the runs, each (label, summary, log, hot adapters), to `path`. Raises ConfigError without matplotlib.

    Left: the share of requests by their time to first token. Right: p99 TTFT, and the longest time being passed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(13, 5), layout="constrained")
    shares, bars = figure.subplots(1, 2)
    for number, (label, _, log, hot) in enumerate(runs):
        for name, style in STYLES.items():
            times = sorted(t.ttft for t in log.timelines.values() if t.served and class_of(t, hot) == name)
            if times:
                heights = [(index + 1) / len(times) for index in range(len(times))]
                shares.plot(times, heights, style, color=f"C{number % 10}", label=f"{label}, {name}")
    shares.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests", ylim=(0, 1.01))
    shares.legend(fontsize="small")
    shares.grid(alpha=0.3)
    _bars(bars, runs)
    figure.savefig(path, dpi=120)


def _bars(bars: object, runs: Sequence[tuple[str, Summary, RequestLog, set[str]]]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(bars, Axes)
    values = {
        "hot, p99 TTFT": [summary["ttft"]["hot"]["p99"] for _, summary, _, _ in runs],
        "cold, p99 TTFT": [summary["ttft"]["cold"]["p99"] for _, summary, _, _ in runs],
        "passed for, longest": [summary["passed"]["all"]["max"] for _, summary, _, _ in runs],
    }
    for index, (label, heights) in enumerate(values.items()):
        bars.bar([number + 0.27 * (index - 1) for number in range(len(runs))], heights, 0.25, label=label)
    bars.set_xticks(range(len(runs)), [label for label, _, _, _ in runs], rotation=20, ha="right")
    bars.set_ylabel("s")
    bars.legend(fontsize="small")
    bars.grid(axis="y", alpha=0.3)
