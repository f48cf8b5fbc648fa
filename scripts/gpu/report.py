"""The tables printed at the end: sums and ratios of the results."""

from __future__ import annotations

from typing import Any

from gpu.columns.registry import Column
from gpu.grid import Point, points

WIDTH = 15


def kernel_table(done: dict[str, Any], columns: list[Column]) -> str:
    """Returns a table: microseconds that adapters add to a layer (four sites), and the best peer over our best."""
    names = [column.name for column in columns if not column.absent]
    head = "tokens lanes rank".ljust(20) + "".join(name.rjust(WIDTH) for name in names)
    lines = ["adapters on one layer, us beyond the base", head + "floor".rjust(9) + "peer/ours".rjust(11)]
    lines += [_line(point, done[point.key], columns) for point in points() if point.key in done]
    lines += [f"left out: {column.name} ({column.absent})" for column in columns if column.absent]
    return "\n".join(lines)


def _line(point: Point, row: dict[str, Any], columns: list[Column]) -> str:
    layer = {column.name: total(row.get(column.name)) for column in columns if not column.absent}
    ours = [layer[c.name] for c in columns if not c.peer and layer.get(c.name) is not None]
    peers = [layer[c.name] for c in columns if c.peer and layer.get(c.name) is not None]
    ratio = f"{min(peers) / min(ours):11.2f}" if ours and peers and min(ours) > 0 else "-".rjust(11)
    cells = "".join((f"{us:.1f}" if us is not None else "-").rjust(WIDTH) for us in layer.values())
    floor = total(row.get("floor"))
    return f"{point.tokens:6}{point.lanes:6}{point.rank:>6}  {cells}{floor if floor is not None else 0:9.1f}{ratio}"


def total(sites: dict[str, Any] | None) -> float | None:
    """Returns the sum over the sites; None if one of them could not be measured."""
    if not sites or not all(isinstance(value, int | float) for value in sites.values()):
        return None
    return float(sum(sites.values()))


def troubles(done: dict[str, Any]) -> list[str]:
    """Returns what could not be measured, one line for each kind of failure."""
    found: dict[str, int] = {}
    for row in done.values():
        for name, sites in row.items():
            for value in sites.values():
                if isinstance(value, str):
                    found[f"{name}: {value}"] = found.get(f"{name}: {value}", 0) + 1
    return [f"{count} x {line}" for line, count in sorted(found.items())]


def step_table(steps: dict[str, Any], bandwidth: float) -> str:
    """Returns a table: milliseconds of a decode step by batch and adapters, relative to the base and the bytes read."""
    lines = ["decode steps of the 8B shape", "batch  adapters   step ms   of base  tokens/s   allowed ms"]
    for row in steps.get("decode", {}).values():
        base = steps["decode"].get(f"b{row['batch']}-l0", row)
        lines.append(
            f"{row['batch']:5}{row['lanes']:10}{row['ms']:10.3f}{base['ms'] / row['ms']:10.3f}"
            f"{row['batch'] / row['ms'] * 1000:10.0f}{allowed_ms(row, base, bandwidth):13.3f}"
        )
    switching = steps.get("switching")
    if switching:
        lines.append(f"another adapter for every request, a pool for a quarter: {switching['of_base']:.3f} of base")
    return "\n".join(lines)


def allowed_ms(row: dict[str, Any], base: dict[str, Any], bandwidth: float) -> float:
    """Returns the target time of a step in milliseconds.

    Without adapters it is 1.2 times the time to read the bytes. With adapters it is the measured time of the base, plus
    1.5 times the time to read the adapters' bytes and 2 us for each of a layer's four sites.
    """
    if not row["lanes"]:
        return 1.2 * float(row["bytes"]) / bandwidth / 1000
    added = 1.5 * (row["bytes"] - base["bytes"]) / bandwidth + 2.0 * row["modules"]
    return float(base["ms"]) + float(added) / 1000
