"""Measures the cost of adapters on a CPU against the bytes they add: our server on a generated Llama in bfloat16, and
other servers in turn.

python scripts/bench_cpu.py --concurrency 8 --rounds 3            the 0.5B shape; two to four minutes on two cores
python scripts/bench_cpu.py --parts base mixed idle --shape 1b     only these parts, on a 1B shape
python scripts/bench_cpu.py --peer http://127.0.0.1:8000=vLLM      another OpenAI-compatible server, in turn with ours
python scripts/bench_cpu.py --only-table --plot cpu.png            table and plot of the JSON file
python scripts/bench_cpu.py --list                                 NAME=PATH of the adapters, to start a peer with

Random prompts of 128 tokens, outputs of 64, greedy, ignore_eos, in a closed loop: the base, one adapter, eight of ranks
8/16/64, eight of rank 16, 32 of rank 16, measured in turn, round by round. Results are appended to the JSON file, so
parts may be run one after another. `idle` is the time to first token of a single request beside the linears' time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
from bench.client import Server, open_session
from bench.launched_server import LaunchedServer, scratch
from bench.loops import closed_loop
from bench.report import summarise
from bench.shapes import SHAPES, Shape, make_model
from bench.workload import Lengths, Plan
from cpu.linears import Linears, best
from cpu.loads import LOADS, MAX_RANK, PROMPT, RANKS, TITLES, TOKEN_IDS, adapters, floor
from cpu.plot import draw
from cpu.results import OURS, Entry, Idle, Results, table

IDLE_REQUESTS = 11

SETTLE_SECONDS = 2.0
"""Seconds to wait before each run: threads of the server measured before may spin for more than half a second."""


@dataclass(frozen=True)
class Peer:
    """A server to measure, and the adapters of this benchmark that it has."""

    label: str
    server: Server
    adapters: frozenset[str]

    def can(self, load: str) -> bool:
        return self.adapters.issuperset(LOADS[load].adapters)


async def join(session: aiohttp.ClientSession, url: str, label: str) -> Peer | None:
    """Connects to the server at `url`. Prints one line and returns None if the server does not respond."""
    server = Server(session, url)
    try:
        names = await server.discover()
    except (aiohttp.ClientError, OSError) as error:
        print(f"{label}: no server answers at {url} ({type(error).__name__}); left out")
        return None
    return Peer(label, server, frozenset(names))


@dataclass
class Bench:
    """One run of this script: a shape and the results so far."""

    shape_name: str
    session: int
    results: Results

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    async def run(self, peer: Peer, load: str, concurrency: int, turn: int) -> None:
        """Runs one load on one server. The prompts of a turn are the same for all servers, and new in every turn."""
        requests = LOADS[load].requests(
            concurrency, random.Random(f"{self.session} {load} {concurrency} {turn}").randrange(2**32)
        )
        if turn < 0:  # a warm-up, not recorded
            requests = [replace(request, output_len=8) for request in requests[:concurrency]]
        await asyncio.sleep(SETTLE_SECONDS)
        run = await closed_loop(peer.server, requests, concurrency, f"{peer.label}, {load}, {concurrency}")
        found = summarise([run])
        if found.answered < found.requests or found.short:
            trouble = found.errors or f"{found.short} answers are shorter than requested"
            print(f"{peer.label}, {load}, concurrency {concurrency}: left out: {trouble}")
        elif turn >= 0:
            where = self.session, turn, self.shape_name, peer.label, load, concurrency
            ttft, itl = found.times_ms["TTFT"]["p50"], found.times_ms["ITL"]["p50"]
            share = floor(self.shape, requests, concurrency)
            self.results.entries.append(Entry(*where, found.output_tokens_per_s, share, ttft, itl))

    async def rounds(self, peers: Sequence[Peer], parts: Sequence[str], concurrency: int, count: int) -> None:
        """Runs a warm-up and `count` rounds; the server that is measured first alternates."""
        loads = [part for part in parts if part in LOADS]
        for turn in range(-1, count):
            for load in loads:
                for peer in peers if turn % 2 == 0 else reversed(peers):
                    if peer.can(load):
                        await self.run(peer, load, concurrency, turn)

    async def idle(self, peers: Sequence[Peer]) -> None:
        """Measures single requests for the base, in turn with the linears without a server."""
        linears, passes = Linears(self.shape, PROMPT), []
        ttft: dict[str, list[float]] = {peer.label: [] for peer in peers}
        one = Plan(1, Lengths(PROMPT, PROMPT), Lengths(2, 2), TOKEN_IDS, (), "none", 1.0, None, 1.0)
        for turn in range(-1, IDLE_REQUESTS):
            timed = linears.seconds()
            for peer in peers:
                sample = await peer.server.send(one.requests(self.session + turn)[0], time.perf_counter())
                assert sample.error is None, f"{peer.label}: {sample.error}"
                ttft[peer.label] += sample.pieces[:1] if turn >= 0 else []
            passes += [timed] if turn >= 0 else []
        for label, times in ttft.items():
            figures = statistics.median(times) * 1000, best(passes) * 1000
            self.results.idle.append(Idle(self.session, self.shape_name, label, *figures))


async def measure(bench: Bench, urls: Sequence[tuple[str, str]], args: argparse.Namespace) -> None:
    """Measures all selected parts; writes the results after each."""
    async with open_session(None, 1200) as session:
        found = [await join(session, url, label) for url, label in urls]
        peers = [peer for peer in found if peer]
        for concurrency in args.concurrency:
            await bench.rounds(peers, args.parts, concurrency, args.rounds)
            bench.results.write(args.json)
        if "idle" in args.parts:
            await bench.idle(peers)
            bench.results.write(args.json)


def flags(shape: Shape, directory: Path) -> list[object]:
    """Returns our server's flags: all adapters resident and allowed in one step, kernels compiled before the start."""
    pages = sum(-(-rank // 16) for rank in RANKS.values())
    pool = -(-pages // (MAX_RANK // 16)) + 2  # the pool's size, in adapters of the highest rank
    named = [f"{name}={path}" for name, path in adapters(shape, directory).items()]
    lanes = ["--max-loras-per-batch", 32, "--max-lora-rank", MAX_RANK, "--lora-pool-size", pool]
    return [
        "--model-path",
        make_model(shape, directory / "model"),
        "--dtype",
        "bfloat16",
        "--cpu-kernels",
        "on",
        "--lora-paths",
        *named,
        *lanes,
    ]


def address(text: str) -> tuple[str, str]:
    """Parses `URL` or `URL=LABEL` into (URL, label)."""
    url, _, label = text.partition("=")
    return url, label or url.removeprefix("http://")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the script's flags."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    top.add_argument("--parts", nargs="+", choices=[*LOADS, "idle"], default=[*LOADS, "idle"])
    top.add_argument("--concurrency", nargs="*", type=int, default=[1, 8, 32])
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--peer", type=address, action="append", default=[], metavar="URL[=LABEL]")
    top.add_argument("--no-ours", action="store_true", help="measure only the peers")
    top.add_argument("--label", default=OURS, help="the name of our server in the results")
    top.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=scratch() / "bench-cpu.json",
        help="results are read from it and appended",
    )
    top.add_argument("--plot", type=Path, metavar="FILE", help="write a plot of the results")
    top.add_argument("--only-table", action="store_true", help="measure nothing, print the results")
    top.add_argument("--list", action="store_true", help="print NAME=PATH of each adapter and exit")
    top.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for our server; must be last")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the results, prints the table and draws the plot."""
    args = parser().parse_args(argv)
    shape, directory = SHAPES[args.shape], scratch() / f"bench-{args.shape}"
    if args.list:
        print(" ".join(f"{name}={path}" for name, path in adapters(shape, directory).items()))
        return 0
    bench = Bench(args.shape, int(time.time()), Results.read(args.json))
    if not args.only_table:
        with contextlib.ExitStack() as stack:
            urls = list(args.peer)
            if not args.no_ours:
                urls.insert(
                    0, (stack.enter_context(LaunchedServer(*flags(shape, directory), *args.flags)).url, args.label)
                )
            asyncio.run(measure(bench, urls, args))
    print(table(bench.results, TITLES))
    trouble = draw(args.plot, bench.results, TITLES, args.shape) if args.plot else None
    if trouble:
        print(trouble)
    return 1 if trouble else 0


if __name__ == "__main__":
    raise SystemExit(main())
