"""Measures the cost of adapters: many or few, loading, switching. Prints ratios of measurements of the same run.

python scripts/bench_adapters.py                      everything, on a 0.5B shape: about ten minutes on two cores
python scripts/bench_adapters.py --parts cliff load   only these parts
python scripts/bench_adapters.py --shape tiny         a quick look at whether it runs

cliff    8, 16, 64, 256 adapters in a pool that holds all, concurrency 32: throughput against the bytes a step reads
quarter  256 adapters in a pool for a quarter of them: the loss of throughput, against the time of the fills
cap      a cap of 8 adapters a step at concurrency 32, against a cap of 64 at concurrency 8
load     gaps between tokens while an adapter of several hundred MB is loaded, against the gaps before the load
dora     the same with a DoRA of rank 64, whose gains need all base weights; and its load time on an idle server
switch   two resident adapters alternating step by step, against one; and the time of a fill by rank
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.client import Server, open_session
from bench.launched_server import LaunchedServer, scratch
from bench.loops import Run, closed_loop
from bench.report import percentile, summarise
from bench.shapes import SHAPES, Shape, make_adapter, make_model
from bench.workload import Lengths, Plan
from tqdm import tqdm

RANKS = (4, 8, 12, 16)
COUNTS = (8, 16, 64, 256)


class Bench:
    """A shape with its model and adapters on disk, and the settings of the run."""

    def __init__(self, shape_name: str, rounds: int, requests: int) -> None:
        self.shape: Shape = SHAPES[shape_name]
        self.rounds = rounds
        self.requests = requests
        self.directory = scratch() / f"bench-{shape_name}"
        self.model = make_model(self.shape, self.directory / "model")

    def adapters(self, count: int) -> list[str]:
        """Returns `name=path` of `count` adapters of mixed ranks from 4 to 16."""
        found = []
        for number in tqdm(range(count), desc="adapters", leave=False):
            path = self.directory / f"a{number}"
            make_adapter(self.shape, path, RANKS[number % len(RANKS)], seed=number)
            found.append(f"a{number}={path}")
        return found

    def flags(self, count: int, *more: object) -> list[object]:
        """Returns the flags of a server with `count` adapters."""
        return ["--model-path", self.model, "--lora-paths", *self.adapters(count), *more]

    def step_bytes(self, active: int) -> int:
        """Returns the bytes that a decode step reads with `active` adapters of the mixed ranks."""
        mean = sum(self.shape.lora_bytes(rank) for rank in RANKS) // len(RANKS)
        return self.shape.weight_bytes() + active * mean

    def plan(self, adapters: int, requests: int) -> Plan:
        """Returns a workload that uses the first `adapters` adapters round-robin."""
        names = tuple(f"a{number}" for number in range(adapters))
        return Plan(requests, Lengths(64, 64), Lengths(32, 32), (300, 900), names, "round-robin", 1.0, None, 1.0)

    async def run(self, url: str, adapters: int, concurrency: int, seed: int, label: str) -> Run:
        """Runs one closed loop over the first `adapters` adapters."""
        async with open_session(None, 600) as session:
            requests = self.plan(adapters, max(self.requests, adapters)).requests(seed)
            return await closed_loop(Server(session, url), requests, concurrency, label)

    def rate(self, runs: Sequence[Run]) -> float:
        """Returns the output tokens per second: the median of the rounds."""
        return statistics.median(summarise([run]).output_tokens_per_s for run in runs)


def cliff(bench: Bench) -> dict[str, object]:
    """Measures more adapters than a step has lanes for, all of them resident."""
    runs: dict[int, list[Run]] = {count: [] for count in COUNTS}
    with LaunchedServer(*bench.flags(256, "--max-loras-per-batch", 64, "--lora-pool-size", 256)) as server:
        for seed in range(-1, bench.rounds):  # the first round is a warm-up
            for count in COUNTS:
                run = asyncio.run(bench.run(server.url, count, 32, seed, f"{count} adapters"))
                if seed >= 0:
                    runs[count].append(run)
        info = server.info()
    print("\ncliff: adapters in play, all resident, at most 64 in a step, concurrency 32")
    print("adapters   tokens/s   of 8   bytes allow   TTFT p50   of 8")
    out: dict[str, object] = {"rank_pages": info["stats"]["rank_pages_used"]}
    first_ttft = summarise(runs[8]).times_ms["TTFT"]["p50"]
    for count in COUNTS:
        rate, ttft = bench.rate(runs[count]), summarise(runs[count]).times_ms["TTFT"]["p50"]
        ratio, allowed = rate / bench.rate(runs[8]), bench.step_bytes(8) / bench.step_bytes(min(32, count))
        print(f"{count:8}{rate:11.1f}{ratio:7.2f}{allowed:14.2f}{ttft:11.0f}{ttft / first_ttft:7.2f}")
        out[str(count)] = {"tokens_per_s": rate, "of_8": ratio, "bytes_allow": allowed, "ttft_ms": ttft}
    print("rank pages in use:", info["stats"]["rank_pages_used"], "of", info["capacity"]["rank_pages"])
    return out


def quarter(bench: Bench) -> dict[str, object]:
    """Measures a pool for a quarter of the adapters in turn with a pool for all, and times a fill on an idle server."""
    count = "chorus:adapter_fill_seconds_count"
    lone = make_adapter(bench.shape, bench.directory / "r16", 16)
    lanes = ("--max-loras-per-batch", 64)
    with (
        LaunchedServer(*bench.flags(256, *lanes, "--lora-pool-size", 256)) as roomy,
        LaunchedServer(*bench.flags(256, *lanes, "--lora-pool-size", 64)) as tight,
    ):

        def run(server: LaunchedServer, seed: int, label: str) -> Run:
            return asyncio.run(bench.run(server.url, 256, 32, seed, label))

        pairs = []
        for seed in range(-1, bench.rounds):  # the first round is a warm-up
            if seed == 0:
                own, before = fill_seconds(tight, "lone", lone), tight.metric(count)
                steps = [server.info()["stats"]["steps"] for server in (roomy, tight)]
            pairs.append((run(roomy, seed, "pool 256"), run(tight, seed, "pool 64")))
        fills, wall = tight.metric(count) - before, sum(pair[1].seconds for pair in pairs[1:])
        time.sleep(2)  # the stats are sent each second
        steps = [server.info()["stats"]["steps"] - sum_ for server, sum_ in zip((roomy, tight), steps, strict=True)]
    ratios = [bench.rate([pair[1]]) / bench.rate([pair[0]]) for pair in pairs[1:]]
    of_all, allowed = statistics.median(ratios), 1 - fills * own / wall
    print("\nquarter: 256 adapters, a pool for 64 of them, against a pool for all; in turn")
    print(f"of the tokens/s: {of_all:.3f}, the median of {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(f"{fills:.0f} fills of {own * 1000:.1f} ms each in {wall:.1f} s allow {allowed:.3f}")
    print(f"steps for the same tokens: {steps[1]} against {steps[0]}")
    return {
        "of_all": of_all,
        "rounds": ratios,
        "steps": steps,
        "fills": fills,
        "own_ms": own * 1000,
        "wall": wall,
        "allowed": allowed,
    }


def fill_seconds(server: LaunchedServer, name: str, path: Path) -> float:
    """Returns the seconds that an idle server takes to copy an adapter from host memory to rank pages."""
    before = server.metric("chorus:adapter_fill_seconds_sum")
    server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), "preload": True})
    seconds = server.metric("chorus:adapter_fill_seconds_sum") - before
    server.post("/unload_lora_adapter", {"lora_name": name})
    return seconds


def cap(bench: Bench) -> dict[str, object]:
    """Compares a low cap at high concurrency with a high cap at low concurrency: the cap itself should cost nothing."""
    result: dict[str, object] = {}
    rates = {}
    for lanes, concurrency in ((64, 8), (8, 32)):
        with LaunchedServer(*bench.flags(64, "--max-loras-per-batch", lanes, "--lora-pool-size", 64)) as server:
            asyncio.run(bench.run(server.url, 64, concurrency, -1, "warm-up"))
            runs = [
                asyncio.run(bench.run(server.url, 64, concurrency, seed, f"cap {lanes}"))
                for seed in range(bench.rounds)
            ]
        rates[lanes] = bench.rate(runs)
        longest = max(sample.pieces[0] for run in runs for sample in run.samples)
        result[f"cap_{lanes}"] = {"tokens_per_s": rates[lanes], "longest_wait_s": longest}
    print("\ncap: 64 adapters; a cap of 8 at concurrency 32, against a cap of 64 at concurrency 8")
    print(f"tokens/s {rates[8]:.1f} of {rates[64]:.1f}: {rates[8] / rates[64]:.2f}; {json.dumps(result)}")
    return result


def load(bench: Bench) -> dict[str, object]:
    """Measures the gaps between tokens of eight streams before and while a large adapter is loaded."""
    large = make_adapter(bench.shape, bench.directory / "large", 512)
    size = sum(file.stat().st_size for file in large.iterdir())
    flags = bench.flags(8, "--max-lora-rank", 512, "--max-loras-per-batch", 8, "--lora-pool-size", 2)
    with LaunchedServer(*flags) as server:
        pieces = asyncio.run(beside(bench, server, lambda: load_seconds(server, "large", large)))
    print(f"\nload: an adapter of {size / 1e6:.0f} MB, loaded and filled in {pieces.seconds:.1f} s beside 8 streams")
    return {"megabytes": size / 1e6, "seconds": pieces.seconds} | pieces.table()


def dora(bench: Bench) -> dict[str, object]:
    """Times the load of a DoRA of rank 64 by an idle server, and then beside eight streams."""
    roots = [make_adapter(bench.shape, bench.directory / f"dora{n}", 64, n, dora=True) for n in range(3)]
    flags = bench.flags(8, "--max-lora-rank", 64, "--max-loras-per-batch", 8, "--lora-pool-size", 4)
    with LaunchedServer(*flags) as server:
        time.sleep(5)  # the loader process starts after the server is ready
        idle = [load_seconds(server, f"dora{n}", root) for n, root in enumerate(roots)]
    with LaunchedServer(*flags) as server:  # a new server, whose loader has not read the base's weights yet
        dtype = server.info()["capacity"]["dtype"]
        pieces = asyncio.run(beside(bench, server, lambda: load_seconds(server, "dora0", roots[0])))
    print(f"\ndora: rank 64, in {dtype}; loaded and filled by an idle server in " + " ".join(f"{s:.2f}" for s in idle))
    print(f"seconds, one after the other; beside 8 streams in {pieces.seconds:.1f} s")
    return {"dtype": dtype, "idle_seconds": idle, "busy_seconds": pieces.seconds} | pieces.table()


def load_seconds(server: LaunchedServer, name: str, path: Path) -> float:
    """Returns the seconds until a load call returns, which it does when the adapter is resident."""
    began = time.perf_counter()
    server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), "preload": True})
    return time.perf_counter() - began


@dataclass(frozen=True)
class Gaps:
    """Seconds between tokens before and during some work, and how long the work took."""

    before: list[float]
    during: list[float]
    seconds: float

    def table(self) -> dict[str, object]:
        """Prints percentiles before and during the work side by side, and returns them in milliseconds."""
        out: dict[str, object] = {}
        for q in (50, 99, 100):
            a, b = percentile(self.before, q) * 1000, percentile(self.during, q) * 1000
            print(f"gap p{q:<3} {a:8.1f} ms before {b:8.1f} ms while loading: {b / a:.2f}")
            out[f"p{q}"] = {"before_ms": a, "during_ms": b}
        return out


async def beside(bench: Bench, server: LaunchedServer, work: Callable[[], float]) -> Gaps:
    """Runs eight streams of eight adapters for 15 seconds, and then until `work` ends; `work` returns its seconds."""

    async def gaps(url: str, until: Callable[[], bool]) -> list[float]:
        async with open_session(None, 600) as session:
            server = Server(session, url)
            requests = iter(bench.plan(8, 100000).requests(1))
            pieces: list[float] = []

            async def client() -> None:
                while not until():
                    sample = await server.send(next(requests), time.perf_counter())
                    pieces.extend(b - a for a, b in zip(sample.pieces, sample.pieces[1:], strict=False))

            await asyncio.gather(*(client() for _ in range(8)))
            return pieces

    end = time.perf_counter() + 15
    before = await gaps(server.url, lambda: time.perf_counter() > end)
    doing = asyncio.ensure_future(asyncio.to_thread(work))
    during = await gaps(server.url, doing.done)
    return Gaps(before, during, await doing)


def switch(bench: Bench) -> dict[str, object]:
    """Measures single tokens of one adapter, and of two adapters in turn; and the time of a fill by rank."""
    one, two = [], []
    with LaunchedServer(*bench.flags(2, "--max-lora-rank", 128, "--max-loras-per-batch", 8)) as server:

        def token(adapter: str) -> float:
            began = time.perf_counter()
            body = {"input_ids": [300, 301], "lora_path": adapter, "sampling_params": {"max_new_tokens": 1}}
            server.post("/generate", body)
            return time.perf_counter() - began

        for number in tqdm(range(300), desc="switch", leave=False):
            token("a0" if number % 2 else "a1")
            two.append(token("a1" if number % 2 else "a0"))  # another adapter than in the step before
            one.append(token("a1" if number % 2 else "a0"))  # the same adapter
        times = {}
        for rank in (8, 16, 32, 64, 128):
            path = make_adapter(bench.shape, bench.directory / f"r{rank}", rank)
            times[rank] = fill_seconds(server, f"r{rank}", path)
    extra = (statistics.median(two) - statistics.median(one)) * 1000
    print(f"\nswitch: {statistics.median(one) * 1000:.2f} ms a step with one adapter, {extra:+.2f} ms when it changes")
    print("fill, host to rank pages: " + ", ".join(f"rank {r} {s * 1000:.1f} ms" for r, s in times.items()))
    return {"one_ms": statistics.median(one) * 1000, "extra_ms": extra, "fill_seconds": times}


PARTS: dict[str, Callable[[Bench], dict[str, object]]] = {
    "cliff": cliff,
    "quarter": quarter,
    "cap": cap,
    "load": load,
    "dora": dora,
    "switch": switch,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the selected parts, prints the results and writes them to a JSON file."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    top.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--requests", type=int, default=128, help="requests in each round; at least one for each adapter")
    top.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = top.parse_args(argv)
    bench = Bench(args.shape, args.rounds, args.requests)
    results = {name: PARTS[name](bench) for name in args.parts}
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
