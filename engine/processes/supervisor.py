"""Keeps a group of child processes running: restarts each when it exits, with growing pauses, up to a limit.

    incarnation 0 --exits--> pause --> incarnation 1 --exits--> longer pause --> ...
                                                     too many exits in a row --> unrecoverable

A new incarnation gets its neighbours' addresses from engine.processes.incarnations.
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

STABLE_SECONDS = 10.0  # after a process has served this long, its count of deaths starts again
MAX_DEATHS = 16
MAX_FAILED_STARTS = 3
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0

SpecFactory = Callable[[int, bool], ProcessSpec]
"""Returns the spec of an incarnation. Arguments: its number, from 0; whether the last one that served ended by its own
fault."""


class _Supervised:
    """One process of the group: its current incarnation, and the number of incarnations that died in a row."""

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
        """Records that the current incarnation serves from now on."""
        self.failed_starts, self._since = 0, time.monotonic()

    def count_death(self) -> bool:
        """Counts a death. Returns whether there were too many in a row."""
        if time.monotonic() - self._since > STABLE_SECONDS:
            self.deaths = 0
        self.deaths += 1
        return self.deaths > MAX_DEATHS or self.failed_starts >= MAX_FAILED_STARTS

    @property
    def pause(self) -> float:
        """The seconds to wait before the next incarnation is started."""
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self.deaths - 1))


class Supervisor:
    """A group of processes. Entering `async with` starts them in order; leaving it stops them in reverse order.

    A later process may depend on an earlier one. A process has `grace` seconds to stop, and may be busy with one piece
    of work for `max_busy` seconds.
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
        """Waits for the Ready reports of all processes and returns them by name.

        Raises the error of a process that failed; a first start is not retried.
        """
        reports: list[tuple[str, Ready]] = []
        starts = [asyncio.ensure_future(self._first_start(process, reports)) for process in self._processes()]
        try:
            done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() for task in done):  # the cause may be another process, whose error arrives next
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
        """Appends the process's report, then watches the process until all processes have reported.

        Raises the error that the process reports, or EngineDead if it ends while another process, which may need it,
        is starting.
        """
        reports.append((process.spec.name, await process.report()))
        if len(reports) < len(self._supervised):
            end = await process.watch(self._max_busy)
            raise EngineDead(
                f"the {process.spec.name} process {end.description} while another started; its log is above"
            )

    async def run_until_unrecoverable(self) -> str:
        """Restarts each process that exits, until one has died too often in a row. Returns a description of its end."""
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
        """Returns the process ids of the current incarnations."""
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
            if served:  # an incarnation that never served ran no steps, so the former one's fault still counts
                own_fault = end.own_fault
            log.warning("%s; the next one starts", how)
            await asyncio.sleep(supervised.pause)
            process = await supervised.start(own_fault)
            served = await self._becomes_ready(supervised, process)

    async def _becomes_ready(self, supervised: _Supervised, process: Process) -> bool:
        """Waits for the report of a restarted process and returns whether it serves; stops it if its start fails."""
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
