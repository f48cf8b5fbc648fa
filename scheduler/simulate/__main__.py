"""The command line: `python -m scheduler.simulate trace.jsonl --profile measured.json`.

A flag takes one value or a list (8,32,64); all combinations are simulated and shown side by side in one table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
from tqdm import tqdm

from engine.errors import ConfigError, EngineError
from scheduler.simulate import profile, trace
from scheduler.simulate.experiment import RULES, Experiment, Setup
from scheduler.simulate.fleet import ROUTERS
from scheduler.simulate.results import plot, report
from scheduler.simulate.results.report import Summary
from scheduler.simulate.results.request_log import RequestLog

POLICIES = ("fcfs", "priority", "fair")
PROFILES = Path(__file__).parent / "profiles"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if set(found) - set(allowed):
            raise argparse.ArgumentTypeError(f"{text}: one or several of {', '.join(allowed)}")
        return found

    return names


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    found = _Parser(prog="python -m scheduler.simulate", description=__doc__, allow_abbrev=False)
    add = found.add_argument
    add("trace", type=Path, help="a file that scripts/make_trace.py wrote, or your own")
    add("--profile", type=Path, default=PROFILES / "cpu-0.5b.json", help="what things cost (%(default)s)")
    add("--max-loras-per-batch", "--max-loras", type=_numbers, default=[8], metavar="N,..", help="lanes (8)")
    add("--lora-pool-size", type=_numbers, metavar="N,..", help="adapters of the largest rank (as many as lanes)")
    add("--rule", type=_names(RULES), default=["chorus"], metavar="R,..", help=f"{', '.join(RULES)} (chorus)")
    add("--window", type=_numbers, default=[1], metavar="N,..", help="steps in flight (1)")
    add("--lora-max-wait", type=float, default=5.0, metavar="S", help="chorus: a request is passed for no longer (5 s)")
    add(
        "--schedule-policy",
        type=_names(POLICIES),
        default=["fcfs"],
        metavar="P,..",
        help="chorus: fcfs, priority, fair (fcfs)",
    )
    add("--drain-after", type=float, default=1.0, metavar="S", help="drain: an adapter starves after so long (1 s)")
    add("--max-running-requests", "--max-num-seqs", type=int, metavar="N", help="rows (the profile's)")
    add("--max-num-batched-tokens", "--chunked-prefill-size", type=int, metavar="N", help="(the profile's)")
    add("--max-total-tokens", type=int, metavar="N", help="tokens of KV cache (the profile's)")
    add("--max-loaded-loras", "--max-cpu-loras", type=int, metavar="N", help="adapters on the host (no limit)")
    add("--lora-ranks", type=_numbers, metavar="R,..", help="LoRA ranks, assigned by adapter name (the profile's)")
    add("--replicas", type=int, default=1, metavar="N", help="machines (1)")
    add("--router", choices=ROUTERS, default="hash", help="an adapter's one replica, its two, or any (hash)")
    add(
        "--start",
        choices=["warm", "cold"],
        default="warm",
        help="load adapters before time 0, or at their first request (warm)",
    )
    add("--load", type=float, metavar="F", help="rescale arrivals to this share of the configuration's own capacity")
    add("--rate", type=float, metavar="R", help="rescale arrivals to so many requests a second")
    add("--hot", type=int, metavar="N", help="the busiest N adapters are hot (those that get half of the requests)")
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    add("--plot", type=Path, metavar="FILE.png", help="draw them; needs matplotlib")
    return found


def setups(args: argparse.Namespace) -> list[Setup]:
    """Returns a setup for each combination of the flags; the default pool holds as many adapters as there are lanes."""
    same = Setup(
        max_loaded=args.max_loaded_loras,
        replicas=args.replicas,
        router=args.router,
        warm=args.start == "warm",
        drain_after=args.drain_after,
        max_wait=args.lora_max_wait,
    )
    return [
        dataclasses.replace(same, rule=rule, policy=policy, max_loras=lanes, pool=pool, window=window)
        for rule, policy, lanes, window in itertools.product(
            args.rule, args.schedule_policy, args.max_loras_per_batch, args.window
        )
        for pool in args.lora_pool_size or [lanes]
    ]


def read_profile(args: argparse.Namespace) -> profile.Profile:
    """Reads the profile and applies the flags that override its limits and LoRA ranks."""
    found = profile.read(args.profile)
    limits = {
        "rows": args.max_running_requests,
        "max_batched_tokens": args.max_num_batched_tokens,
        "kv_tokens": args.max_total_tokens,
    }
    changed = {name: value for name, value in limits.items() if value is not None}
    for name, value in changed.items():
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    found = msgspec.structs.replace(found, room=msgspec.structs.replace(found.room, **changed))
    if args.lora_ranks:
        largest = max(found.room.max_lora_rank, *args.lora_ranks)
        room = msgspec.structs.replace(found.room, max_lora_rank=largest)
        found = msgspec.structs.replace(found, lora_ranks=args.lora_ranks, room=room)
    return found


def run(args: argparse.Namespace) -> list[tuple[str, Setup, Summary, RequestLog]]:
    """Simulates all configurations, one after the other. Returns a label, the setup and the results of each."""
    costs, requests = read_profile(args), trace.read(args.trace)
    for value, flag in ((args.load, "--load"), (args.rate, "--rate"), (args.replicas, "--replicas")):
        if value is not None and value <= 0:
            raise ConfigError(f"{flag} {value}: must be above 0")
    if args.rate is not None:
        requests = trace.rescale(requests, args.rate)
    plans = setups(args)
    total = len(requests) * len(plans) * (2 if args.load else 1)
    results = []
    with tqdm(total=total, unit="req", leave=False, disable=None) as bar:
        for setup in plans:
            label = setup.label + (f" w{setup.window}" if len(args.window) > 1 else "")
            bar.set_description(label)
            summary, log = Experiment(setup, costs, bar.update).run(requests, args.hot, args.load)
            results.append((label, setup, summary, log))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and returns 0; for a wrong flag or file, prints one line and returns 2."""
    try:
        args = parser().parse_args(argv)
        runs = run(args)
        print(report.table([(label, summary) for label, _, summary, _ in runs]))
        print("columns: rule, adapters in a step / adapters in the pool; times in seconds")
        if args.json:
            rows = [{"label": label, "setup": setup, "summary": summary} for label, setup, summary, _ in runs]
            args.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")
        if args.plot:
            hot = trace.hot_adapters([timeline.request for timeline in runs[0][3].timelines.values()], args.hot)
            plot.draw(args.plot, [(label, summary, log, hot) for label, _, summary, log in runs])
    except EngineError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
