"""The attackers: a child process that makes rounds of the chosen kinds, some at once, and reports each on stdout.

    python -m attacks.rounds     a JSON line of Orders on stdin; one JSON line of Round for each beginning and end

It runs at the lowest priority, and its session too where the kernel groups processes by session: on few cores the gaps
of the victim then measure the server and not the attackers' own work.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator

import aiohttp
import msgspec

from attacks import kinds as _kinds  # registers all kinds
from attacks.kind import KINDS, Broken, Kind, Skipped
from attacks.target import SOURCE, Config, Target

assert _kinds

GRACE_SECONDS = 30.0
"""How long a round may go on after the end of the attack."""


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What to attack, with which kinds, for how long, and how many at once."""

    config: Config
    kinds: list[str]
    seed: int
    seconds: float
    at_once: int
    nice: int


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a round, or with `ended` its end. Times are of `time.monotonic`."""

    kind: str
    began: float
    ended: float | None = None
    statuses: dict[str, int] = {}
    broken: str = ""
    skipped: str = ""


def in_turn(orders: Orders) -> Iterator[tuple[int, Kind]]:
    """Yields the number and the kind of each round: all kinds in a random order, again and again."""
    draw = random.Random(orders.seed)
    number = 0
    while True:
        for name in draw.sample(orders.kinds, len(orders.kinds)):
            yield number, KINDS[name]
            number += 1


def report(one: Round) -> None:
    """Writes a line to stdout."""
    sys.stdout.buffer.write(msgspec.json.encode(one) + b"\n")
    sys.stdout.buffer.flush()


async def one_round(orders: Orders, number: int, kind: Kind) -> None:
    """Makes one round and reports it."""
    began = time.monotonic()
    report(Round(kind=kind.name, began=began))
    broken = skipped = ""
    connector = aiohttp.TCPConnector(limit=0, force_close=True, local_addr=(SOURCE, 0))
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20) as session:
        target = Target(orders.config, session)
        try:
            async with asyncio.timeout(kind.seconds):
                await kind.one_round(target, random.Random(f"{orders.seed} {number}"))
        except Broken as error:
            broken = str(error)
        except Skipped as error:
            skipped = str(error)
        except TimeoutError:
            broken = f"a round is not over after {kind.seconds:.0f} s"
        except OSError as error:
            target.statuses["cut"] += 1
            if not isinstance(error, ConnectionError):
                broken = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            skipped = "cut short by the end of the run"
        except Exception as error:  # a fault of the attack itself must not pass for a kept promise
            broken = f"the attack failed: {type(error).__name__}: {error}"
    statuses, ended = dict(target.statuses), time.monotonic()
    report(Round(kind=kind.name, began=began, ended=ended, statuses=statuses, broken=broken, skipped=skipped))


async def run(orders: Orders) -> None:
    """Makes rounds until the time is over; those in progress then have GRACE_SECONDS to end."""
    ends, turns = time.monotonic() + orders.seconds, in_turn(orders)

    async def worker() -> None:
        while time.monotonic() < ends:
            await one_round(orders, *next(turns))

    workers = [asyncio.ensure_future(worker()) for _ in range(orders.at_once)]
    _, late = await asyncio.wait(workers, timeout=orders.seconds + GRACE_SECONDS)
    for each in late:
        each.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


def lower_priority(nice: int) -> None:
    """Lowers the priority of this process, and of its session where the kernel groups processes by session."""
    os.nice(nice)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
        file.write(str(nice))


def main() -> None:
    """Reads the orders and carries them out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=Orders)
    lower_priority(orders.nice)
    asyncio.run(run(orders))


if __name__ == "__main__":
    main()
