"""Loads adapters in at most two child processes, so that a huge load does not delay a small one.

    submit --> queue --> idle child --> collect: an adapter in shared memory, or the reason why there is none

Loads of the same adapter are done in order. When a child dies, or is killed because its load takes too long, the load
fails and another child is started for the next load.
"""

from __future__ import annotations

import itertools
import selectors
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from engine.messages import LoadAdapter
from model_runner.lora.loading.loader_process import LoaderGone, LoaderProcess
from model_runner.lora.loading.messages import LoaderConfig, LoadJob, Refused, Surveyed
from model_runner.lora.loading.shm_adapter import ShmAdapter

MAX_CHILDREN = 2
MAX_PATH = 4096
MAX_ROOTS = 16 << 10
"""The most bytes of all roots of one load together."""
POLL_SECONDS = 1.0
"""Seconds between checks of the time limits of loads under way."""
CLOSE_SECONDS = 2.0
"""The longest wait for the end of each child when the pool is closed."""


class TimeLimit(msgspec.Struct, frozen=True):
    """How long a load may take: `seconds` until the headers are checked, then `seconds` + bytes / `rate`."""

    seconds: float = 60.0
    rate: float = 20e6


TIME_LIMIT = TimeLimit()


@dataclass(frozen=True, eq=False)
class LoadOutcome:
    """The result of a load: an adapter in shared memory, which the caller must close, or the `reason` why it failed.

    `server_fault`: the reason lies in this server, not in the adapter.
    """

    message: LoadAdapter
    seconds: float
    adapter: ShmAdapter | None = None
    reason: str = ""
    server_fault: bool = False


@dataclass(eq=False)
class _Load:
    """One load, queued or in a child. `is_wanted` becomes False when its adapter is unloaded."""

    number: int
    message: LoadAdapter
    began: float
    started: float = 0.0
    deadline: float = 0.0
    is_wanted: bool = True


@dataclass(eq=False)
class _Worker:
    """A child and the load that it is working on, if any."""

    loader: LoaderProcess
    load: _Load | None = None


