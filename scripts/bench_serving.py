"""Measures an OpenAI-compatible server: latency percentiles and throughput under a seeded random workload.

    python scripts/bench_serving.py --concurrency 16 --adapters round-robin
    python scripts/bench_serving.py --request-rate 8 --burstiness 0.5 --input-len 64:512 --json result.json
    python scripts/bench_serving.py --url http://127.0.0.1:30000 --compare http://127.0.0.1:30001 --repeat 5

Prompts are random token ids sent to /v1/completions as a stream (as text when --tokenizer is given), with ignore_eos.
A closed loop keeps --concurrency requests in flight; --request-rate makes it an open loop, whose times run from when a
request was due. Two servers are measured in turn on the same workload and compared round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
from bench.client import Server, open_session
from bench.loops import Run, closed_loop, open_loop
from bench.report import adapter_table, by_adapter, plain, ratio_table, ratios, summarise, table
from bench.workload import DISTRIBUTIONS, Lengths, Plan


def lengths(text: str) -> Lengths:
    """Parses lengths; a type for argparse."""
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def id_range(text: str) -> tuple[int, int]:
    """Parses LOW:HIGH, both included; a type for argparse."""
    low, _, high = text.partition(":")
    try:
        span = int(low), int(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH") from None
    if not 0 <= span[0] <= span[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of token ids")
    return span


def positive(text: str) -> float:
    """Parses a number above zero; a type for argparse."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return value


def count(text: str) -> int:
    """Parses a whole number of at least one; a type for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return value


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the script's flags."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = top.add_argument_group("the server")
    where.add_argument("--url", default="http://127.0.0.1:30000")
    where.add_argument("--compare", metavar="URL2", help="a second server, measured in turns with the first")
    where.add_argument("--model", help="the base's name (default: the first card of /v1/models without a parent)")
    where.add_argument("--api-key")
    where.add_argument("--timeout", type=positive, default=600.0, help="seconds for one request")
    load = top.add_argument_group("the load")
    load.add_argument("--num-requests", "--num-prompts", type=count, default=100)
    load.add_argument("--concurrency", type=count, help="in flight at once (closed loop: 8; open loop: no limit)")
    load.add_argument("--request-rate", type=positive, help="arrivals a second: an open loop")
    load.add_argument("--burstiness", type=positive, default=1.0, help="gamma shape of the gaps; 1 = Poisson")
    load.add_argument("--warmup", type=int, default=8, help="requests before the clock starts")
    load.add_argument("--repeat", type=count, default=1, help="rounds, each with fresh prompts")
    load.add_argument("--seed", type=int, default=0)
    text = top.add_argument_group("the prompts")
    text.add_argument("--input-len", type=lengths, default=Lengths(128, 128), metavar="N|LOW:HIGH")
    text.add_argument("--output-len", type=lengths, default=Lengths(64, 64), metavar="N|LOW:HIGH")
    text.add_argument("--token-ids", type=id_range, default=(100, 999), metavar="LOW:HIGH", help="ids to draw from")
    text.add_argument("--tokenizer", type=Path, help="a tokenizer.json (or its folder): send text instead of ids")
    lora = top.add_argument_group("the adapters")
    lora.add_argument("--adapters", choices=DISTRIBUTIONS, default="none")
    lora.add_argument("--adapter-names", type=lambda names: [n for n in names.split(",") if n], metavar="A,B,C")
    lora.add_argument("--alpha", type=positive, default=1.0, help="power-law: the k-th adapter has weight k^-alpha")
    lora.add_argument("--adapter-field", choices=("model", "lora_path", "both"), default="model")
    lora.add_argument("--per-adapter", action="store_true", help="a line for each adapter")
    top.add_argument("--json", type=Path, metavar="FILE", help="write flags and results there")
    return top


def make_plan(args: argparse.Namespace, adapters: Sequence[str]) -> Plan:
    """Returns the workload that the flags describe."""
    return Plan(
        count=args.num_requests,
        input_len=args.input_len,
        output_len=args.output_len,
        token_ids=args.token_ids,
        adapters=tuple(adapters),
        distribution=args.adapters,
        alpha=args.alpha,
        rate=args.request_rate,
        burstiness=args.burstiness,
    )


def decoder(path: Path | None) -> Callable[[Sequence[int]], str] | None:
    """Returns a function from token ids to text that uses the tokenizer at `path`; None if `path` is None."""
    if path is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    return lambda ids: tokenizer.decode(list(ids))


async def one_run(server: Server, plan: Plan, args: argparse.Namespace, seed: int, label: str) -> Run:
    """Measures one round on one server."""
    requests = plan.requests(seed)
    if plan.rate is None:
        return await closed_loop(server, requests, args.concurrency or 8, label)
    return await open_loop(server, requests, args.concurrency, label)


async def warm_up(server: Server, plan: Plan, args: argparse.Namespace) -> None:
    """Sends requests like those of `plan`, which are not measured."""
    if args.warmup < 1:
        return
    warm = replace(plan, count=args.warmup, rate=None)
    await closed_loop(server, warm.requests(args.seed - 1), args.concurrency or 8, f"warm-up {server.url}")


async def measure(args: argparse.Namespace) -> dict[str, list[Run]]:
    """Returns the runs of each server, by URL. The server that goes first alternates by round."""
    async with open_session(args.api_key, args.timeout) as session:
        urls = [args.url, args.compare] if args.compare else [args.url]
        decode = decoder(args.tokenizer)
        servers = [Server(session, url, args.model, args.adapter_field, decode) for url in urls]
        found = [await server.discover() for server in servers]
        plan = make_plan(args, args.adapter_names or found[0])
        for server in servers:
            await warm_up(server, plan, args)
        runs: dict[str, list[Run]] = {url: [] for url in urls}
        for turn in range(args.repeat):
            order = list(zip(urls, servers, strict=True))
            for url, server in order if turn % 2 == 0 else reversed(order):
                label = f"round {turn + 1}/{args.repeat} {url}"
                runs[url].append(await one_run(server, plan, args, args.seed + turn, label))
    return runs


def report(args: argparse.Namespace, runs: dict[str, list[Run]]) -> dict[str, object]:
    """Prints the results; returns what --json writes."""
    servers: dict[str, object] = {}
    for url, some in runs.items():
        summary = summarise(some)
        servers[url] = {"all": plain(summary)}
        print(f"\n{url}\n{table(summary)}")
        if args.per_adapter:
            parts = by_adapter(some)
            servers[url] = {"all": plain(summary), "by_adapter": {name: plain(part) for name, part in parts.items()}}
            print(adapter_table(parts))
    flags = {name: str(value) for name, value in vars(args).items() if name != "api_key" and value is not None}
    result: dict[str, object] = {"flags": flags, "servers": servers}
    if args.compare:
        measured = ratios(runs[args.url], runs[args.compare])
        result["second_over_first"] = measured
        print(f"\n{ratio_table(measured)}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes. Exit status 1 if no request succeeded or the server cannot be reached."""
    top = parser()
    args = top.parse_args(argv)
    if args.compare == args.url:
        top.error("--compare needs another URL than --url")
    try:
        runs = asyncio.run(measure(args))
    except aiohttp.ClientError as error:
        print(f"cannot reach the server: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        top.error(str(error))
    result = report(args, runs)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(any(s.error is None for run in some for s in run.samples) for some in runs.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
