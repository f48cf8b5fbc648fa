"""Runs everything at once against one server: all outputs must equal undisturbed ones, and nothing may leak.

python scripts/soak.py                    two minutes on the bundled demo, float32
python scripts/soak.py --minutes 30       a long run
python scripts/soak.py --seed 7           another order of events; one seed gives the same requests and signals

Traffic     greedy and seeded, base, adapters and mixes, streamed and not; some clients disconnect early
Adapters    the name `guest` is loaded, re-pointed and unloaded all the time; it refers to two adapters in turn
Floods      hundreds of requests at once against a limit of 128: 200 or 503, nothing else
Readers     slow clients that request megabytes and never read: they are disconnected, other requests are not delayed
Strikes     SIGKILL and SIGSTOP of any of the three processes, after the engine has recovered from the last one
At the end  no request runs, no page is held, the scheduler's audits passed, and memory, descriptors and processes are
            as before

Exit status 1 on any difference. A stream that was lost with a killed tokenizer process is counted, not compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from bench.launched_server import LaunchedServer
from bench.soak_requests import ADAPTERS, GUEST, SoakRequest, make_requests
from tqdm import tqdm
from yarl import URL

DEMO = Path(__file__).resolve().parents[1] / "engine" / "demo"
PROCESSES = ("model_runner", "scheduler", "tokenizer_proc")
MAX_OPEN, FLOOD = 128, 300
SLOW_READERS = 4
SLOW_READER_BODY = {
    "input_ids": [8, 9, 10], "stream": True, "return_logprob": True, "top_logprobs_num": 20,
    "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
}  # fmt: skip
"""A request whose cumulative events are larger in total than the kernel's buffers for a connection."""

HANG_SECONDS = 90.0


class Refused(Exception):
    """A response with a status other than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:200]}")
        self.status = status


async def read_tokens(
    session: aiohttp.ClientSession, request: SoakRequest, lora: Any, leave_after: int | None = None
) -> list[int]:
    """Returns the tokens; `leave_after` of them end the reading. Raises ValueError if a sent token changes."""
    seen: list[int] = []
    async with session.post("/generate", json=request.body(lora)) as response:
        if response.status != 200:
            raise Refused(response.status, await response.text())
        if not request.stream:
            return list((await response.json())["output_ids"])
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                raise Refused(500, str(event))
            tokens = event["output_ids"]
            if tokens[: len(seen)] != seen:
                raise ValueError("a token that was sent has changed")
            seen = tokens
            if leave_after is not None and len(seen) >= leave_after:
                break
    return seen


def children(pid: int) -> dict[str, int]:
    """Returns the process ids of the engine's running processes, by module."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            found |= {name: int(child) for name in PROCESSES if name.encode() in words}
    return found


