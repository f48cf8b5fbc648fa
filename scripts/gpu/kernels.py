"""The kernel benchmark: every point of the grid at every site, our backends and the peers' kernels in turn.

Each column computes base and adapters, and the time of the base is subtracted, so that a column may run beside the base
GEMM. Results are compared with a float32 reference first: a column with wrong results is not measured.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu.case import Case, make_case
from gpu.columns.registry import Column
from gpu.grid import SITES, Point, SiteShape, floor_us, points
from gpu.results import Results
from gpu.timing import bytes_per_us, l2_bytes, replay_us

CLOSE = 2e-2  # bound on the error relative to the reference; correct kernels in bfloat16 are within a third of this

Clock = Callable[[Callable[[], object], int], float]


def run(results: Results, columns: Sequence[Column], seconds: float) -> None:
    """Measures the points that are not in the results yet, for at most `seconds`."""
    bandwidth = results.section("bandwidth")
    if "bytes_per_us" not in bandwidth:
        bandwidth["bytes_per_us"] = bytes_per_us()
    done, began = results.section("kernels"), time.monotonic()
    for number, point in enumerate(points(), 1):
        if time.monotonic() - began > seconds:
            print(f"{seconds:.0f} s are over: run again to continue")
            return
        wanted = [column for column in columns if not column.absent and column.name not in done.get(point.key, {})]
        if wanted:
            measured = measure(point, wanted, replay_us, torch.device("cuda"), torch.bfloat16, l2_bytes())
            floors = {site.name: floor_us(site, point, bandwidth["bytes_per_us"]) for site in SITES}
            done.setdefault(point.key, {}).update(measured, floor=floors)
            results.save()
            print(f"{number:3}/{len(points())} {point.key:16} {time.monotonic() - began:6.0f} s", flush=True)


def measure(
    point: Point,
    columns: Sequence[Column],
    clock: Clock,
    device: torch.device,
    dtype: torch.dtype,
    cache_bytes: int,
    sites: Sequence[SiteShape] = SITES,
) -> dict[str, dict[str, Any]]:
    """Returns by column and site the microseconds that adapters add to the base, or a text on what went wrong."""
    found: dict[str, dict[str, Any]] = {column.name: {} for column in columns}
    base: dict[str, float] = {}
    for site in sites:
        case = make_case(site, point, device, dtype, cache_bytes)
        count = len(case.copies)
        base[site.name] = clock(lambda case=case, n=count: [case.base(copy) for copy in range(n)], count)
        for column in columns:
            found[column.name][site.name] = _one(column, case, clock, base[site.name])
        del case
    return {**found, "base": base}


def _one(column: Column, case: Case, clock: Clock, base_us: float) -> float | str:
    count = len(case.copies)
    try:
        run = column.prepare(case)
        wrong = max(_error(run(copy), case.expected(copy)) for copy in range(2))
        if not wrong < CLOSE:
            return f"wrong by {wrong:.2g}"
        return clock(lambda: [run(copy) for copy in range(count)], count) - base_us
    except Exception as error:  # a kernel that does not compile must not end the benchmark
        if not column.peer:
            traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:200]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())
