"""Keeps a group of child processes running: restarts each when it ends, with growing pauses, up to a limit.

    incarnation 0 --ends--> pause --> incarnation 1 --ends--> longer pause --> ...
                                                  too many ends in a row --> unrecoverable

Each process has a keeper, one task that watches it from the start of its first incarnation until the group stops. A new
incarnation gets its neighbours' addresses from engine.processes.incarnations.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import EngineDead, EngineError
from engine.processes.child import Ready
from engine.processes.process import Process, ProcessSpec
from engine.processes.vital_signs import SERVING, STARTING, Limits

log = logging.getLogger(__name__)

STABLE_SECONDS = 10.0  # after a process has served this long, its count of deaths starts again
MAX_DEATHS = 16
MAX_FAILED_STARTS = 3
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
CAUSE_SECONDS = 0.2  # when a start fails, the cause may be another process, whose error arrives a little later

SpecFactory = Callable[[int, bool], ProcessSpec]
"""Returns the spec of an incarnation. Arguments: its number, from 0; whether the last one that served ended by its own
fault."""


class _Keeper:
    """Keeps one process running: its current incarnation, and the number of incarnations that died in a row."""

    def __init__(self, make: SpecFactory, grace: float, starting: Limits, serving: Limits) -> None:
        self._make = make
        self._grace, self._starting, self._serving = grace, starting, serving
        self.process: Process | None = None
        self.others: list[_Keeper] = []
        self.first_report: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.is_launched = False  # the whole group has served, so that its processes are restarted from now on
        self._task: asyncio.Task[str] | None = None
        self._incarnation = self._deaths = self._failed_starts = 0
        self._since = time.monotonic()

    async def begin(self) -> asyncio.Task[str]:
        """Starts the first incarnation. Returns the task that watches it and those that follow.

        The task ends when the process is unrecoverable, and returns why. It raises EngineError if a first start fails.
        """
        await self._start(own_fault=False)
        self._task = asyncio.ensure_future(self._keep())
        return self._task

    @property
    def serves(self) -> bool:
        """Whether the current incarnation is ready and has not ended."""
        return self.process is not None and self.process.serves

    async def stop(self, grace: float) -> None:
        """Stops the process, which is not restarted any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if self.process is not None:
            await self.process.stop(grace)

    def kill(self) -> None:
        """Kills the process, which is not restarted any more."""
        if self._task is not None:
            self._task.cancel()
        if self.process is not None:
            self.process.kill()

    async def _keep(self) -> str:
        assert self.process is not None, "the first incarnation was started"
        self.first_report.set_result(await self._becomes_ready(self.process))
        while True:
            end = await self.process.watch(self._serving)
            how: str | None = f"the {self.process.spec.name} process {end.description}"
            if not self.is_launched:
                raise EngineDead(f"{how} while another started; its log is above")
            while how is not None:  # an incarnation that never served ran no steps: it has no fault to tell of
                if self._count_death():
                    return f"{how}, and that too often in a row"
                log.warning("%s; the next one starts", how)
                await asyncio.sleep(self._pause)
                how = await self._restart(end.own_fault)

    async def _restart(self, own_fault: bool) -> str | None:
        """Starts the next incarnation and waits until it serves. Returns what happened if it does not."""
        assert self.process is not None, "a first incarnation was started"
        name = self.process.spec.name
        try:
            await self._becomes_ready(await self._start(own_fault))
        except EngineError as error:
            self._failed_starts += 1
            log.error("%s", error.message)
            await self.process.stop(self._grace)
            return f"the {name} process did not start"
        log.warning("the %s process serves again", name)
        return None

    async def _start(self, own_fault: bool) -> Process:
        number, self._incarnation = self._incarnation, self._incarnation + 1
        spec = self._make(number, own_fault)
        try:
            self.process = await Process.start(spec)
        except OSError as error:
            raise EngineDead(f"the {spec.name} process cannot be started ({error})") from error
        return self.process

    async def _becomes_ready(self, process: Process) -> Ready:
        report = await process.report(self._starting, lambda: all(other.serves for other in self.others))
        self._failed_starts, self._since = 0, time.monotonic()
        return report

    def _count_death(self) -> bool:
        """Counts a death, unless a request is to blame. Returns whether there were too many in a row."""
        if time.monotonic() - self._since > STABLE_SECONDS:
            self._deaths = 0
        if self.process is not None and self.process.spec.is_excused():
            log.warning("the %s process ended at the work of one request: this does not count", self.process.spec.name)
        else:
            self._deaths += 1
        return self._deaths > MAX_DEATHS or self._failed_starts >= MAX_FAILED_STARTS

    @property
    def _pause(self) -> float:
        """The seconds to wait before the next incarnation is started."""
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self._deaths - 1))


class Supervisor:
    """A group of processes. Entering `async with` starts them in order; leaving it stops them in reverse order.

    A later process may depend on an earlier one. A process has `grace` seconds to stop. It must keep within the limits
    `starting` and `serving`.
    """

    def __init__(
        self,
        spec_factories: Sequence[SpecFactory],
        grace: float = 15.0,
        starting: Limits = STARTING,
        serving: Limits = SERVING,
    ) -> None:
        self._keepers = [_Keeper(make, grace, starting, serving) for make in spec_factories]
        for keeper in self._keepers:
            keeper.others = [other for other in self._keepers if other is not keeper]
        self._tasks: list[asyncio.Task[str]] = []
        self._grace = grace

    async def __aenter__(self) -> Supervisor:
        try:
            for keeper in self._keepers:
                self._tasks.append(await keeper.begin())
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
        reports = [keeper.first_report for keeper in self._keepers]
        all_ready = asyncio.ensure_future(asyncio.wait(reports))
        try:
            events: list[asyncio.Future[Any]] = [all_ready, *self._tasks]
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            if any(task.done() for task in self._tasks):
                raise await self._cause()
            for keeper in self._keepers:
                keeper.is_launched = True
        finally:
            all_ready.cancel()
        names = [process.spec.name for process in self._processes()]
        return {name: report.result() for name, report in zip(names, reports, strict=True)}

    async def _cause(self) -> BaseException:
        """Returns the error of a process that failed, rather one that it reported itself."""
        await asyncio.wait(self._tasks, timeout=CAUSE_SECONDS)
        errors = [task.exception() for task in self._tasks if task.done() and not task.cancelled()]
        failed = sorted(filter(None, errors), key=lambda error: isinstance(error, EngineDead))
        return failed[0]

    async def run_until_unrecoverable(self) -> str:
        """Waits while the keepers restart each process that ends, until one has died too often in a row.

        Returns a description of its end.
        """
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        return ", ".join(task.result() for task in done)

    async def stop(self, grace: float) -> None:
        """Stops all processes, the last one first; each has `grace` seconds before it is killed.

        Those that are not yet asked to stop are still restarted: the open requests of a later one may need them.
        """
        for keeper in reversed(self._keepers):
            await keeper.stop(grace)

    def kill(self) -> None:
        """Kills all processes."""
        for keeper in self._keepers:
            keeper.kill()

    def pids(self) -> list[int]:
        """Returns the process ids of the current incarnations."""
        return [process.pid for process in self._processes()]

    def _processes(self) -> list[Process]:
        return [keeper.process for keeper in self._keepers if keeper.process is not None]
