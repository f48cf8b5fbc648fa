"""The loads under way: at most two children, so that a huge load does not hold up a small one; one adapter's in order.

    submit --> queue --> a child that is idle --> collect: a parcel, or the reason why there is none

A child that dies, or takes too long and is killed, costs the load it was at; another takes its place. Knows nothing of
what is in a parcel.
"""

from __future__ import annotations

import itertools
import selectors
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from engine.messages import LoadAdapter
from model_runner.lora.transfer.loader import Loader, LoaderGone
from model_runner.lora.transfer.messages import LoaderConfig, LoadJob, Refused, Surveyed
from model_runner.lora.transfer.shm_adapter import ShmAdapter

COUNT = 2
MAX_PATH = 4096
LOOK_SECONDS = 1.0
"""How often a load under way is compared with its time limit."""


class TimeLimit(msgspec.Struct, frozen=True):
    """How long a load may take: `seconds` to start and check headers, then as many again and 1 / `rate` a byte."""

    seconds: float = 60.0
    rate: float = 20e6


TIME_LIMIT = TimeLimit()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a load: a parcel, which the receiver owns, or the reason why there is none."""

    message: LoadAdapter
    seconds: float
    parcel: ShmAdapter | None = None
    reason: str = ""


@dataclass(eq=False)
class _Load:
    """One load, queued or at a child. `wanted` ends when its adapter is unloaded."""

    number: int
    message: LoadAdapter
    began: float
    started: float = 0.0
    deadline: float = 0.0
    wanted: bool = True


@dataclass(eq=False)
class _Worker:
    """A child and what it is doing."""

    loader: Loader
    load: _Load | None = None


@dataclass(eq=False)
class Loaders:
    """The children of one runner. `fileno` is readable when `collect` has something to do."""

    config: LoaderConfig
    time_limit: TimeLimit = TIME_LIMIT
    clock: Callable[[], float] = time.monotonic
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)
    _queue: list[_Load] = field(default_factory=list, init=False)
    _workers: list[_Worker] = field(default_factory=list, init=False)
    _outcomes: list[Outcome] = field(default_factory=list, init=False)
    _selector: selectors.EpollSelector = field(default_factory=selectors.EpollSelector, init=False)

    @property
    def wait(self) -> float | None:
        """For how many seconds `fileno` may be waited for before `collect` is called all the same."""
        if self._outcomes:
            return 0.0
        return LOOK_SECONDS if self._queue or self._busy else None

    def fileno(self) -> int:
        """One descriptor for all children, for as long as this lives."""
        return self._selector.fileno()

    @property
    def pids(self) -> list[int]:
        """The process ids of the children."""
        return [worker.loader.pid for worker in self._workers]

    def start(self) -> None:
        """Starts a child before it is needed."""
        if not self._workers:
            self._add()

    def submit(self, message: LoadAdapter) -> None:
        """Queues a load; one that is under way already answers for both."""
        under_way = [load.message for load in [*self._queue, *self._busy] if load.wanted]
        if any(_same(known, message) for known in under_way):
            return
        load = _Load(next(self._numbers), message, self.clock())
        if len(message.path.encode()) > MAX_PATH or len(message.revision) > MAX_PATH:
            self._finish(load, reason=f"its path or revision has more than {MAX_PATH} bytes")
            return
        self._queue.append(load)
        self._assign()

    def forget(self, adapter_id: int) -> None:
        """Whatever is under way for this adapter is wanted no longer."""
        self._queue = [load for load in self._queue if load.message.adapter_id != adapter_id]
        for load in self._busy:
            load.wanted = load.wanted and load.message.adapter_id != adapter_id

    def collect(self) -> list[Outcome]:
        """What has ended since the last call. Never waits."""
        for key, _ in self._selector.select(0):
            self._hear(key.data)
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
        """Ends the children; what was under way is lost."""
        for worker in list(self._workers):
            self._selector.unregister(worker.loader)
            worker.loader.kill()
        self._workers.clear()
        self._selector.close()
        for outcome in self._outcomes:
            if outcome.parcel is not None:
                outcome.parcel.close()

    @property
    def _busy(self) -> list[_Load]:
        return [worker.load for worker in self._workers if worker.load is not None]

    def _add(self) -> _Worker:
        worker = _Worker(Loader(self.config))
        self._workers.append(worker)
        self._selector.register(worker.loader, selectors.EVENT_READ, worker)
        return worker

    def _assign(self) -> None:
        """Gives idle children what waits, the first whose adapter no child is at."""
        while (load := self._next()) is not None:
            worker = next((worker for worker in self._workers if worker.load is None), None)
            if worker is None and len(self._workers) == COUNT:
                return
            try:
                worker = worker or self._add()
            except OSError as error:
                self._queue.remove(load)
                self._finish(load, reason=f"no loader process can be started ({error})")
                continue
            job = LoadJob(load.number, load.message.path, load.message.revision)
            if not worker.loader.ask(job):
                self._lose(worker, "")
                continue
            self._queue.remove(load)
            load.started = self.clock()
            load.deadline = load.started + self.time_limit.seconds
            worker.load = load

    def _next(self) -> _Load | None:
        taken = {load.message.adapter_id for load in self._busy}
        return next((load for load in self._queue if load.message.adapter_id not in taken), None)

    def _hear(self, worker: _Worker) -> None:
        try:
            for reply, parcel in worker.loader.hear():
                load = worker.load
                assert load is not None, "nobody asked"
                assert load.number == reply.job, "an answer to another question"
                if isinstance(reply, Surveyed):
                    load.deadline = self.clock() + self.time_limit.seconds + reply.bytes / self.time_limit.rate
                    continue
                worker.load = None
                self._finish(load, parcel, reply.reason if isinstance(reply, Refused) else "")
        except LoaderGone as gone:
            self._lose(worker, f"the loader process {gone}")

    def _lose(self, worker: _Worker, reason: str) -> None:
        """The child is dead; so is its load."""
        self._selector.unregister(worker.loader)
        self._workers.remove(worker)
        if worker.load is not None:
            self._finish(worker.load, reason=reason)

    def _finish(self, load: _Load, parcel: ShmAdapter | None = None, reason: str = "") -> None:
        if load.wanted:
            self._outcomes.append(Outcome(load.message, self.clock() - load.began, parcel, reason))
        elif parcel is not None:
            parcel.close()


def _same(one: LoadAdapter, other: LoadAdapter) -> bool:
    return (one.adapter_id, one.path, one.revision) == (other.adapter_id, other.path, other.revision)
