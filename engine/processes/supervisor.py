"""Processes that work together, kept alive: each has a place, and when its process ends the next one takes it.

    place  incarnation 0 --dies--> pause --> incarnation 1 --dies--> longer pause --> ...
                                                               too often in a row --> unrecoverable

Knows nothing of what the processes do: how they find one another again is their own affair.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from engine.errors import EngineDead, EngineError
from engine.processes.child import Ready
from engine.processes.process import Process, ProcessSpec

log = logging.getLogger(__name__)

STABLE_SECONDS = 10.0  # who served for so long did not die in a row
MAX_DEATHS = 16
MAX_FAILED_STARTS = 3
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0

SpecFactory = Callable[[int, bool], ProcessSpec]
"""What the n-th incarnation of a process runs (the first is 0), and whether the last that served ended by itself."""


class _Supervised:
    """One process of the group: who holds the place now, and how often it changed hands without rest."""

    def __init__(self, make: SpecFactory) -> None:
        self.make = make
        self.incarnation = 0
        self.process: Process | None = None
        self.deaths = 0
        self.failed_starts = 0
        self._since = time.monotonic()

    async def start(self, after_fault: bool = False) -> Process:
        """The next incarnation begins."""
        self.process = await Process.start(self.make(self.incarnation, after_fault))
        self.incarnation += 1
        return self.process

    def mark_ready(self) -> None:
        """Its process serves from now on."""
        self.failed_starts, self._since = 0, time.monotonic()

    def count_death(self) -> bool:
        """Counts a death; whether that was one too many."""
        if time.monotonic() - self._since > STABLE_SECONDS:
            self.deaths = 0
        self.deaths += 1
        return self.deaths > MAX_DEATHS or self.failed_starts >= MAX_FAILED_STARTS

    @property
    def pause(self) -> float:
        """Seconds before the next incarnation."""
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self.deaths - 1))


class Supervisor:
    """A group of processes. `async with` starts them; leaving ends them, last one first.

    In the order given, a later process may depend on an earlier one: so the last is the first to stop. `busy` is for
    how many seconds one may be at a single piece of work.
    """

    def __init__(self, spec_factories: Sequence[SpecFactory], grace: float = 15.0, busy: float = 120.0) -> None:
        self._places = [_Supervised(make) for make in spec_factories]
        self._grace = grace
        self._busy = busy

    async def __aenter__(self) -> Supervisor:
        try:
            for place in self._places:
                await place.start()
        except BaseException:
            await self.stop(self._grace)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(self._grace)

    async def ready(self) -> dict[str, Ready]:
        """Everyone's report, by name. Raises the error of one that failed: a first start is not tried again."""
        told: list[tuple[str, Ready]] = []
        starts = [asyncio.ensure_future(self._starts(process, told)) for process in self._processes()]
        try:
            done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() for task in done):  # another's failure may be the reason, and is about to arrive
                await asyncio.wait(starts, timeout=0.2)
        finally:
            for task in starts:
                task.cancel()
        errors = [task.exception() for task in starts if task.done() and not task.cancelled()]
        failed = sorted(filter(None, errors), key=lambda error: isinstance(error, EngineDead))
        if failed:
            raise failed[0]
        for place in self._places:
            place.mark_ready()
        return dict(told)

    async def _starts(self, process: Process, told: list[tuple[str, Ready]]) -> None:
        """Until it is the last to report. Raises why it failed, or its end while another starts, which may need it."""
        told.append((process.spec.name, await process.report()))
        if len(told) < len(self._places):
            end = await process.end(self._busy)
            raise EngineDead(f"the {process.spec.name} process {end.words} while another started; its log is above")

    async def run_until_unrecoverable(self) -> str:
        """Restarts whoever dies, until one of them dies too often; says which and how."""
        keepers = [asyncio.ensure_future(self._keep(place)) for place in self._places]
        try:
            done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.wait(keepers)
        return ", ".join(keeper.result() for keeper in done)

    async def stop(self, grace: float) -> None:
        """Ends all, in order, the last one first; each has `grace` seconds."""
        for place in reversed(self._places):
            if place.process is not None:
                await place.process.stop(grace)

    def kill(self) -> None:
        """Ends all at once."""
        for process in self._processes():
            process.kill()

    def pids(self) -> list[int]:
        """The process ids of those that hold the places now."""
        return [process.pid for process in self._processes()]

    def _processes(self) -> list[Process]:
        return [place.process for place in self._places if place.process is not None]

    async def _keep(self, place: _Supervised) -> str:
        process = place.process
        assert process is not None, "the group was started"
        served, own_fault = True, False
        while True:
            end = await process.end(self._busy)
            how = f"the {process.spec.name} process {end.words}"
            if place.count_death():
                return f"{how}, and that too often in a row"
            if served:  # else there was nothing that it was asked to do: the one before is still to be told of
                own_fault = end.own_fault
            log.warning("%s; the next one starts", how)
            await asyncio.sleep(place.pause)
            process, served = await place.start(own_fault), False
            try:
                await process.report()
                place.mark_ready()
                served = True
                log.warning("the %s process serves again", process.spec.name)
            except EngineError as error:
                place.failed_starts += 1
                log.error("%s", error.message)
                await process.stop(self._grace)
