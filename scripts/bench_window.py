"""Compares two steps in flight with one on this machine: throughput and time to first token on one workload.

    python scripts/bench_window.py                                a short step and a long one, about an hour
    python scripts/bench_window.py --shapes tiny --launches 4 --rounds 3
    python scripts/bench_window.py --shapes 0.5b --concurrency 32 --closed-only

Both servers run at the same time and are measured in turns, round by round. Of two equal servers one may stay some
percent faster because of where its memory lies, so both are launched several times, and which is launched first
alternates. Rates come from a closed loop; the time to the first token from an open loop (Poisson) at a share of the
closed loop's rate, so that requests arrive at any point of a step. `later` is how much later the first token comes with
two steps in flight, in steps (gaps between tokens, p50). `beside` is the share of a closed loop's time in which the
runner computed no step: the most that a second step in flight can gain. `steps 2/1` is the ratio of the steps taken.
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
from bench.launched_server import LaunchedServer, scratch
from bench.loops import Run, closed_loop, open_loop
from bench.report import Summary, ratios, summarise
from bench.shapes import SHAPES, make_adapter, make_model
from bench.workload import Lengths, Plan, Request

ONE = "--disable-overlap-schedule"
LOAD = 0.6  # the open loop's rate, as a share of the closed loop's rate
REQUESTS = {"tiny": 20}  # requests of each client in a round (2 for other shapes): runs below a second are too noisy
LEAST = 4  # the fewest requests in a round
TOLD_SECONDS = 1.5  # longer than the second between two updates of the metrics


@dataclass
class Runs:
    """The results of one server, round by round.

    `steps` is the number of steps in each closed run, `beside` the share of its seconds in which no step was computed.
    """

    closed: list[Run] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    opened: list[Run] = field(default_factory=list)

    def since(self, rounds: int) -> Runs:
        """Returns the runs without the first `rounds` rounds."""
        return Runs(self.closed[rounds:], self.steps[rounds:], self.beside[rounds:], self.opened[rounds:])


@dataclass(frozen=True)
class Point:
    """The results at one shape and concurrency. Pairs are (one step in flight, two); ratios are two over one."""

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
        """How much later the first token comes with two steps in flight, in steps."""
        return (self.ttft_ms[1] - self.ttft_ms[0]) / self.step_ms if self.ttft_ms else None

    def line(self, launch: str) -> str:
        """Returns a line of the table."""
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
    """Computes the figures of one shape and concurrency from the same rounds on both servers."""
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


def make_requests(concurrency: int, requests: int, seed: int, rate: float | None) -> list[Request]:
    """Random prompts for the base and one adapter, different at every concurrency."""
    plan = Plan(requests, Lengths(16, 96), Lengths(24, 40), (300, 900), ("a", "chorus"), "round-robin", 1.0, rate, 1.0)
    found = plan.requests(10_000 * concurrency + seed)
    return [
        request if request.adapter == "a" else Request(request.prompt, request.output_len, None, request.due)
        for request in found
    ]


async def computed(server: LaunchedServer) -> tuple[float, float]:
    """Returns (steps, seconds in steps) of a server so far, once they stop changing. No request may run meanwhile."""
    last = -1.0
    while (steps := server.metric("chorus:step_seconds_count")) != last:
        last = steps
        await asyncio.sleep(TOLD_SECONDS)
    return steps, server.metric("chorus:step_seconds_sum")


@dataclass(frozen=True)
class Side:
    """One of the two launched servers, and its runs."""

    server: LaunchedServer
    client: Server
    runs: Runs

    async def warm_up(self, concurrency: int) -> None:
        """Sends one request per client, so that everything is compiled and allocated."""
        await self.client.discover()
        await closed_loop(self.client, make_requests(concurrency, concurrency, 9_999, None), concurrency, "warm-up")

    async def close(self, work: list[Request], concurrency: int, label: str) -> None:
        """Measures a closed loop over the requests in `work`."""
        steps, seconds = await computed(self.server)
        run = await closed_loop(self.client, work, concurrency, label)
        steps_then, seconds_then = await computed(self.server)
        self.runs.closed.append(run)
        self.runs.steps.append(steps_then - steps)
        self.runs.beside.append(1 - (seconds_then - seconds) / run.seconds)

    async def open(self, work: list[Request], label: str) -> None:
        """Measures an open loop over the requests in `work`."""
        self.runs.opened.append(await open_loop(self.client, work, None, label))


async def measure(
    servers: Sequence[LaunchedServer],
    runs: Sequence[Runs],
    concurrency: int,
    requests: int,
    seeds: Sequence[int],
    with_open: bool,
) -> None:
    """Measures the closed loop on both servers, then the open loop on both; the server that is first alternates."""
    async with open_session(None, 600) as session:
        sides = [Side(server, Server(session, server.url), into) for server, into in zip(servers, runs, strict=True)]
        for side in sides:
            await side.warm_up(concurrency)
        for seed in seeds:
            for side in sides if seed % 2 == 0 else sides[::-1]:
                await side.close(
                    make_requests(concurrency, requests, seed, None), concurrency, f"closed loop, round {seed + 1}"
                )
        rate = LOAD * statistics.median(summarise([run]).requests_per_s for run in runs[0].closed)
        for seed in seeds if with_open else ():
            for side in sides if seed % 2 == 0 else sides[::-1]:
                await side.open(
                    make_requests(concurrency, requests, 5_000 + seed, rate), f"open loop, round {seed + 1}"
                )


@contextmanager
def launched(shape: str, launch: int, flags: Sequence[str]) -> Iterator[list[LaunchedServer]]:
    """Starts the servers with one step and with two in flight. The one that starts first alternates by launch."""
    directory = scratch() / f"bench-{shape}"
    model = make_model(SHAPES[shape], directory / "model")
    adapter = make_adapter(SHAPES[shape], directory / "r16", 16)
    common = ["--model-path", model, "--dtype", "float32", "--lora-paths", f"a={adapter}", *flags]
    servers = [LaunchedServer(*common, ONE), LaunchedServer(*common)]
    with ExitStack() as stack:
        for server in servers if launch % 2 == 0 else servers[::-1]:
            stack.enter_context(server)
        yield servers


def bench(shape: str, args: argparse.Namespace) -> list[Point]:
    """Measures every concurrency at each launch. Prints a line for each launch, then one for all launches."""
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
    """Measures all shapes, prints the table and writes the results."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=["tiny", "0.5b"])
    add("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    add("--launches", type=int, default=2, help="how often both servers are launched")
    add("--rounds", type=int, default=3, help="rounds at each launch")
    add(
        "--requests",
        type=int,
        help="requests of each client in a round (2; 20 with the tiny shape); at least four in all",
    )
    add("--closed-only", action="store_true", help="no open loop, which takes two thirds of the time")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for both servers; must be last")
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
