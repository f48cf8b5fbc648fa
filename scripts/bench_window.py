"""Two steps in flight against one, on this machine: throughput and time to first token, in turns on one workload.

    python scripts/bench_window.py                                a short step and a long one, about ten minutes
    python scripts/bench_window.py --shapes tiny --rounds 5

Both servers are up all the time and take turns, round by round. Rates come from a closed loop; the time to the first
token from an open loop (Poisson) at a share of what the closed loop reached, so that arrivals fall anywhere in a step.
`later` is how much later the first token comes with two steps in flight, in steps (gaps between tokens, p50).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.client import Server, open_session
from bench.launched import Launched, scratch
from bench.loops import Run, closed_loop, open_loop
from bench.report import Summary, ratios, summarise
from bench.shapes import SHAPES, make_adapter, make_model
from bench.workload import Ask, Lengths, Plan

ONE = "--disable-overlap-schedule"
LOAD = 0.6  # of the closed loop's rate of requests


@dataclass(frozen=True)
class Point:
    """What was measured at one shape and concurrency: second over first is two steps in flight over one."""

    shape: str
    concurrency: int
    step_ms: float
    rate: dict[str, float]
    ttft_ms: tuple[float, float]
    closed_ttft_ms: tuple[float, float]

    @property
    def later(self) -> float:
        """How many steps later the first token comes."""
        return (self.ttft_ms[1] - self.ttft_ms[0]) / self.step_ms

    def line(self) -> str:
        """For people."""
        return (
            f"{self.shape:>6}{self.concurrency:6}{self.step_ms:9.2f}"
            + "".join(f"{self.rate[name]:9.3f}" for name in ("median", "lowest", "highest"))
            + f"{self.ttft_ms[0]:10.1f}{self.ttft_ms[1]:9.1f}{self.later:8.2f}"
            + f"{self.closed_ttft_ms[0]:10.1f}{self.closed_ttft_ms[1]:9.1f}"
        )


HEAD = " shape  conc  step ms   tok/s 2/1: low,    high   TTFT one      two   later  closed one     two  (TTFT p50, ms)"


def asks(concurrency: int, requests: int, seed: int, rate: float | None) -> list[Ask]:
    """Random prompts over the base and one adapter."""
    plan = Plan(requests, Lengths(16, 96), Lengths(24, 40), (300, 900), ("a", "chorus"), "round-robin", 1.0, rate, 1.0)
    return [ask if ask.adapter == "a" else Ask(ask.prompt, ask.output_len, None, ask.due) for ask in plan.asks(seed)]


async def measure(urls: Sequence[str], shape: str, concurrency: int, requests: int, rounds: int) -> Point:
    """The closed loop on both, then the open loop on both; who goes first alternates."""
    closed: list[list[Run]] = [[], []]
    opened: list[list[Run]] = [[], []]
    async with open_session(None, 600) as session:
        servers = [Server(session, url) for url in urls]
        for server in servers:
            await server.discover()
            await closed_loop(server, asks(concurrency, 2 * concurrency, 99, None), concurrency, "warm-up")
        for seed in range(rounds):
            for which in (0, 1) if seed % 2 == 0 else (1, 0):
                work = asks(concurrency, requests, seed, None)
                label = f"{shape}, concurrency {concurrency}, round {seed + 1}"
                closed[which].append(await closed_loop(servers[which], work, concurrency, label))
        rate = LOAD * statistics.median(summarise([run]).requests_per_s for run in closed[0])
        for seed in range(rounds):
            for which in (0, 1) if seed % 2 == 0 else (1, 0):
                work = asks(concurrency, requests, 1000 + seed, rate)
                opened[which].append(await open_loop(servers[which], work, None, f"{shape}, open loop"))
    one, two = (summarise(runs) for runs in closed)
    return Point(
        shape,
        concurrency,
        one.times_ms["ITL"]["p50"],
        ratios(closed[0], closed[1])["output tokens/s"],
        (_ttft(summarise(opened[0])), _ttft(summarise(opened[1]))),
        (_ttft(one), _ttft(two)),
    )


def _ttft(summary: Summary) -> float:
    assert summary.answered == summary.requests, f"not all were answered: {summary.errors}"
    return summary.times_ms["TTFT"]["p50"]


def bench(shape: str, concurrencies: Sequence[int], requests: int, rounds: int, flags: Sequence[str]) -> list[Point]:
    """Both servers up, every concurrency measured."""
    directory = scratch() / f"bench-{shape}"
    model = make_model(SHAPES[shape], directory / "model")
    adapter = make_adapter(SHAPES[shape], directory / "r16", 16)
    common = ["--model-path", model, "--dtype", "float32", "--lora-paths", f"a={adapter}", *flags]
    points = []
    with Launched(*common, ONE) as first, Launched(*common) as second:
        for concurrency in concurrencies:
            count = max(min(requests, 2 + 2 * concurrency), 2 * concurrency)  # a lone client takes long
            points.append(asyncio.run(measure([first.url, second.url], shape, concurrency, count, rounds)))
            print(points[-1].line(), flush=True)
    return points


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["tiny", "0.5b"])
    top.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--requests", type=int, default=24, help="in each round at most, and two a client at least")
    top.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for both servers; stands last")
    top.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = top.parse_args(argv)
    print(HEAD)
    found = [p for shape in args.shapes for p in bench(shape, args.concurrency, args.requests, args.rounds, args.flags)]
    if args.json:
        plain = [{**vars(point), "later": point.later} for point in found]
        args.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
