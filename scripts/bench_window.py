"""Two steps in flight against one, on this machine: throughput and time to first token, in turns on one workload.

    python scripts/bench_window.py                                a short step and a long one, about an hour
    python scripts/bench_window.py --shapes tiny --launches 4 --rounds 3
    python scripts/bench_window.py --shapes 0.5b --concurrency 32 --closed-only

Both servers are up together and take turns, round by round. Of two equal ones the one that lies better in memory is
faster for as long as it lives, by some percent: so both are launched anew several times, who is first alternating.
Rates come from a closed loop; the time to the first token from an open loop (Poisson) at a share of what the closed
loop reached, so that arrivals fall anywhere in a step. `later` is how much later the first token comes with two steps
in flight, in steps (gaps between tokens, p50). `beside` is the share of a closed loop's time in which the runner
computed no step: all that a second step in flight can win. `steps 2/1` is how many more of them it took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.client import Server, open_session
from bench.launched import Launched, scratch
from bench.loops import Run, closed_loop, open_loop
from bench.report import Summary, ratios, summarise
from bench.shapes import SHAPES, make_adapter, make_model
from bench.workload import Ask, Lengths, Plan

ONE = "--disable-overlap-schedule"
LOAD = 0.6  # of the closed loop's rate of requests
REQUESTS = {"tiny": 20}  # of each client in a round, else 2: a run shorter than a second tells nothing
LEAST = 4  # requests of a round
TOLD_SECONDS = 1.5  # a server tells its metrics what it did once a second


@dataclass
class Runs:
    """What one server did, round by round.

    `steps` is how many a closed run took, `beside` the share of its seconds that was not the runner's.
    """

    closed: list[Run] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    opened: list[Run] = field(default_factory=list)

    def since(self, rounds: int) -> Runs:
        """Without the first rounds."""
        return Runs(self.closed[rounds:], self.steps[rounds:], self.beside[rounds:], self.opened[rounds:])


@dataclass(frozen=True)
class Point:
    """What was measured at one shape and concurrency: second over first is two steps in flight over one."""

    shape: str
    concurrency: int
    step_ms: float
    rate: dict[str, float]
    steps: float
    beside: tuple[float, float]
    closed_ttft_ms: tuple[float, float]
    ttft_ms: tuple[float, float] | None
    rounds: dict[str, tuple[list[float], list[float]]]

    @property
    def later(self) -> float | None:
        """How many steps later the first token comes."""
        return (self.ttft_ms[1] - self.ttft_ms[0]) / self.step_ms if self.ttft_ms else None

    def line(self, launch: str) -> str:
        """For people."""
        opened = "" if self.ttft_ms is None else f"{self.ttft_ms[0]:10.1f}{self.ttft_ms[1]:9.1f}{self.later:8.2f}"
        return (
            f"{self.shape:>6}{self.concurrency:6}{launch:>8}{self.step_ms:9.2f}"
            f"{self.rate['median']:11.3f}{self.rate['lowest']:9.3f}{self.rate['highest']:9.3f}"
            f"{self.steps:11.3f}{self.beside[0]:12.2%}{self.beside[1]:8.2%}"
            f"{self.closed_ttft_ms[0]:12.1f}{self.closed_ttft_ms[1]:9.1f}{opened}"
        )


HEAD = (
    f"{'shape':>6}{'conc':>6}{'launch':>8}{'step ms':>9}{'tok/s 2/1':>11}{'low':>9}{'high':>9}"
    f"{'steps 2/1':>11}{'beside one':>12}{'two':>8}{'TTFT ms one':>12}{'two':>9}{'open one':>10}{'two':>9}{'later':>8}"
)


def point(shape: str, concurrency: int, one: Runs, two: Runs) -> Point:
    """The figures of the same rounds on both."""
    closed = summarise(one.closed), summarise(two.closed)
    return Point(
        shape,
        concurrency,
        closed[0].times_ms["ITL"]["p50"],
        ratios(one.closed, two.closed)["output tokens/s"],
        statistics.median(b / a for a, b in zip(one.steps, two.steps, strict=True)),
        (statistics.median(one.beside), statistics.median(two.beside)),
        (_ttft(closed[0]), _ttft(closed[1])),
        (_ttft(summarise(one.opened)), _ttft(summarise(two.opened))) if one.opened else None,
        {
            "output_tokens_per_s": (_rates(one), _rates(two)),
            "steps": (one.steps, two.steps),
            "beside": (one.beside, two.beside),
        },
    )


def _ttft(summary: Summary) -> float:
    assert summary.answered == summary.requests, f"not all were answered: {summary.errors}"
    return summary.times_ms["TTFT"]["p50"]


def _rates(runs: Runs) -> list[float]:
    return [summarise([run]).output_tokens_per_s for run in runs.closed]


def asks(concurrency: int, requests: int, seed: int, rate: float | None) -> list[Ask]:
    """Random prompts over the base and one adapter, other ones at every concurrency."""
    plan = Plan(requests, Lengths(16, 96), Lengths(24, 40), (300, 900), ("a", "chorus"), "round-robin", 1.0, rate, 1.0)
    found = plan.asks(10_000 * concurrency + seed)
    return [ask if ask.adapter == "a" else Ask(ask.prompt, ask.output_len, None, ask.due) for ask in found]


async def computed(server: Launched) -> tuple[float, float]:
    """(steps, seconds in them) of a server's runner so far, as soon as they stand still. Nobody may ask meanwhile."""
    last = -1.0
    while (steps := server.metric("chorus:step_seconds_count")) != last:
        last = steps
        await asyncio.sleep(TOLD_SECONDS)
    return steps, server.metric("chorus:step_seconds_sum")


