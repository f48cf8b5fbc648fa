"""A queue of jobs for threads of its own. Tenants take turns, and a job whose caller has left is dropped.

    run() --> waiting, by tenant --the next tenant's turn--> a thread --> the result
              too many: Overloaded                           a tenant, and large jobs, never hold every thread
              the caller leaves: dropped                     the caller leaves: the job's next `check` ends it

Does not know what the jobs do. Everything but the jobs themselves runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from engine.errors import Overloaded

T = TypeVar("T")

LARGEST_NICENESS = 19


class Abandoned(Exception):
    """Ends a job whose caller has left. The queue drops it."""


class Job:
    """One job. Its work calls `check` between two pieces, so that it ends soon after its caller has left."""

    def __init__(self, tenant: str, work: Callable[[Job], Any], is_large: bool, result: asyncio.Future[Any]) -> None:
        self.tenant = tenant
        self.is_large = is_large
        self.is_abandoned = False
        self.result = result
        self._work = work

    def check(self) -> None:
        """Raises Abandoned if the caller has left."""
        if self.is_abandoned:
            raise Abandoned

    def run(self) -> Any:
        """Does the work, in a thread, and returns its result."""
        self.check()
        return self._work(self)


class WorkQueue:
    """Runs jobs in up to `threads` threads whose niceness is raised by `niceness`.

    A tenant may have `most_waiting` waiting jobs. With two threads or more, the jobs of one tenant leave one thread
    free for other tenants, and large jobs leave half of the threads free for small ones.
    """

    def __init__(self, what: str, threads: int, niceness: int = 0, most_waiting: int = 256) -> None:
        self.most_waiting = most_waiting
        self._what = what
        self._threads = threads
        self._of_tenant = max(1, threads - 1)
        self._of_large = max(1, threads // 2)
        self._pool = ThreadPoolExecutor(threads, f"{what}", initializer=partial(_lower_priority, niceness))
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # the tenant that is next comes first
        self._running: Counter[str] = Counter()
        self._large = 0
        self._is_closed = False

    async def run(self, tenant: str, work: Callable[[Job], T], is_large: bool = False) -> T:
        """Returns the result of `work`, which runs in a thread when it is the tenant's turn.

        Raises Overloaded if `most_waiting` jobs of the tenant wait already.
        """
        if self._is_closed:
            raise Overloaded("the server is shutting down")
        waiting = self._waiting.setdefault(tenant, deque())
        if len(waiting) >= self.most_waiting:
            raise Overloaded(f"{len(waiting)} calls of this tenant wait for {self._what} already: try again soon")
        job = Job(tenant, work, is_large, asyncio.get_running_loop().create_future())
        waiting.append(job)
        self._start_jobs()
        try:
            result: T = await job.result
        except asyncio.CancelledError:
            self._drop(job)
            raise
        return result

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a thread."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """The number of jobs that run, including those whose callers have left."""
        return self._running.total()

    def close(self) -> None:
        """Refuses jobs from now on, the waiting ones too, and ends the threads once their current jobs have ended."""
        self._is_closed = True
        for job in (job for waiting in self._waiting.values() for job in waiting):
            if not job.result.done():  # else its caller has just left
                job.result.set_exception(Overloaded("the server is shutting down"))
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drop(self, job: Job) -> None:
        job.is_abandoned = True
        waiting = self._waiting.get(job.tenant)
        if waiting is not None:
            with contextlib.suppress(ValueError):  # it has been started
                waiting.remove(job)
            self._forget_idle(job.tenant)

    def _start_jobs(self) -> None:
        while self.running < self._threads and (job := self._take()) is not None:
            self._running[job.tenant] += 1
            self._large += job.is_large
            running = asyncio.get_running_loop().run_in_executor(self._pool, job.run)
            running.add_done_callback(partial(self._ended, job))

    def _take(self) -> Job | None:
        """Takes the next job that may start, and gives its tenant the last turn. Returns None if there is none."""
        for tenant, waiting in self._waiting.items():
            if self._running[tenant] >= self._of_tenant:
                continue
            for place, job in enumerate(waiting):
                if not job.is_large or self._large < self._of_large:
                    del waiting[place]
                    self._waiting.move_to_end(tenant)
                    self._forget_idle(tenant)
                    return job
        return None

    def _ended(self, job: Job, running: asyncio.Future[Any]) -> None:
        self._running[job.tenant] -= 1
        self._running += Counter()  # drops the tenants without running jobs
        self._large -= job.is_large
        if not running.cancelled():
            error = running.exception()
            if not job.result.done():
                if error is None:
                    job.result.set_result(running.result())
                else:
                    job.result.set_exception(error)
        self._start_jobs()

    def _forget_idle(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]


def _lower_priority(niceness: int) -> None:
    """Raises the niceness of the calling thread, and of no other thread of the process."""
    if niceness:
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(LARGEST_NICENESS, now + niceness))
