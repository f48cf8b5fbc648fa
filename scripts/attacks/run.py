"""One attack: a calm, then the attackers beside the victim, then what is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from pathlib import Path

import msgspec
from tqdm import tqdm

from attacks.processes import PROCESSES, children, memory
from attacks.report import Report
from attacks.rounds import Orders, Round
from attacks.server import AttackedServer
from attacks.victim import Victim, Watch, make_requests, poll_health

CALM_SHARE, MOST_CALM = 0.2, 60.0
SETTLE_SECONDS = 60.0
SCRIPTS = Path(__file__).resolve().parents[1]


class Attack:
    """One run against one server. `seconds` are those of the calm and the attack together."""

    def __init__(
        self, server: AttackedServer, kinds: list[str], seed: int, seconds: float, at_once: int, faults: bool
    ) -> None:
        self._server, self._seed = server, seed
        self._calm = min(MOST_CALM, CALM_SHARE * seconds)
        self._orders = Orders(
            config=server.config, kinds=kinds, seed=seed, seconds=seconds - self._calm, at_once=at_once
        )
        self._report = Report(faults=faults, calm=Watch())
        self._victim = Victim(
            server.launched.url, server.victim_key, make_requests(random.Random(seed)), may_lose=faults
        )
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Runs the calm and the attack."""
        report = self._report
        with tqdm(total=round(self._calm + self._orders.seconds), unit="s", desc="calm") as bar:
            ticking = asyncio.ensure_future(self._tick(bar))
            warm = await self._victim.run(time.monotonic())  # learns the tokens, and warms caches up
            report.calm, report.calm_memory, report.calm_health = await self._phase(self._calm)
            report.calm.differences[:0] = warm.differences
            bar.set_description("attack")
            attackers = asyncio.ensure_future(self._attack())
            report.attacked, report.attacked_memory, report.attacked_health = await self._phase(self._orders.seconds)
            await attackers
            ticking.cancel()
        await self._look_after()

    def finish(self, log: str, exit_status: int | None) -> Report:
        """Enters what the log and the exit status say, and returns the report."""
        self._report.restarts = log.count("serves again")
        self._report.tracebacks = log.count("Traceback (most recent call last)")
        self._report.exit_status = exit_status
        return self._report

    async def _phase(self, seconds: float) -> tuple[Watch, int, float]:
        """Runs the victim; returns what it saw, the most memory, and the longest answer of /health."""
        until = time.monotonic() + seconds
        health: list[float] = []
        polling = asyncio.ensure_future(poll_health(self._server.launched.url, until, health))
        measuring = asyncio.ensure_future(self._most_memory(until))
        watch = await self._victim.run(until)
        await polling
        return watch, await measuring, max(health, default=0.0)

    async def _most_memory(self, until: float) -> int:
        most = 0
        while time.monotonic() < until:
            most = max(most, await asyncio.to_thread(memory, self._server.pid))
            await asyncio.sleep(1.0)
        return most

    async def _attack(self) -> None:
        """Starts the attackers, and enters their rounds."""
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), str(SCRIPTS.parent / "tests")])
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "attacks.rounds", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True, limit=1 << 24,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(msgspec.json.encode(self._orders) + b"\n")
        child.stdin.close()
        open_rounds: dict[tuple[str, float], Round] = {}
        async for line in child.stdout:
            one = msgspec.json.decode(line, type=Round)
            if one.ended is None:
                open_rounds[one.kind, one.began] = one
            else:
                del open_rounds[one.kind, one.began]
                self._report.rounds.append(one)
        if await child.wait() or open_rounds:
            names = ", ".join(name for name, _ in open_rounds)
            self._report.others.append(
                f"the attackers ended with status {child.returncode} during {names or 'nothing'}"
            )

    async def _tick(self, bar: tqdm[None]) -> None:
        """Moves the progress bar."""
        began = time.monotonic()
        while True:
            bar.update(min(round(time.monotonic() - began), bar.total) - bar.n)
            broken = sum(bool(one.broken) for one in self._report.rounds)
            bar.set_postfix(rounds=len(self._report.rounds), broken=broken)
            await asyncio.sleep(1.0)

    async def _look_after(self) -> None:
        """Checks that the idle engine runs all its processes and comes to rest."""
        await asyncio.sleep(2.0)
        found = children(self._server.pid)
        if set(found) != set(PROCESSES):
            self._report.others.append(f"the processes are {sorted(found)}")
