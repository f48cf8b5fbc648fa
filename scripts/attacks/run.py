"""One run: a calm, then the attackers beside the victim, then faults besides, then what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from tqdm import tqdm

from attacks.kind import Kind
from attacks.processes import PROCESSES, children, descriptors, memory
from attacks.report import Phase, Report
from attacks.rounds import Orders, Round
from attacks.server import KV_TOKENS, VOICES, AttackedServer
from attacks.victim import Victim, make_requests, poll_health

CALM_SHARE, MOST_CALM = 0.2, 60.0
FAULTS_SHARE = 0.5
"""The share of the attack in which processes are killed besides, if they are."""

IDLE_SECONDS = 60.0
MORE_DESCRIPTORS = 32
"""How many descriptors more a process may hold at the end; the number of open connections varies."""

SHOW_SECONDS = 0.5 if sys.stderr.isatty() else 30.0
SCRIPTS = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.5
BUSY = ("running", "waiting", "kv_pages_used")


def plan(kinds: Sequence[Kind], seconds: float) -> Iterator[tuple[Phase, list[str], float]]:
    """Yields the phases with their kinds and seconds. Faults come last, with all other kinds beside them."""
    calm = min(MOST_CALM, CALM_SHARE * seconds)
    yield Phase("calm"), [], calm
    gentle = [each.name for each in kinds if not each.is_fault]
    faults = [each.name for each in kinds if each.is_fault]
    share = 0.0 if not faults else FAULTS_SHARE if gentle else 1.0
    if gentle:
        yield Phase("attack"), gentle, (seconds - calm) * (1 - share)
    if faults:
        yield Phase("faults"), gentle + faults, (seconds - calm) * share


class Attack:
    """One run against one server. `seconds` are those of all phases together."""

    def __init__(
        self, server: AttackedServer, kinds: Sequence[Kind], *, seed: int, seconds: float, at_once: int, nice: int
    ) -> None:
        self._server, self._seed, self._at_once, self._nice = server, seed, at_once, nice
        self._plan = list(plan(kinds, seconds))
        self._victim = Victim(server.launched.url, server.victim_key, make_requests(random.Random(seed)))
        self.report = Report([])

    async def run(self) -> None:
        """Runs all phases, and looks at what is left behind."""
        await self._start_loaders()
        await self._victim.learn(KV_TOKENS)
        before = self._descriptors()
        with tqdm(total=round(sum(seconds for _, _, seconds in self._plan)), unit="s", mininterval=SHOW_SECONDS) as bar:
            ticking = asyncio.ensure_future(self._tick(bar))
            for phase, kinds, seconds in self._plan:
                self.report.phases.append(phase)
                await self._run_phase(phase, kinds, seconds)
            ticking.cancel()
        if self._server.launched.process.poll() is None:
            await self._look_after(before)

    async def _start_loaders(self) -> None:
        """Loads adapters side by side, so that in the calm all processes run that loads have started."""
        config = self._server.config
        head = {"Authorization": f"Bearer {config.keys['admin']}"}
        async with aiohttp.ClientSession(self._server.launched.url, headers=head) as session:

            async def post(call: str, body: dict[str, str]) -> None:
                async with session.post(call, json=body) as response:
                    response.raise_for_status()

            voices = [Path(config.demo) / "adapters" / voice for voice in VOICES]
            for _ in range(3):
                loads = [{"lora_name": f"warm-{path.name}", "lora_path": str(path)} for path in voices]
                await asyncio.gather(*(post("/load_lora_adapter", body) for body in loads))
                await asyncio.gather(
                    *(post("/unload_lora_adapter", {"lora_name": body["lora_name"]}) for body in loads)
                )

    def finish(self, log: str, exit_status: int | None) -> Report:
        """Enters what the log and the exit status say, and returns the report."""
        if tracebacks := log.count("Traceback (most recent call last)"):
            self.report.others.append(f"the log holds {tracebacks} tracebacks")
        if exit_status:
            self.report.others.append(f"the launch ended with status {exit_status}")
        return self.report

    # ------------------------------------------------------------------------------------------------------- phases

    async def _run_phase(self, phase: Phase, kinds: list[str], seconds: float) -> None:
        """Runs the victim, and the attackers beside it."""
        until, restarts = time.monotonic() + seconds, self._restarts()
        health: list[float] = []
        beside = [poll_health(self._server.launched.url, until, health), self._measure(phase, until)]
        if kinds:
            beside.append(self._attack(phase, kinds, seconds))
        working = [asyncio.ensure_future(each) for each in beside]
        self._victim.may_lose = phase.with_faults
        await self._victim.run(until, phase.watch)
        await asyncio.gather(*working)
        phase.health = max(health, default=0.0)
        phase.restarts = self._restarts() - restarts

    async def _measure(self, phase: Phase, until: float) -> None:
        while time.monotonic() < until:
            size = await asyncio.to_thread(memory, self._server.pid)
            phase.samples.append((time.monotonic(), size))
            await asyncio.sleep(SAMPLE_SECONDS)

    def _restarts(self) -> int:
        return self._server.launched.log().count("serves again")

    async def _attack(self, phase: Phase, kinds: list[str], seconds: float) -> None:
        """Starts the attackers, and enters their rounds."""
        config = msgspec.structs.replace(self._server.config, faults=phase.with_faults)
        orders = Orders(
            config=config, kinds=kinds, seed=self._seed, seconds=seconds, at_once=self._at_once, nice=self._nice
        )
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), str(SCRIPTS.parent / "tests")])
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "attacks.rounds", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True, limit=1 << 24,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(msgspec.json.encode(orders) + b"\n")
        child.stdin.close()
        begun: dict[tuple[str, float], Round] = {}
        async for line in child.stdout:
            one = msgspec.json.decode(line, type=Round)
            if one.ended is None:
                begun[one.kind, one.began] = one
            else:
                del begun[one.kind, one.began]
                phase.rounds.append(one)
        if await child.wait() or begun:
            names = ", ".join(name for name, _ in begun) or "nothing"
            self.report.others.append(f"the attackers ended with status {child.returncode} during {names}")

    async def _tick(self, bar: tqdm[None]) -> None:
        """Moves the progress bar."""
        began = time.monotonic()
        while True:
            bar.set_description(self.report.phases[-1].name if self.report.phases else "", refresh=False)
            rounds = [one for phase in self.report.phases for one in phase.rounds]
            bar.set_postfix(rounds=len(rounds), broken=sum(bool(one.broken) for one in rounds), refresh=False)
            bar.update(min(round(time.monotonic() - began), bar.total) - bar.n)
            await asyncio.sleep(1.0)

    # ------------------------------------------------------------------------------------------------- what is left

    def _descriptors(self) -> dict[str, int]:
        """Returns the number of open descriptors by process."""
        return {name: descriptors(pid) for name, pid in children(self._server.pid).items()} | {
            "launcher": descriptors(self._server.pid)
        }

    async def _look_after(self, before: dict[str, int]) -> None:
        """Checks that the idle engine runs its processes and holds no request, page or descriptor."""
        stats = await self._idle()
        if any(stats.get(name) for name in BUSY) or not stats.get("audits"):
            self.report.others.append(f"the engine is not idle, or was never audited: {stats}")
        after = self._descriptors()
        if set(after) != {*PROCESSES, "launcher"}:
            self.report.others.append(f"the processes are {sorted(after)}")
        self.report.others += [
            f"{name} holds {after[name]} descriptors, and {count} before"
            for name, count in before.items()
            if after.get(name, 0) > count + MORE_DESCRIPTORS
        ]

    async def _idle(self) -> dict[str, Any]:
        """Returns the scheduler's stats when it is idle, or after IDLE_SECONDS."""
        stats: dict[str, Any] = {}
        deadline = time.monotonic() + IDLE_SECONDS
        async with aiohttp.ClientSession(self._server.launched.url) as session:
            while time.monotonic() < deadline:
                for key in (self._server.config.keys["admin"], self._server.victim_key):
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError, KeyError):
                        head = {"Authorization": f"Bearer {key}"}
                        async with asyncio.timeout(10), session.get("/server_info", headers=head) as response:
                            stats = (await response.json())["stats"]
                if stats.get("audits") and not any(stats[name] for name in BUSY):
                    break
                await asyncio.sleep(0.5)
        return stats