@dataclass(eq=False)
class LoaderPool:
    """The loader children of one runner. `fileno` is readable when `collect` should be called."""

    config: LoaderConfig
    time_limit: TimeLimit = TIME_LIMIT
    clock: Callable[[], float] = time.monotonic
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)
    _queue: list[_Load] = field(default_factory=list, init=False)
    _workers: list[_Worker] = field(default_factory=list, init=False)
    _outcomes: list[LoadOutcome] = field(default_factory=list, init=False)
    _selector: selectors.EpollSelector = field(default_factory=selectors.EpollSelector, init=False)

    @property
    def poll_seconds(self) -> float | None:
        """Seconds after which `collect` must be called even if `fileno` is not readable; None: never."""
        if self._outcomes:
            return 0.0
        return POLL_SECONDS if self._queue or self._busy else None

    def fileno(self) -> int:
        """Returns one descriptor for all children, which stays the same until `close`."""
        return self._selector.fileno()

    @property
    def pids(self) -> list[int]:
        """The process ids of the children."""
        return [worker.loader.pid for worker in self._workers]

    def start(self) -> None:
        """Starts a child ahead of the first load."""
        if not self._workers:
            self._add()

    def submit(self, message: LoadAdapter) -> None:
        """Queues a load, unless the same load is under way."""
        under_way = [load.message for load in [*self._queue, *self._busy] if load.is_wanted]
        if any(_is_same(known, message) for known in under_way):
            return
        load = _Load(next(self._numbers), message, self.clock())
        if len(message.path.encode()) > MAX_PATH or len(message.revision) > MAX_PATH:
            self._finish(load, reason=f"its path or revision has more than {MAX_PATH} bytes")
            return
        if sum(len(root.encode()) for root in message.roots) > MAX_ROOTS:
            self._finish(load, reason=f"its --lora-root directories have more than {MAX_ROOTS} bytes")
            return
        self._queue.append(load)
        self._assign()

    def cancel(self, adapter_id: int) -> None:
        """Cancels the loads of this adapter. If a child is working on one, its result will be discarded."""
        self._queue = [load for load in self._queue if load.message.adapter_id != adapter_id]
        for load in self._busy:
            load.is_wanted = load.is_wanted and load.message.adapter_id != adapter_id

    def collect(self) -> list[LoadOutcome]:
        """Returns the loads that finished since the last call. Never blocks."""
        for key, _ in self._selector.select(0):
            self._receive(key.data)
        now = self.clock()
        for worker in list(self._workers):
            if worker.load is not None and now > worker.load.deadline:
                worker.loader.kill()
                allowed = worker.load.deadline - worker.load.started
                self._lose(worker, f"loading took longer than {allowed:.3g} s and was stopped")
        self._assign()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def close(self) -> None:
        """Kills the children, waits until they have ended, and drops the loads under way."""
        for worker in list(self._workers):
            self._selector.unregister(worker.loader)
            worker.loader.kill(CLOSE_SECONDS)
        self._workers.clear()
        self._selector.close()
        for outcome in self._outcomes:
            if outcome.adapter is not None:
                outcome.adapter.close()

    @property
    def _busy(self) -> list[_Load]:
        return [worker.load for worker in self._workers if worker.load is not None]

    def _add(self) -> _Worker:
        worker = _Worker(LoaderProcess(self.config))
        self._workers.append(worker)
        self._selector.register(worker.loader, selectors.EVENT_READ, worker)
        return worker

    def _assign(self) -> None:
        """Gives queued loads to idle children, in order, unless a child is loading the same adapter."""
        while (load := self._next()) is not None:
            worker = next((worker for worker in self._workers if worker.load is None), None)
            if worker is None and len(self._workers) == MAX_CHILDREN:
                return
            try:
                worker = worker or self._add()
            except OSError as error:
                self._queue.remove(load)
                self._finish(load, reason=f"no loader process can be started ({error})", server_fault=True)
                continue
            job = LoadJob(load.number, load.message.path, load.message.revision, load.message.roots)
            if not worker.loader.send(job):
                self._lose(worker, "")
                continue
            self._queue.remove(load)
            load.started = self.clock()
            load.deadline = load.started + self.time_limit.seconds
            worker.load = load

    def _next(self) -> _Load | None:
        taken = {load.message.adapter_id for load in self._busy}
        return next((load for load in self._queue if load.message.adapter_id not in taken), None)

    def _receive(self, worker: _Worker) -> None:
        try:
            for reply, adapter in worker.loader.receive():
                load = worker.load
                assert load is not None, "a reply without a job"
                assert load.number == reply.job, "a reply to another job"
                if isinstance(reply, Surveyed):
                    load.deadline = self.clock() + self.time_limit.seconds + reply.bytes / self.time_limit.rate
                    continue
                worker.load = None
                refused = reply if isinstance(reply, Refused) else Refused(reply.job, "")
                self._finish(load, adapter, refused.reason, refused.server_fault)
        except LoaderGone as gone:
            self._lose(worker, f"the loader process {gone}")

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Removes a dead child. Its load, if any, fails with `reason`."""
        self._selector.unregister(worker.loader)
        self._workers.remove(worker)
        if worker.load is not None:
            self._finish(worker.load, reason=reason)

    def _finish(
        self, load: _Load, adapter: ShmAdapter | None = None, reason: str = "", server_fault: bool = False
    ) -> None:
        if load.is_wanted:
            seconds = self.clock() - load.began
            self._outcomes.append(LoadOutcome(load.message, seconds, adapter, reason, server_fault))
        elif adapter is not None:
            adapter.close()


def _is_same(one: LoadAdapter, other: LoadAdapter) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("adapter_id", "path", "revision", "roots"))
