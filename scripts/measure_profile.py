"""Measures what steps, fills and loads cost on this machine, and writes a profile for `python -m scheduler.simulate`.

python scripts/measure_profile.py --out measured.json                     the 0.5B shape; some minutes on two cores
python scripts/measure_profile.py --shape 1b --device cuda --out h.json

A runner in this process gets hand-made steps: prompts of several lengths, then decodes with several numbers of rows,
lengths of context and adapters. Their times are fitted by least squares, with no cost below 0; what the fit leaves
over is printed. Ranks and rows of the profile are those given here, its memory what the runner reports.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from bench.launched import scratch
from bench.shapes import SHAPES, Shape, make_adapter, make_model
from msgspec.structs import replace
from tqdm import tqdm

from engine.config import AdapterSource, Links, RunnerConfig
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
from model_runner.runner import Runner
from scheduler.simulate.profile import UNITS, CopyCost, Profile, Room, StepCost

GREEDY = Sampling(temperature=0.0)
FEATURES = ("base", "decode_row", "prefill_token", "context_token", "lane", "lane_byte")


@dataclass(frozen=True)
class Point:
    """One timed step: what was in it, in the order of FEATURES, and its seconds."""

    features: tuple[float, ...]
    seconds: float


@dataclass
class Rig:
    """A runner with `count` resident adapters, one in each lane, and a step counter."""

    runner: Runner
    states: dict[int, AdapterState]
    page_bytes: dict[str, int]
    step: int = 0
    generation: int = 0
    points: list[Point] = field(default_factory=list)

    def lane_bytes(self, adapter_id: int) -> int:
        pages = self.states[adapter_id].footprint.pages
        return sum(self.page_bytes[group] * count for group, count in pages.items())

    def run(self, **parts: object) -> float:
        """Seconds of one step."""
        self.step += 1
        return self.runner.execute(Step(epoch=0, id=self.step, **parts)).seconds  # type: ignore[arg-type]

    def settle(self) -> list[AdapterState]:
        """Goes on with loads and fills until none is under way."""
        states: list[AdapterState] = []
        while self.runner.wait is not None:
            states += self.runner.advance()
            time.sleep(0.0005)
        return states

    def measure(self, rows: int, context: int, lanes: int, decodes: int) -> None:
        """Prompts of `context` tokens, one a step, for so many rows, then decodes of all of them."""
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
            self._note(rows, 0, read, used, seconds)

    def _prompt(self, row: int, context: int, decodes: int, lane: int, pages: Iterator[int]) -> None:
        capacity = self.runner.capacity
        new = [NewRow(row=row, generation=self.generation, prompt_length=context, sampling=GREEDY, history=[])]
        mine = [next(pages) for _ in range(-(-(context + decodes + 1) // capacity.page_size))]
        for start in range(0, context, capacity.max_batched_tokens):
            length = min(capacity.max_batched_tokens, context - start)
            chunk = Chunk(
                row=row,
                generation=self.generation,
                start=start,
                length=length,
                lane=lane,
                tokens=[300 + (start + i) % 500 for i in range(length)],
                pages=mine if start == 0 else [],
                samples=start + length == context,
            )
            seconds = self.run(new_rows=new if start == 0 else [], chunks=[chunk])
            self._note(0, length, start + length, [lane] if lane else [], seconds)

    def _note(self, rows: int, tokens: int, context: int, lanes: Sequence[int], seconds: float) -> None:
        size = sum(self.lane_bytes(lane) for lane in lanes)
        self.points.append(Point((1.0, rows, tokens, context, len(lanes), size), seconds))


def fit(points: Sequence[Point]) -> tuple[dict[str, float], float]:
    """Least squares of relative errors with no negative cost: (cost by feature, the median relative error)."""
    kept = list(range(len(FEATURES)))
    matrix = np.array([[*point.features] for point in points])
    times = np.array([point.seconds for point in points])
    while True:
        scaled = matrix[:, kept] / times[:, None]
        costs = np.linalg.lstsq(scaled, np.ones(len(points)), rcond=None)[0]
        if costs.min() >= 0 or len(kept) == 1:
            break
        del kept[int(costs.argmin())]
    found = dict.fromkeys(FEATURES, 0.0) | {FEATURES[k]: float(cost) for k, cost in zip(kept, costs, strict=True)}
    error = float(np.median(np.abs(matrix[:, kept] @ costs - times) / times))
    return found, error


def line(sizes: Sequence[float], seconds: Sequence[float]) -> CopyCost:
    """seconds + bytes / bytes_per_second through measured copies."""
    slope, start = np.polyfit(sizes, seconds, 1)
    return CopyCost(seconds=max(0.0, float(start)), bytes_per_second=1 / max(float(slope), 1e-15))


def start(shape: Shape, directory: Path, ranks: Sequence[int], lanes: int, device: str) -> Runner:
    """A runner with its adapters on the host."""
    sources = []
    for number in range(1, lanes + 1):
        path = make_adapter(shape, directory / f"p{number}", ranks[number % len(ranks)], seed=number)
        sources.append(AdapterSource(adapter_id=number, name=f"p{number}", path=str(path), root=str(path)))
    config = RunnerConfig(
        links=Links(tokenizer="", scheduler="", runner="", door=""),
        model_path=str(make_model(shape, directory / "model")),
        device=device,  # type: ignore[arg-type]
        enable_lora=True,
        max_loras=lanes,
        max_lora_rank=max(ranks),
        lora_pool_adapters=lanes + 2,
        adapters=sources,
    )
    return Runner.load(config, progress=True)


def residents(runner: Runner, directory: Path, lanes: int) -> tuple[Rig, CopyCost, CopyCost]:
    """Loads and fills every adapter, timing both, and points lane n at adapter n."""
    capacity = runner.capacity
    rig = Rig(runner, {}, dict(capacity.rank_page_bytes))
    free = {group: iter(range(count)) for group, count in capacity.rank_pages.items()}
    sizes, loads, fills = [], [], []
    runner.start_loader()
    for number in tqdm(range(1, lanes + 1), desc="adapters", leave=False):
        began = time.perf_counter()
        state = runner.load_adapter(LoadAdapter(adapter_id=number, path=str(directory / f"p{number}")))
        state = state or rig.settle()[-1]
        loads.append(time.perf_counter() - began)
        rig.states[number] = state
        sizes.append(state.bytes)
        pages = {group: [next(free[group]) for _ in range(count)] for group, count in state.footprint.pages.items()}
        began = time.perf_counter()
        rig.run(fills=[Fill(number, pages)])
        rig.settle()
        fills.append(time.perf_counter() - began)
        rig.run(lanes=[LanePages(number, {group: [(page, 1.0) for page in pages[group]] for group in pages})])
    return rig, line(sizes, loads), line(sizes, fills)


def describe(shape: str, capacity: Capacity, ranks: Sequence[int], source: str) -> Profile:
    """A profile of what the runner says of itself; its costs are still to be filled in."""
    return Profile(
        name=f"{shape} shape, {capacity.dtype}, {capacity.device}",
        source=source,
        step=StepCost(base=0.0),
        fill=CopyCost(bytes_per_second=1.0),
        load=CopyCost(bytes_per_second=1.0),
        room=Room(
            rows=capacity.rows,
            kv_tokens=capacity.kv_pages * capacity.page_size,
            max_length=capacity.max_length,
            max_batched_tokens=capacity.max_batched_tokens,
            max_lora_rank=max(ranks),
            page_size=capacity.page_size,
            host_bytes=capacity.host_bytes,
        ),
        unit_bytes={group: size // UNITS for group, size in capacity.rank_page_bytes.items()},
        lora_ranks=list(ranks),
        fill_share=0.1 if capacity.device == "cpu" else 0.0,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, fits, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="0.5b")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--ranks", type=int, nargs="+", default=[4, 8, 12, 16])
    add("--lanes", type=int, default=16)
    add("--rows", type=int, nargs="+", default=[1, 4, 16, 32])
    add("--contexts", type=int, nargs="+", default=[64, 384])
    add("--decodes", type=int, default=8)
    add("--gap", type=float, default=0.0008, help="seconds between steps that a second one in flight hides (0.0008)")
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    shape, directory = SHAPES[args.shape], scratch() / f"bench-{args.shape}"
    runner = start(shape, directory, args.ranks, args.lanes, args.device)
    try:
        rig, load, fill = residents(runner, directory, args.lanes)
        rig.measure(2, 64, 1, args.decodes)  # a warm-up
        rig.points.clear()
        plan = [(r, c, n) for r in args.rows for c in args.contexts for n in sorted({0, 1, min(r, args.lanes)})]
        for rows, context, lanes in tqdm(plan, desc="steps", leave=False):
            rig.measure(rows, context, lanes, args.decodes)
    finally:
        runner.close()
    costs, error = fit(rig.points)
    source = f"scripts/measure_profile.py: {len(rig.points)} steps, median error of the fit {error:.0%}"
    profile = describe(args.shape, runner.capacity, args.ranks, source)
    profile = replace(profile, step=StepCost(**costs), load=load, fill=fill, gap=args.gap)
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    step = statistics.median(p.seconds for p in rig.points)
    print(f"{args.out}: {len(rig.points)} steps, median {step * 1000:.1f} ms, median error of the fit {error:.1%}")
    print(", ".join(f"{name} {cost * 1e6:.3g} us" for name, cost in costs.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
