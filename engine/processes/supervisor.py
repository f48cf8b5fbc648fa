"""Keeps a group of child processes running: restarts each when it exits, with growing pauses, up to a limit.

    incarnation 0 --exits--> pause --> incarnation 1 --exits--> longer pause --> ...
                                                     too many exits in a row --> unrecoverable

Knows nothing of what the processes do, nor of how a new incarnation finds its neighbours.
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

STABLE_SECONDS = 10.0  # a process that served this long starts a new row of deaths
MAX_DEATHS = 16
MAX_FAILED_STARTS = 3
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0

SpecFactory = Callable[[int, bool], ProcessSpec]
"""Makes the spec of incarnation n (from 0); the second argument: whether the last one that served ended by itself."""


class _Supervised:
    """One process of the group: its current incarnation, and how often incarnations died in a row."""

    def __init__(self, make: SpecFactory) -> None:
        self.make = make
        self.incarnation = 0
        self.process: Process | None = None
        self.deaths = 0
        self.failed_starts = 0
        self._since = time.monotonic()

    async def start(self, after_fault: bool = False) -> Process:
        """Starts the next incarnation."""
        self.process = await Process.start(self.make(self.incarnation, after_fault))
        self.incarnation += 1
        return self.process

    def mark_ready(self) -> None:
        """The current incarnation serves from now on."""
        self.failed_starts, self._since = 0, time.monotonic()

    def count_death(self) -> bool:
        """Counts a death. Returns True when there were too many in a row."""
        if time.monotonic() - self._since > STABLE_SECONDS:
            self.deaths = 0
        self.deaths += 1
        return self.deaths > MAX_DEATHS or self.failed_starts >= MAX_FAILED_STARTS

    @property
    def pause(self) -> float:
        """Seconds before the next incarnation."""
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self.deaths - 1))


class Supervisor:
    """A group of processes. `async with` starts them in order; leaving stops them in reverse order.

    A later process may depend on an earlier one. `grace` are the seconds a process has to stop, `max_busy` the seconds
    it may be busy with one piece of work.
    """

    def __init__(self, spec_factories: Sequence[SpecFactory], grace: float = 15.0, max_busy: float = 120.0) -> None:
        self._supervised = [_Supervised(make) for make in spec_factories]
        self._grace = grace
        self._max_busy = max_busy

    async def __aenter__(self) -> Supervisor:
        try:
            for each in self._supervised:
                await each.start()
        except BaseException:
            await self.stop(self._grace)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(self._grace)

    async def ready(self) -> dict[str, Ready]:
        """The reports of all processes, by name. Raises the error of one that failed; a first start is not retried."""
        reports: list[tuple[str, Ready]] = []
        starts = [asyncio.ensure_future(self._first_start(process, reports)) for process in self._processes()]
        try:
            done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() for task in done):  # the cause may be the failure of another, about to arrive
                await asyncio.wait(starts, timeout=0.2)
        finally:
            for task in starts:
                task.cancel()
        errors = [task.exception() for task in starts if task.done() and not task.cancelled()]
        failed = sorted(filter(None, errors), key=lambda error: isinstance(error, EngineDead))
        if failed:
            raise failed[0]
        for each in self._supervised:
            each.mark_ready()
        return dict(reports)

    async def _first_start(self, process: Process, reports: list[tuple[str, Ready]]) -> None:
        """Appends the process's report, then watches it until all have reported.

        Raises the error it failed with, or EngineDead when it ends while another process, which may need it, starts.
        """
        reports.append((process.spec.name, await process.report()))
        if len(reports) < len(self._supervised):
            end = await process.watch(self._max_busy)
            raise EngineDead(
                f"the {process.spec.name} process {end.description} while another started; its log is above"
            )

    async def run_until_unrecoverable(self) -> str:
        """Restarts each process that exits, until one has died too often in a row. Returns which one, and how."""
        keepers = [asyncio.ensure_future(self._keep_running(each)) for each in self._supervised]
        try:
            done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.wait(keepers)
        return ", ".join(keeper.result() for keeper in done)

    async def stop(self, grace: float) -> None:
        """Stops all processes, the last one first; each has `grace` seconds before it is killed."""
        for each in reversed(self._supervised):
            if each.process is not None:
                await each.process.stop(grace)

    def kill(self) -> None:
        """Kills all processes."""
        for process in self._processes():
            process.kill()

    def pids(self) -> list[int]:
        """The process ids of the current incarnations."""
        return [process.pid for process in self._processes()]

    def _processes(self) -> list[Process]:
        return [each.process for each in self._supervised if each.process is not None]

    async def _keep_running(self, supervised: _Supervised) -> str:
        process = supervised.process
        assert process is not None, "the group was started"
        served, own_fault = True, False
        while True:
            end = await process.watch(self._max_busy)
            how = f"the {process.spec.name} process {end.description}"
            if supervised.count_death():
                return f"{how}, and that too often in a row"
            if served:  # an incarnation that never served did no work: the fault of the one before it still counts
                own_fault = end.own_fault
            log.warning("%s; the next one starts", how)
            await asyncio.sleep(supervised.pause)
            process = await supervised.start(own_fault)
            served = await self._becomes_ready(supervised, process)

    async def _becomes_ready(self, supervised: _Supervised, process: Process) -> bool:
        """Waits for the report of a restarted process; stops the process if its start fails."""
        try:
            await process.report()
        except EngineError as error:
            supervised.failed_starts += 1
            log.error("%s", error.message)
            await process.stop(self._grace)
            return False
        supervised.mark_ready()
        log.warning("the %s process serves again", process.spec.name)
        return True