@dataclass(frozen=True)
class Side:
    """One of the two servers as launched, and where its runs are put down."""

    server: Launched
    client: Server
    runs: Runs

    async def warm_up(self, concurrency: int) -> None:
        """One request of each client: what is compiled or allocated has been."""
        await self.client.discover()
        await closed_loop(self.client, asks(concurrency, concurrency, 9_999, None), concurrency, "warm-up")

    async def close(self, work: list[Ask], concurrency: int, label: str) -> None:
        """The closed loop."""
        steps, seconds = await computed(self.server)
        run = await closed_loop(self.client, work, concurrency, label)
        steps_then, seconds_then = await computed(self.server)
        self.runs.closed.append(run)
        self.runs.steps.append(steps_then - steps)
        self.runs.beside.append(1 - (seconds_then - seconds) / run.seconds)

    async def open(self, work: list[Ask], label: str) -> None:
        """The open loop."""
        self.runs.opened.append(await open_loop(self.client, work, None, label))


async def measure(
    servers: Sequence[Launched],
    runs: Sequence[Runs],
    concurrency: int,
    requests: int,
    seeds: Sequence[int],
    with_open: bool,
) -> None:
    """The closed loop on both, then the open loop on both; who goes first alternates."""
    async with open_session(None, 600) as session:
        sides = [Side(server, Server(session, server.url), into) for server, into in zip(servers, runs, strict=True)]
        for side in sides:
            await side.warm_up(concurrency)
        for seed in seeds:
            for side in sides if seed % 2 == 0 else sides[::-1]:
                await side.close(asks(concurrency, requests, seed, None), concurrency, f"closed loop, round {seed + 1}")
        rate = LOAD * statistics.median(summarise([run]).requests_per_s for run in runs[0].closed)
        for seed in seeds if with_open else ():
            for side in sides if seed % 2 == 0 else sides[::-1]:
                await side.open(asks(concurrency, requests, 5_000 + seed, rate), f"open loop, round {seed + 1}")


@contextmanager
def launched(shape: str, launch: int, flags: Sequence[str]) -> Iterator[list[Launched]]:
    """The server with one step in flight and that with two; every other time the second is started first."""
    directory = scratch() / f"bench-{shape}"
    model = make_model(SHAPES[shape], directory / "model")
    adapter = make_adapter(SHAPES[shape], directory / "r16", 16)
    common = ["--model-path", model, "--dtype", "float32", "--lora-paths", f"a={adapter}", *flags]
    servers = [Launched(*common, ONE), Launched(*common)]
    with ExitStack() as stack:
        for server in servers if launch % 2 == 0 else servers[::-1]:
            stack.enter_context(server)
        yield servers


def bench(shape: str, args: argparse.Namespace) -> list[Point]:
    """Every concurrency at each launch: a line of each, and in the end one of all."""
    found = {concurrency: (Runs(), Runs()) for concurrency in args.concurrency}
    for launch in range(args.launches):
        seeds = range(launch * args.rounds, (launch + 1) * args.rounds)
        with launched(shape, launch, args.flags) as servers:
            for concurrency, runs in found.items():
                count = max(LEAST, concurrency * (args.requests or REQUESTS.get(shape, 2)))
                asyncio.run(measure(servers, runs, concurrency, count, seeds, not args.closed_only))
                last = (part.since(launch * args.rounds) for part in runs)
                print(point(shape, concurrency, *last).line(str(launch + 1)), flush=True)
    points = [point(shape, concurrency, *runs) for concurrency, runs in found.items()]
    for one in points:
        print(one.line("all"), flush=True)
    return points


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=["tiny", "0.5b"])
    add("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    add("--launches", type=int, default=2, help="how often both servers are started anew")
    add("--rounds", type=int, default=3, help="at each launch")
    add("--requests", type=int, help="of each client in a round (2; 20 with the tiny shape); four in all at least")
    add("--closed-only", action="store_true", help="no open loop: it takes two thirds of the time")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for both servers; stands last")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    args = top.parse_args(argv)
    print(HEAD)
    found = [point for shape in args.shapes for point in bench(shape, args)]
    if args.json:
        plain = [{**vars(point), "later": point.later} for point in found]
        args.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
