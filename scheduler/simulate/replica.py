"""A replica: one scheduler and its machine in virtual time. Passes events on in order of time.

arrival, or the machine's next message --> handle --> plan while the window has room --> machine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine.messages import (
    AdapterState,
    EvictAdapter,
    Generate,
    LoadAdapter,
    Progress,
    Sampling,
    Stats,
    Step,
    StepDone,
    Stopping,
    ToScheduler,
    UnloadAdapter,
)
from scheduler.simulate.machine import NEVER, Machine
from scheduler.simulate.results.request_log import RequestLog
from scheduler.simulate.trace import TraceRequest

RETRY_SECONDS = 0.05  # if requests are open and no event is due, the core plans again after these seconds
STALL_SECONDS = 60.0  # the simulation fails if requests are open and no event is due for these seconds


class Core(Protocol):
    """A scheduler: the real core, or a baseline with the same methods."""

    def handle(self, message: ToScheduler, now: float) -> Sequence[Any]: ...

    def plan(self, now: float) -> Step | None: ...

    def drain_outbox(self) -> Sequence[Any]: ...

    def stats(self) -> Stats: ...

    def check(self) -> None: ...


class Replica:
    """A core, its machine, and the adapters that were loaded. With `audit`, the core is audited after each call."""

    def __init__(
        self, number: int, core: Core, machine: Machine, log: RequestLog, ids: Mapping[str, int], audit: bool = False
    ) -> None:
        self.number = number
        self.core, self.machine, self.open_requests = core, machine, 0
        self.ended = 0
        self._log, self._ids, self._audit = log, ids, audit
        self._loaded: set[str] = set()
        self._stalled_since: float | None = None
        self._planned_at = 0.0
        self._deliver(core.drain_outbox(), 0.0)

    @property
    def next_event(self) -> float:
        """The time of the next event other than an arrival: a message from the machine, or another call of `plan`."""
        due = self.machine.next_event
        if due == NEVER and self.open_requests:
            return self._planned_at + RETRY_SECONDS
        return due

    def warm_up(self, names: Sequence[str]) -> None:
        """Loads and fills the adapters in no time, as far as they fit."""
        self.machine.instant = True
        for name in names:
            self._load_once(name, 0.0)
            while self.machine.next_event < NEVER:
                self.advance()
        self.machine.instant = False

    def submit(self, number: int, request: TraceRequest, now: float) -> None:
        """Sends a request that arrives `now` to the core. Its adapter is loaded first if it is new."""
        self._log.record_arrival(number, request, now, self.number)
        self.open_requests += 1
        lora: list[tuple[int, float]] = []
        if request.adapter is not None:
            self._load_once(request.adapter, now)
            lora = [(self._ids[request.adapter], 1.0)]
        message = Generate(
            epoch=0,
            request_id=number,
            prompt=request.tokens(number),
            lora=lora,
            sampling=Sampling(seed=number),
            stopping=Stopping(request.output),
            priority=request.priority,
            cache_salt=request.tenant,
            tenant=request.tenant,
        )
        self._send(message, now)

    def advance(self) -> int:
        """Runs the next event. Returns how many requests it ended."""
        before = self.ended
        if self.machine.next_event < NEVER:
            self._stalled_since = None
            now, message = self.machine.pop()
            self._send(message, now)
        else:
            now = self.next_event
            if self._stalled_since is None:
                self._stalled_since = now
            assert now - self._stalled_since < STALL_SECONDS, (
                f"replica {self.number} stalls with {self.open_requests} requests open"
            )
            self._plan(now)
        return self.ended - before

    def _load_once(self, name: str, now: float) -> None:
        if name not in self._loaded:
            self._loaded.add(name)
            self._send(LoadAdapter(adapter_id=self._ids[name], path=name, name=name), now)

    def _send(self, message: Generate | LoadAdapter | StepDone | AdapterState, now: float) -> None:
        self._deliver(self.core.handle(message, now), now)
        self._plan(now)

    def _plan(self, now: float) -> None:
        self._planned_at = now
        while (step := self.core.plan(now)) is not None:
            self._deliver(self.core.drain_outbox(), now)  # loads and evictions that the step needs come first
            for new in step.new_rows:
                self._log.record_admission(new.sampling.seed, now)
            self.machine.accept(step, now)
        self._deliver(self.core.drain_outbox(), now)

    def _deliver(self, messages: Sequence[Any], now: float) -> None:
        if self._audit:
            self.core.check()
        for message in messages:
            if isinstance(message, Progress):
                ended = sum([self._log.record_update(update, now) for update in message.updates])
                self.open_requests -= ended
                self.ended += ended
            elif isinstance(message, LoadAdapter | UnloadAdapter | EvictAdapter):
                self.machine.accept(message, now)
