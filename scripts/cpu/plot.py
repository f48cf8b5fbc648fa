"""A plot of the results: a panel for each concurrency, bars by load and server, and marks for what the bytes allow."""

from __future__ import annotations

import statistics
from pathlib import Path

from cpu.results import OURS, Results


def draw(path: Path, results: Results, titles: dict[str, str], shape: str) -> str | None:
    """Writes a PNG. Returns the reason if it could not be drawn, else None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "--plot needs matplotlib: pip install matplotlib"
    entries = [entry for entry in results.entries if entry.shape == shape]
    if not entries:
        return f"--plot: nothing was measured of {shape}"
    concurrencies, loads = sorted({entry.concurrency for entry in entries}), {entry.load for entry in entries}
    titles = {load: title for load, title in titles.items() if load in loads}
    figure = Figure(figsize=(4.6 * len(concurrencies), 4.4), layout="constrained")
    panels = figure.subplots(1, len(concurrencies), squeeze=False)[0]
    for panel, concurrency in zip(panels, concurrencies, strict=True):
        _bars(panel, results, titles, shape, concurrency)
        panel.set_title(f"concurrency {concurrency}")
    panels[0].set_ylabel("output tokens/s")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=120)
    return None


def _bars(panel: object, results: Results, titles: dict[str, str], shape: str, concurrency: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(panel, Axes)
    servers = results.servers()
    width = 0.8 / len(servers)
    for index, server in enumerate(servers):
        heights = [results.rate(shape, server, load, concurrency) or 0.0 for load in titles]
        places = [number + width * (index - (len(servers) - 1) / 2) for number in range(len(titles))]
        panel.bar(places, heights, 0.92 * width, label=server, color=f"C{index}")
        if server == OURS:
            _floors(panel, results, titles, places, (shape, concurrency))
    panel.set_xticks(range(len(titles)), list(titles.values()), rotation=25, ha="right", fontsize="small")
    panel.grid(axis="y", alpha=0.3)


def _floors(panel: object, results: Results, titles: dict[str, str], places: list[float], at: tuple[str, int]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(panel, Axes)
    base = results.rate(at[0], OURS, "base", at[1])
    marks = [(place, results.of(at[0], OURS, load, at[1])) for place, load in zip(places, titles, strict=True)]
    marks = [(place, entries) for place, entries in marks if entries]
    if base and marks:
        heights = [base * statistics.median(entry.floor for entry in entries) for _, entries in marks]
        panel.plot([place for place, _ in marks], heights, "k_", markersize=12, label="bytes allow")
