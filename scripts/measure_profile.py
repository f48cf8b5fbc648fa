"""Measures what steps, fills and loads cost on this machine, and writes a profile for `python -m scheduler.simulate`.

python scripts/measure_profile.py --out measured.json                     the 0.5B shape; some minutes on two cores
python scripts/measure_profile.py --shape 1b --device cuda --out h.json

A runner in this process, with the environment of a launch, gets constructed steps: prompts of several lengths, then
decodes with several numbers of rows, context lengths and adapters. The median times of each kind of step are fitted by
least squares, with no cost below 0, and printed beside the fit. The profile's ranks and rows are the flags', its memory
is what the runner reports.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from bench.launched_server import scratch
from bench.shapes import SHAPES, Shape, make_adapter, make_model
from msgspec.structs import replace
from tqdm import tqdm

from engine.config.process_configs import AdapterSource, Endpoints, RunnerConfig
from engine.messages import (
    AdapterState,
    Capacity,
    Chunk,
    Fill,
    LanePages,
    LoadAdapter,
    NewRow,
    Sampling,
    Step,
)
from engine.processes import incarnations
from engine.processes.busy_timer import BusyTimer
from model_runner.runner import Runner
from scheduler.simulate.profile import UNITS, CopyCost, MachineLimits, Profile, StepCost

GREEDY = Sampling(temperature=0.0)
FEATURES = ("base", "decode_row", "prefill_token", "context_token", "lane", "lane_byte")


@dataclass(frozen=True)
class Point:
    """One timed step: its contents, in the order of FEATURES, and its seconds."""

    features: tuple[float, ...]
    seconds: float


@dataclass
class RunnerBench:
    """A runner with resident adapters, one in each lane, and the steps timed so far."""

    runner: Runner
    states: dict[int, AdapterState]
    page_bytes: dict[str, int]
    step: int = 0
    generation: int = 0
    points: dict[tuple[int, ...], list[Point]] = field(default_factory=dict)  # keys: kinds of step

    def lane_bytes(self, adapter_id: int) -> int:
        pages = self.states[adapter_id].footprint.pages
        return sum(self.page_bytes[group] * count for group, count in pages.items())

    def run(self, **parts: object) -> float:
        """Runs one step and returns its seconds."""
        self.step += 1
        return self.runner.execute(Step(epoch=0, id=self.step, **parts)).seconds  # type: ignore[arg-type]

    def finish_transfers(self) -> list[AdapterState]:
        """Advances loads and fills until none is under way."""
        states: list[AdapterState] = []
        while self.runner.poll_seconds is not None:
            states += self.runner.advance()
            time.sleep(0.0005)
        return states

    def measure(self, rows: int, context: int, lanes: int, decodes: int) -> None:
        """Times prompts of `context` tokens for `rows` rows, one per step, then `decodes` decode steps of all rows."""
        self.generation += 1
        pages = iter(range(1, self.runner.capacity.kv_pages + 1))
        for row in range(rows):
            self._prompt(row, context, decodes, 1 + row % lanes if lanes else 0, pages)
        used = sorted({1 + row % lanes for row in range(rows)}) if lanes else []
        for number in range(decodes):
            chunks = [
                Chunk(
                    row=row,
                    generation=self.generation,
                    start=context + number,
                    length=1,
                    lane=1 + row % lanes if lanes else 0,
                )
                for row in range(rows)
            ]
            seconds = self.run(chunks=chunks)
            read = rows * (context + number + 1)
            self._record((rows, context, len(used)), rows, 0, read, used, seconds)

    def _prompt(self, row: int, context: int, decodes: int, lane: int, pages: Iterator[int]) -> None:
        capacity = self.runner.capacity
        new = [NewRow(row=row, generation=self.generation, prompt_length=context, sampling=GREEDY, history=[])]
        own = [next(pages) for _ in range(-(-(context + decodes + 1) // capacity.page_size))]
        for start in range(0, context, capacity.max_batched_tokens):
            length = min(capacity.max_batched_tokens, context - start)
            chunk = Chunk(
                row=row,
                generation=self.generation,
                start=start,
                length=length,
                lane=lane,
                tokens=[300 + (start + i) % 500 for i in range(length)],
                pages=own if start == 0 else [],
                samples=start + length == context,
            )
            seconds = self.run(new_rows=new if start == 0 else [], chunks=[chunk])
            used = [lane] if lane else []
            self._record((0, start, length, sum(map(self.lane_bytes, used))), 0, length, start + length, used, seconds)

    def _record(
        self, kind: tuple[int, ...], rows: int, tokens: int, context: int, lanes: Sequence[int], seconds: float
    ) -> None:
        size = sum(map(self.lane_bytes, lanes))
        point = Point((1.0, rows, tokens, context, len(lanes), size), seconds)
        self.points.setdefault(kind, []).append(point)


def medians(kinds: Iterable[Sequence[Point]]) -> list[Point]:
    """Returns the median point of each kind, sorted by contents."""
    middles = (sorted(kind, key=lambda point: point.seconds)[len(kind) // 2] for kind in kinds)
    return sorted(middles, key=lambda point: point.features)


def table(points: Sequence[Point], costs: dict[str, float]) -> str:
    """Returns a table of the measured and fitted milliseconds of each point."""
    lines = ["rows  prompt  KV read  lanes  lane MB       ms      fit"]
    for point in points:
        _, rows, tokens, context, lanes, size = point.features
        fitted = sum(cost * amount for cost, amount in zip(costs.values(), point.features, strict=True))
        lines.append(
            f"{rows:4.0f}{tokens:8.0f}{context:9.0f}{lanes:7.0f}{size / 1e6:9.1f}"
            f"{point.seconds * 1000:9.1f}{fitted * 1000:9.1f}"
        )
    return "\n".join(lines)


def fit(points: Sequence[Point]) -> tuple[dict[str, float], float]:
    """Fits by least squares of relative errors with no negative cost. Returns (cost by feature, median error)."""
    kept = list(range(len(FEATURES)))
    matrix = np.array([[*point.features] for point in points])
    times = np.array([point.seconds for point in points])
    present = matrix[:, matrix.any(axis=0)]
    if np.linalg.matrix_rank(present / np.linalg.norm(present, axis=0)) < present.shape[1]:
        kept.remove(FEATURES.index("lane"))  # all lanes have equally many bytes, so the two costs cannot be told apart
    while True:
        scaled = matrix[:, kept] / times[:, None]
        costs = np.linalg.lstsq(scaled, np.ones(len(points)), rcond=None)[0]
        if costs.min() >= 0 or len(kept) == 1:
            break
        del kept[int(costs.argmin())]
    found = dict.fromkeys(FEATURES, 0.0) | {FEATURES[k]: rounded(cost) for k, cost in zip(kept, costs, strict=True)}
    error = float(np.median(np.abs(matrix[:, kept] @ costs - times) / times))
    return found, error


def rounded(figure: float) -> float:
    """Rounds to four digits, because the measurement is no more exact."""
    return float(f"{figure:.4g}")


def line(copies: dict[int, list[float]]) -> CopyCost:
    """Fits seconds + bytes / bytes_per_second to the median copy time of each size."""
    sizes = sorted(copies)
    slope, start = np.polyfit(sizes, [statistics.median(copies[size]) for size in sizes], 1)
    if slope <= 0 or start < 0:  # the sizes are too close: the whole time is attributed to the bytes
        slope, start = statistics.median(statistics.median(copies[size]) / size for size in sizes), 0.0
    return CopyCost(seconds=rounded(start), bytes_per_second=rounded(1 / slope))


def start(
    shape: Shape, directory: Path, ranks: Sequence[int], lanes: int, device: str, most_rows: int | None
) -> Runner:
    """Starts a runner with its adapters on the host."""
    sources = []
    for number in range(1, lanes + 1):
        path = make_adapter(shape, directory / f"p{number}", ranks[number % len(ranks)], seed=number)
        sources.append(AdapterSource(adapter_id=number, name=f"p{number}", path=str(path), root=str(path)))
    config = RunnerConfig(
        endpoints=Endpoints(tokenizer="", scheduler="", runner="", zmq_server=""),
        model_path=str(make_model(shape, directory / "model")),
        device=device,  # type: ignore[arg-type]
        cpu_kernels="auto",
        max_running_requests=most_rows,
        enable_lora=True,
        max_loras=lanes,
        max_lora_rank=max(ranks),
        lora_pool_adapters=lanes + 2,
        adapters=sources,
    )
    return Runner.load(config, progress=BusyTimer())


def residents(runner: Runner, directory: Path, lanes: int, rounds: int) -> tuple[RunnerBench, CopyCost, CopyCost]:
    """Loads and fills each adapter `rounds` times, adapter n into lane n. Returns (bench, cost of a load, of a fill).

    The first round is a warm-up: the loaders start, and the rank pages are touched for the first time.
    """
    bench = RunnerBench(runner, {}, dict(runner.capacity.rank_page_bytes))
    free = {group: iter(range(count)) for group, count in runner.capacity.rank_pages.items()}
    pages: dict[int, dict[str, list[int]]] = {}
    loads: dict[int, list[float]] = {}
    fills: dict[int, list[float]] = {}
    runner.adapters.start()
    bench.finish_transfers()  # waits for everything that is compiled in the background
    for number in tqdm(list(range(1, lanes + 1)) * (1 + rounds), desc="adapters", leave=False):
        runner.adapters.evict(number)
        began = time.perf_counter()
        state = runner.adapters.load(LoadAdapter(adapter_id=number, path=str(directory / f"p{number}")))
        state = bench.states[number] = state or bench.finish_transfers()[-1]
        assert state.state == "host", state
        took = time.perf_counter() - began
        if warm := number in pages:
            loads.setdefault(state.bytes, []).append(took)
        else:
            pages[number] = {group: [next(free[group]) for _ in range(n)] for group, n in state.footprint.pages.items()}
        began = time.perf_counter()
        bench.run(fills=[Fill(number, pages[number], now=True)])
        if warm:
            fills.setdefault(state.bytes, []).append(time.perf_counter() - began)
        bench.finish_transfers()
        bench.run(lanes=[LanePages(number, {group: [(n, 1.0) for n in some] for group, some in pages[number].items()})])
    return bench, line(loads), line(fills)


def describe(shape: str, capacity: Capacity, ranks: Sequence[int], groups: Iterable[str], source: str) -> Profile:
    """Returns a profile from the runner's capacity, without costs. `groups` are those of the adapters."""
    return Profile(
        name=f"{shape} shape, {capacity.dtype}, {capacity.device}"
        + (f", {torch.get_num_threads()} threads" if capacity.device == "cpu" else ""),
        source=source,
        step=StepCost(base=0.0),
        fill=CopyCost(bytes_per_second=1.0),
        load=CopyCost(bytes_per_second=1.0),
        room=MachineLimits(
            rows=capacity.rows,
            kv_tokens=capacity.kv_pages * capacity.page_size,
            max_length=capacity.max_length,
            max_batched_tokens=capacity.max_batched_tokens,
            max_lora_rank=max(ranks),
            page_size=capacity.page_size,
            host_bytes=capacity.host_bytes,
        ),
        unit_bytes={group: capacity.rank_page_bytes[group] // UNITS for group in groups},
        lora_ranks=list(ranks),
        fill_share=0.1 if capacity.device == "cpu" else 0.0,
    )


def flags() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="0.5b")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--ranks", type=int, nargs="+", default=[4, 8, 12, 16])
    add("--lanes", type=int, default=16)
    add("--rows", type=int, nargs="+", default=[1, 4, 16, 32])
    add("--max-running-requests", type=int, help="rows of the profile (the runner's own number)")
    add("--contexts", type=int, nargs="+", default=[32, 96, 384])
    add("--decodes", type=int, default=8)
    add("--rounds", type=int, default=3, help="how often everything is measured, one round after the other")
    add("--gap", type=float, default=0.0008, help="seconds between steps that a second one in flight hides (0.0008)")
    add("--out", type=Path, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, fits and writes a profile."""
    args = flags().parse_args(argv)
    shape, directory = SHAPES[args.shape], scratch() / f"bench-{args.shape}"
    runner = start(shape, directory, args.ranks, args.lanes, args.device, args.max_running_requests)
    try:
        bench, load, fill = residents(runner, directory, args.lanes, args.rounds)
        bench.measure(2, 64, 1, args.decodes)  # a warm-up
        bench.points.clear()
        plan = [(r, c, n) for r in args.rows for c in args.contexts for n in sorted({0, 1, min(r, args.lanes)})]
        for rows, context, lanes in tqdm(plan * args.rounds, desc="steps", leave=False):
            bench.measure(rows, context, lanes, args.decodes)
    finally:
        runner.close()
    kinds = medians(bench.points.values())
    costs, error = fit(kinds)
    steps = [point.seconds for points in bench.points.values() for point in points]
    source = (
        f"scripts/measure_profile.py: {len(steps)} steps of {len(kinds)} kinds, median error of the fit {error:.0%}"
    )
    profile = describe(args.shape, runner.capacity, args.ranks, bench.states[1].footprint.pages, source)
    profile = replace(profile, step=StepCost(**costs), load=load, fill=fill, gap=args.gap)
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    print(table(kinds, costs))
    step = statistics.median(steps) * 1000
    print(f"{args.out}: {len(steps)} steps, median {step:.1f} ms, median error of the fit {error:.1%}")
    print(", ".join(f"{name} {cost * 1e6:.3g} us" for name, cost in costs.items()))
    for name, copy in (("load", load), ("fill", fill)):
        print(f"{name}: {copy.seconds * 1000:.2f} ms + {copy.bytes_per_second / 1e9:.2f} GB/s")
    return 0


def exec_with_launch_environment() -> None:
    """Restarts this process with the environment of a launch's runner, which takes effect at the start of a process."""
    wanted = incarnations.runner_environment()
    if wanted:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


if __name__ == "__main__":
    exec_with_launch_environment()
    sys.exit(main())