def resources(pid: int) -> tuple[int, int]:
    """Returns (open descriptors, private resident bytes) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return len(os.listdir(f"/proc/{pid}/fd")), int(status.split("RssAnon:")[1].split()[0]) << 10


@dataclass
class Soak:
    """One run of the soak against one server."""

    server: LaunchedServer
    requests: list[SoakRequest]
    seed: int
    seconds: float
    clients: int
    strike: bool
    undisturbed: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    tokenizers_lost: int = 0  # number of signalled tokenizer processes; their connections are lost
    ends: float = 0.0

    def session(self) -> aiohttp.ClientSession:
        """Opens an HTTP session with the server."""
        timeout = aiohttp.ClientTimeout(total=HANG_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        return aiohttp.ClientSession(self.server.url, timeout=timeout, connector=connector)

    async def run(self) -> None:
        """Collects undisturbed outputs, then runs everything at once."""
        await self.learn()
        before = {name: resources(pid) for name, pid in children(self.server.process.pid).items()}
        launcher = resources(self.server.process.pid)
        self.ends = time.monotonic() + self.seconds
        work: list[Awaitable[None]] = [self.client(random.Random(f"{self.seed} {n}")) for n in range(self.clients)]
        work += [self.guest(), self.flood(), self.slow_readers(), self.clock()]
        if self.strike:
            work.append(self.striker(random.Random(f"{self.seed} strikes")))
        await asyncio.gather(*work)
        await self.audit(before, launcher)

    async def learn(self) -> None:
        """Collects the undisturbed outputs, one request at a time."""
        async with self.session() as session:
            for number, request in enumerate(tqdm(self.requests, desc="undisturbed", leave=False)):
                for lora in request.selections:
                    self.undisturbed[number, str(lora)] = await read_tokens(session, request, lora)

    # ----------------------------------------------------------------------------------------------- everything at once

    async def client(self, draw: random.Random) -> None:
        """Sends one request after the other and checks the outputs."""
        async with self.session() as session:
            while time.monotonic() < self.ends:
                await self.one(session, draw)

    async def one(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        """Sends one request and checks its output."""
        number = draw.randrange(len(self.requests))
        request, lost = self.requests[number], self.tokenizers_lost
        leave = draw.randrange(1, 5) if request.stream and draw.random() < 0.1 else None
        try:
            tokens = await read_tokens(session, request, request.lora, leave)
        except Refused as error:
            if error.status == 503 or (request.lora == "guest" and error.status in (400, 404)):
                self.counts["refused"] += 1
                await asyncio.sleep(0.2)
            else:
                self.differ(f"request {number}: {error}")
            return
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            if lost == self.tokenizers_lost or isinstance(error, TimeoutError):
                self.differ(f"request {number}: {type(error).__name__}: {error}")
            self.counts["cut"] += 1
            return
        except (ValueError, KeyError) as error:
            self.differ(f"request {number}: {error}")
            return
        correct = [self.undisturbed[number, str(lora)] for lora in request.selections]
        if not any(tokens == undisturbed[: len(tokens)] for undisturbed in correct) or (
            leave is None and len(tokens) != request.tokens
        ):
            self.differ(f"request {number} ({request.lora}): {tokens} is none of {correct}")
        self.counts["left" if leave else "answered"] += 1
        self.counts["tokens"] += len(tokens)

    async def guest(self) -> None:
        """Loads, re-points and unloads the adapter name `guest`, again and again."""
        async with self.session() as session:
            while time.monotonic() < self.ends:
                for call, fields in (
                    ("/v1/load_lora_adapter", {"lora_path": str(DEMO / "adapters" / GUEST[0]), "load_inplace": True}),
                    ("/v1/load_lora_adapter", {"lora_path": str(DEMO / "adapters" / GUEST[1]), "load_inplace": True}),
                    ("/v1/unload_lora_adapter", {}),
                ):
                    await self.change(session, call, {"lora_name": "guest", **fields})
                    await asyncio.sleep(0.3)

    async def change(self, session: aiohttp.ClientSession, call: str, body: dict[str, Any]) -> None:
        """Makes one adapter call for `guest`. After a tokenizer process has died, the guest may be loaded or not."""
        lost = self.tokenizers_lost
        try:
            async with session.post(call, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            if lost == self.tokenizers_lost or isinstance(error, TimeoutError):
                self.differ(f"{call}: {type(error).__name__}: {error}")
            return
        self.counts["adapter calls"] += 1
        if response.status != 200 and response.status != 503 and not self.tokenizers_lost:
            self.differ(f"{call}: {response.status} {text[:200]}")

    async def flood(self) -> None:
        """From time to time sends far more requests at once than may be open."""
        body = {"input_ids": [8, 9, 10], "sampling_params": {"max_new_tokens": 2}}
        async with self.session() as session:

            async def call() -> None:
                lost = self.tokenizers_lost
                try:
                    async with session.post("/generate", json=body) as response:
                        await response.read()
                except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                    if lost == self.tokenizers_lost or isinstance(error, TimeoutError):
                        self.differ(f"a flood: {type(error).__name__}: {error}")
                    return
                self.counts["flood"] += 1
                if response.status not in (200, 503):
                    self.differ(f"a flood: {response.status}")

            while time.monotonic() < self.ends:
                await asyncio.sleep(min(7.0, self.seconds / 5))
                await asyncio.gather(*(call() for _ in range(FLOOD)))

    async def slow_readers(self) -> None:
        """Groups of clients that send a request and read nothing until they are disconnected."""
        while time.monotonic() < self.ends:
            await asyncio.gather(*(self.slow_reader() for _ in range(SLOW_READERS)))
            await asyncio.sleep(min(5.0, self.seconds / 10))

    async def slow_reader(self) -> None:
        """Runs one client that does not read; the server's log shows when it was disconnected."""
        url, loop, data = URL(self.server.url), asyncio.get_running_loop(), msgspec.json.encode(SLOW_READER_BODY)
        head = f"POST /generate HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            with contextlib.suppress(ConnectionError):  # the process may have been killed
                await loop.sock_connect(client, (url.host, url.port))
                await loop.sock_sendall(client, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                self.counts["slow readers"] += 1
                await asyncio.sleep(min(10.0, max(0.0, self.ends - time.monotonic())))

    async def striker(self, draw: random.Random) -> None:
        """Kills or stops a process, waits until the engine has completed a request again, and repeats."""
        while True:
            await asyncio.sleep(draw.uniform(1.0, 3.0))
            if time.monotonic() > self.ends - self.seconds / 10:
                return
            name, number = draw.choice(PROCESSES), draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
            before = children(self.server.process.pid).get(name)
            if before is None:
                continue
            os.kill(before, number)
            self.tokenizers_lost += name == "tokenizer_proc"
            self.counts[f"{number.name} {name}"] += 1
            if not await self.until(lambda name=name, before=before: self.is_back(name, before)):  # type: ignore[misc]
                self.differ(f"{number.name} of {name}: nothing serves again after {HANG_SECONDS} s")
                return
            answered = self.counts["answered"]
            if not await self.until(lambda answered=answered: self.counts["answered"] > answered):  # type: ignore[misc]
                self.differ(f"{number.name} of {name}: nothing is answered after {HANG_SECONDS} s")
                return

    def is_back(self, name: str, before: int) -> bool:
        """Returns whether the module `name` runs in another process than `before`."""
        return children(self.server.process.pid).get(name, before) != before

    async def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for the condition. Returns False after HANG_SECONDS; returns True at the end of the run."""
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            await asyncio.sleep(0.1)
            if time.monotonic() > self.ends:
                return True
            if time.monotonic() > deadline:
                return False
        return True

    async def clock(self) -> None:
        """Shows the progress bar; ends the run if the engine exits."""
        with tqdm(total=round(self.seconds), unit="s", desc="soak") as bar:
            while (left := self.ends - time.monotonic()) > 0:
                bar.update(round(self.seconds - left) - bar.n)
                bar.set_postfix(answered=self.counts["answered"], differences=len(self.differences))
                if self.server.process.poll() is not None:
                    self.differ(f"the engine ended with status {self.server.process.returncode}")
                    self.ends = 0.0
                await asyncio.sleep(0.5)

    def differ(self, what: str) -> None:
        """Records that `what` differs from what is expected."""
        self.differences.append(what)

    # ----------------------------------------------------------------------------------------------- the end

    async def audit(self, before: dict[str, tuple[int, int]], launcher: tuple[int, int]) -> None:
        """Checks that the idle engine holds no request, page or leaked resource."""
        if self.server.process.poll() is not None:
            return
        stats = await self.idle()
        if any(stats.get(name) for name in ("running", "waiting", "kv_pages_used")) or not stats.get("audits"):
            self.differ(f"not idle, or never audited: {stats}")
        now = children(self.server.process.pid)
        if set(now) != set(PROCESSES):
            self.differ(f"the processes are {sorted(now)}")
        after = {name: resources(pid) for name, pid in now.items()} | {"launcher": resources(self.server.process.pid)}
        for name, (descriptors, memory) in (before | {"launcher": launcher}).items():
            if name in after and (after[name][0] > descriptors + 16 or after[name][1] > memory * 1.5 + (64 << 20)):
                self.differ(f"{name} held {(descriptors, memory)} (descriptors, bytes) before, and {after[name]} after")
        self.counts["cut off"] = self.server.log().count("kind=slow_reader")
        if self.counts["slow readers"] > 5 * SLOW_READERS and not self.counts["cut off"]:
            self.differ("no slow reader was disconnected")
        if "Traceback" in self.server.log() or "audit of the scheduler's tables failed" in self.server.log():
            self.differ(f"the log holds a fault:\n{self.server.log()[-3000:]}")

    async def idle(self) -> dict[str, Any]:
        """Returns the scheduler's stats when it is idle, or after half a minute."""
        stats: dict[str, Any] = {}
        async with self.session() as session:
            for _ in range(60):
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get("/server_info") as response:
                        stats = (await response.json())["stats"]
                    if stats["audits"] and not any(stats[name] for name in ("running", "waiting", "kv_pages_used")):
                        break
                await asyncio.sleep(0.5)
        return stats


def show(soak: Soak) -> None:
    """Prints a short table and the differences."""
    for name, count in sorted(soak.counts.items()):
        print(f"{name:28}{count:>10}")
    print(f"{'differences':28}{len(soak.differences):>10}")
    for line in soak.differences[:20]:
        print(f"  {line}")


def main() -> int:
    """Runs the soak. Exit status 0 without differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=24, help="how many clients send requests at the same time")
    parser.add_argument("--asks", type=int, default=64, help="how many different requests there are")
    parser.add_argument("--no-strikes", action="store_true", help="do not kill or stop processes")
    args = parser.parse_args()
    adapters = [f"{name}={DEMO / 'adapters' / name}" for name in ADAPTERS]
    flags = [
        "--model-path",
        DEMO / "model",
        "--dtype",
        "float32",
        "--max-open-requests",
        MAX_OPEN,
        "--max-stream-buffer",
        "256KiB",
        "--lora-paths",
        *adapters,
    ]
    with LaunchedServer(*flags) as server:
        soak = Soak(
            server, make_requests(args.asks, random.Random(args.seed)), args.seed, args.minutes * 60, args.clients,
            not args.no_strikes,
        )  # fmt: skip
        asyncio.run(soak.run())
    if server.process.returncode != 0:
        soak.differ(f"exit status {server.process.returncode}")
    show(soak)
    return 1 if soak.differences else 0


if __name__ == "__main__":
    sys.exit(main())
