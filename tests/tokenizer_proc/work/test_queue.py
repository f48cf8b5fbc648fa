"""Jobs off the event loop: tenants take turns, a caller that leaves costs nothing, the bounds are kept."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from engine.errors import InvalidRequest, Overloaded
from tokenizer_proc.work.queue import Abandoned, Job, WorkQueue

T = TypeVar("T")


class Gate:
    """Jobs that wait until they are let go, and the order in which they began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.most = 0
        self._running = 0
        self._open = threading.Semaphore(0)
        self._lock = threading.Lock()

    def job(self, name: str) -> Callable[[Job], str]:
        def work(job: Job) -> str:
            with self._lock:
                self.begun.append(name)
                self._running += 1
                self.most = max(self.most, self._running)
            assert self._open.acquire(timeout=20)
            with self._lock:
                self._running -= 1
            job.check()
            return name

        return work

    def let_go(self, count: int) -> None:
        self._open.release(count)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def run(threads: int, scenario: Callable[[WorkQueue, Gate], Awaitable[T]], most_waiting: int = 64) -> T:
    async def inside() -> T:
        queue, gate = WorkQueue("tests", threads, most_waiting=most_waiting), Gate()
        try:
            return await asyncio.wait_for(scenario(queue, gate), 20)
        finally:
            gate.let_go(1000)
            await until(lambda: not queue.running)
            queue.close()

    return asyncio.run(inside())


def start(queue: WorkQueue, gate: Gate, names: list[str], is_large: bool = False) -> list[asyncio.Task[str]]:
    """Starts a job for each name, whose first letter is the tenant."""
    return [asyncio.ensure_future(queue.run(name[0], gate.job(name), is_large)) for name in names]


def test_tenants_take_turns() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        jobs = start(queue, gate, ["a1", "a2", "a3", "a4", "b1", "b2", "c1"])
        gate.let_go(len(jobs))
        assert await asyncio.gather(*jobs) == ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]
        assert gate.begun == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]

    run(1, scenario)


def test_threads_bound_the_running_jobs() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        jobs = start(queue, gate, [f"{tenant}{number}" for tenant in "abcd" for number in range(4)])
        await until(lambda: len(gate.begun) == 3)
        assert (queue.running, queue.waiting) == (3, 13)
        gate.let_go(len(jobs))
        await asyncio.gather(*jobs)
        assert gate.most == 3
        assert (queue.running, queue.waiting) == (0, 0)

    run(3, scenario)


def test_a_tenant_leaves_a_thread_for_others() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        start(queue, gate, [f"a{number}" for number in range(8)])
        await until(lambda: queue.running == 2)
        [other] = start(queue, gate, ["b1"])
        await until(lambda: "b1" in gate.begun)
        assert queue.waiting == 6
        assert not other.done()

    run(3, scenario)


def test_large_jobs_leave_threads_for_small_ones() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        start(queue, gate, ["a1", "b1", "c1"], is_large=True)
        await until(lambda: queue.running == 1)
        start(queue, gate, ["d1"])
        await until(lambda: "d1" in gate.begun)
        assert gate.begun == ["a1", "d1"]
        assert queue.waiting == 2

    run(2, scenario)


def test_a_job_whose_caller_left_never_starts() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        jobs = start(queue, gate, ["a1", "a2", "a3", "b1"])
        await until(lambda: gate.begun == ["a1"])
        for job in jobs[:3]:
            job.cancel()
        await asyncio.wait(jobs[:3])
        assert queue.waiting == 1
        gate.let_go(2)
        assert await jobs[3] == "b1"
        assert gate.begun == ["a1", "b1"]

    run(1, scenario)


def test_a_running_job_ends_at_its_next_piece() -> None:
    pieces: list[int] = []

    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        step = threading.Semaphore(0)

        def work(job: Job) -> None:
            for piece in range(1000):
                job.check()
                pieces.append(piece)
                assert step.acquire(timeout=20)

        task = asyncio.ensure_future(queue.run("a", work))
        await until(lambda: pieces == [0])
        task.cancel()
        await asyncio.wait([task])
        step.release(1000)
        await until(lambda: not queue.running)

    run(1, scenario)
    assert pieces == [0]


def test_a_tenant_with_too_many_waiting_jobs_is_refused() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        start(queue, gate, [f"a{number}" for number in range(4)])
        await until(lambda: queue.running == 1)
        with pytest.raises(Overloaded) as raised:
            await queue.run("a", gate.job("a9"))
        assert "3 calls of this tenant wait" in raised.value.message
        [other] = start(queue, gate, ["b1"])
        await until(lambda: queue.waiting == 4)
        assert not other.done()

    run(1, scenario, most_waiting=3)


def test_an_error_reaches_only_its_caller() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        def refuses(job: Job) -> None:
            raise InvalidRequest("no")

        with pytest.raises(InvalidRequest, match="no"):
            await queue.run("a", refuses)
        gate.let_go(1)
        assert await queue.run("a", gate.job("a1")) == "a1"

    run(1, scenario)


def test_only_the_queues_threads_are_niced() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        nicer = WorkQueue("nice", 1, niceness=3)

        def niceness(job: Job) -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert await nicer.run("a", niceness) == min(19, here + 3)
        assert await queue.run("a", niceness) == here
        nicer.close()

    run(1, scenario)


def test_a_closed_queue_refuses_its_waiting_jobs() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        jobs = start(queue, gate, ["a1", "a2"])
        await until(lambda: gate.begun == ["a1"])
        queue.close()
        with pytest.raises(Overloaded, match="shutting down"):
            await jobs[1]
        with pytest.raises(Overloaded, match="shutting down"):
            await queue.run("b", gate.job("b1"))
        gate.let_go(1)
        assert await jobs[0] == "a1"

    run(1, scenario)


def test_a_queue_closes_while_callers_leave() -> None:
    async def scenario(queue: WorkQueue, gate: Gate) -> None:
        jobs = start(queue, gate, ["a1", "a2", "a3"])
        await until(lambda: gate.begun == ["a1"])
        jobs[1].cancel()
        queue.close()
        with pytest.raises(Overloaded, match="shutting down"):
            await jobs[2]
        with pytest.raises(asyncio.CancelledError):
            await jobs[1]

    run(1, scenario)


def test_an_abandoned_job_says_so() -> None:
    job = Job("a", lambda job: None, False, asyncio.new_event_loop().create_future())
    job.check()
    job.is_abandoned = True
    with pytest.raises(Abandoned):
        job.run()
    job.result.get_loop().close()
