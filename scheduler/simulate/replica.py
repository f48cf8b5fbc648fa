"""One scheduler and its machine in virtual time: whatever is due next, in order. Decides nothing.

arrival, or the machine's next answer --> handle --> plan while the window has room --> machine
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
from scheduler.simulate.results.journal import Journal
from scheduler.simulate.trace import Ask

PATIENCE = 0.05  # with requests open and nothing under way, the core is asked again after so long
STALLED = 60.0


class Core(Protocol):
    """What drives a replica: ours, or another rule with the same verbs."""

    def handle(self, message: ToScheduler, now: float) -> Sequence[Any]: ...

    def plan(self, now: float) -> Step | None: ...

    def take(self) -> Sequence[Any]: ...

    def stats(self) -> Stats: ...

    def check(self) -> None: ...


class Replica:
    """A core, its machine, and the adapters that it was told of. `audit`: the books are proved after every call."""

    def __init__(
        self, number: int, core: Core, machine: Machine, journal: Journal, ids: Mapping[str, int], audit: bool = False
    ) -> None:
        self.number = number
        self.core, self.machine, self.open = core, machine, 0
        self.ended = 0
        self._journal, self._ids, self._audit = journal, ids, audit
        self._known: set[str] = set()
        self._quiet_since: float | None = None
        self._asked_at = 0.0
        self._take(core.take(), 0.0)

    @property
    def next_event(self) -> float:
        """When something is due, arrivals aside."""
        due = self.machine.next_event
        if due == NEVER and self.open:
            return self._asked_at + PATIENCE
        return due

    def warm_up(self, names: Sequence[str]) -> None:
        """The adapters are read and filled as far as there is room, before time begins."""
        self.machine.instant = True
        for name in names:
            self._introduce(name, 0.0)
            while self.machine.next_event < NEVER:
                self.advance()
        self.machine.instant = False

    def submit(self, number: int, ask: Ask, now: float) -> None:
        """A request arrives. An adapter that was never named before is introduced first."""
        self._journal.arrive(number, ask, now, self.number)
        self.open += 1
        lora: list[tuple[int, float]] = []
        if ask.adapter is not None:
            self._introduce(ask.adapter, now)
            lora = [(self._ids[ask.adapter], 1.0)]
        message = Generate(
            epoch=0,
            request_id=number,
            prompt=ask.tokens(number),
            lora=lora,
            sampling=Sampling(seed=number),
            stopping=Stopping(ask.output),
            priority=ask.priority,
            cache_salt=ask.tenant,
        )
        self._tell(message, now)

    def advance(self) -> int:
        """Lets happen what is due next. Returns how many requests ended by it."""
        before = self.ended
        if self.machine.next_event < NEVER:
            self._quiet_since = None
            now, message = self.machine.pop()
            self._tell(message, now)
        else:
            now = self.next_event
            if self._quiet_since is None:
                self._quiet_since = now
            assert now - self._quiet_since < STALLED, f"replica {self.number} stalls with {self.open} requests open"
            self._plan(now)
        return self.ended - before

    def _introduce(self, name: str, now: float) -> None:
        if name not in self._known:
            self._known.add(name)
            self._tell(LoadAdapter(adapter_id=self._ids[name], path=name, name=name), now)

    def _tell(self, message: Generate | LoadAdapter | StepDone | AdapterState, now: float) -> None:
        self._take(self.core.handle(message, now), now)
        self._plan(now)

    def _plan(self, now: float) -> None:
        self._asked_at = now
        while (step := self.core.plan(now)) is not None:
            self._take(self.core.take(), now)  # first: what the step needs loaded or gone
            for new in step.new_rows:
                self._journal.admit(new.sampling.seed, now)
            self.machine.accept(step, now)
        self._take(self.core.take(), now)

    def _take(self, messages: Sequence[Any], now: float) -> None:
        if self._audit:
            self.core.check()
        for message in messages:
            if isinstance(message, Progress):
                ended = sum([self._journal.hear(update, now) for update in message.updates])
                self.open -= ended
                self.ended += ended
            elif isinstance(message, LoadAdapter | UnloadAdapter | EvictAdapter):
                self.machine.accept(message, now)
