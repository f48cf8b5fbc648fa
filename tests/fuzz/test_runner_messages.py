"""Well-typed nonsense from the runner: the scheduler raises, or passes its audit and updates only open requests."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fixtures.adapters.mutations import Mutator

from engine.errors import EngineError
from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    EvictAdapter,
    Footprint,
    Generate,
    Hello,
    LoadAdapter,
    LogprobIds,
    Progress,
    RunnerReady,
    Sampling,
    Step,
    StepDone,
    Stopping,
    ToScheduler,
    UnloadAdapter,
)
from scheduler.core import Scheduler
from scheduler.state import Bounds

CASES = 5_000
MAX_CASES_PER_WORLD = 200  # after a changed epoch a scheduler may ignore its runner for good
VOCAB, ADAPTERS = 97, 5
CAPACITY = Capacity(
    kv_pages=24, page_size=4, rows=6, max_length=40, max_batched_tokens=10, vocab_size=VOCAB, max_loras=2,
    rank_pages={"qkv": 4, "down": 3}, max_lora_rank=32, max_lane_pages=4,
)  # fmt: skip


class WrongUpdateError(Exception):
    """An update refers to a request that is not open, or has a token id out of range."""


class World:
    """A scheduler until it raises, and a runner whose messages are valid; the test changes some of them."""

    def __init__(self, draw: random.Random, window: int) -> None:
        self.draw = draw
        self.core = Scheduler(CAPACITY, Bounds(2, 4, None, "lru"), window)
        self.answers: list[ToScheduler] = []  # messages of the runner that are not sent yet
        self.open: set[int] = set()
        self.ended: set[int] = set()
        self.count = 0
        self.now = 0.0
        self._receive(self.core.drain_outbox())
        for number in range(1, ADAPTERS + 1):
            self.send(LoadAdapter(adapter_id=number, path=f"adapters/{number}"))

    def send_request(self) -> None:
        """Sends a valid request, or aborts an open one."""
        if self.open and self.draw.random() < 0.1:
            self.send(Abort(0, self.draw.choice(sorted(self.open))))
            return
        self.count += 1
        self.open.add(self.count)
        prompt = [self.draw.randrange(VOCAB) for _ in range(self.draw.randrange(1, 25))]
        self.send(Generate(
            epoch=0, request_id=self.count, prompt=prompt,
            lora=[(self.draw.randrange(1, ADAPTERS + 1), 1.0)] if self.draw.random() < 0.6 else [],
            sampling=Sampling(temperature=0.0, logprobs=self.draw.choice([-1, 1])),
            stopping=Stopping(self.draw.randrange(1, 9), 0, [1]),
        ))  # fmt: skip

    def send(self, message: ToScheduler) -> None:
        """Passes one message to the scheduler, answers all steps that can be planned, and audits the scheduler."""
        self.now += 1.0
        self._receive(self.core.handle(message, self.now))
        while (step := self.core.plan(self.now)) is not None:
            self._receive(self.core.drain_outbox())
            self._answer(step)
        self._receive(self.core.drain_outbox())
        self.core.check()

    def _receive(self, messages: list[Any]) -> None:
        for message in messages:
            match message:
                case Progress():
                    for update in message.updates:
                        if update.request_id not in self.open or not all(0 <= t < 1 << 31 for t in update.tokens):
                            raise WrongUpdateError(update)
                        if update.finish is not None or update.error is not None:
                            self.open.discard(update.request_id)
                case LoadAdapter():
                    footprint = Footprint({"qkv": 1, "down": message.adapter_id % 3})
                    self._report(message.adapter_id, "host", footprint=footprint, revision="r", bytes=100)
                case EvictAdapter():
                    self._report(message.adapter_id, "disk")
                case UnloadAdapter():
                    self._report(message.adapter_id, "gone")

    def _answer(self, step: Step) -> None:
        for fill in step.fills:
            footprint = Footprint({group: len(pages) for group, pages in fill.pages.items()})
            self._report(fill.adapter_id, "resident", footprint=footprint, revision="r", bytes=100)
        tokens = [self.draw.randrange(VOCAB) for chunk in step.chunks if chunk.samples]
        scored = {at: LogprobIds(5, -1.0, [(6, -2.0)]) for at, chunk in enumerate(step.chunks) if chunk.samples}
        self.answers.append(StepDone(epoch=step.epoch, id=step.id, tokens=tokens, logprobs=scored, seconds=0.01))

    def _report(self, adapter_id: int, state: Any, **fields: Any) -> None:
        self.answers.append(AdapterState(adapter_id=adapter_id, state=state, **fields))

    def next_message(self) -> ToScheduler:
        """Returns the runner's next message: its oldest one that is not sent, or else an unexpected message."""
        if self.answers:
            return self.answers.pop(0)
        return self.draw.choice([
            RunnerReady(epoch=0, capacity=CAPACITY), Hello("runner", 0, "ipc://x"),
            StepDone(epoch=0, id=1, tokens=[5]), AdapterState(adapter_id=1, state="host"),
        ])  # fmt: skip


@pytest.mark.parametrize(("seed", "window"), [(41, 1), (42, 2)])
def test_audit_holds_or_the_scheduler_ends(seed: int, window: int) -> None:
    mutator = Mutator(seed)
    draw, ends, cases, begun = mutator.draw, 0, 0, 0
    world = World(draw, window)
    while cases < CASES:
        if cases - begun >= MAX_CASES_PER_WORLD:
            world, begun = World(draw, window), cases
        is_changed = draw.random() < 0.5
        cases += is_changed
        try:
            if draw.random() < 0.3:
                world.send_request()
            message = world.next_message()
            world.send(mutator.message(message) if is_changed else message)
        except (AssertionError, LookupError, ArithmeticError, EngineError):  # the scheduler process would exit
            ends += 1
            world, begun = World(draw, window), cases
    assert CASES * 0.01 < ends < CASES * 0.9, f"{ends} ends"
