"""Well-typed nonsense from the tokenizer process: the scheduler passes its audit after every message, and continues."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.adapters.mutations import NUMBERS, Mutator
from fixtures.scheduling.fake_runner.library import Library
from fixtures.scheduling.fake_runner.runner import FakeRunner

from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    EvictAdapter,
    Footprint,
    Generate,
    Hello,
    LoadAdapter,
    PinAdapter,
    Progress,
    RunnerReady,
    Sampling,
    Step,
    Stopping,
    ToScheduler,
    UnloadAdapter,
)
from scheduler.core import Scheduler
from scheduler.state import Bounds

CASES = 2_500
ADAPTERS, VOCAB = 6, 97
INTEGERS = [int(number) for number in NUMBERS if number == int(number) and abs(number) < 1 << 63]
SCALES = [0.0, -0.0, 1.0, -1.0, 1e-300, 1e38, 3e38, -3e38, 1e308, float("nan"), float("inf"), -float("inf")]


class HostileWorld:
    """A scheduler between the fake runner, which checks every message, and a tokenizer process that sends anything."""

    def __init__(self, seed: int, window: int) -> None:
        self.mutator = Mutator(seed)
        self.draw = self.mutator.draw
        self.capacity = Capacity(
            kv_pages=24, page_size=4, rows=6, max_length=40, max_batched_tokens=10, vocab_size=VOCAB, max_loras=2,
            rank_pages={"qkv": 4, "down": 3}, max_lora_rank=32, max_lane_pages=4,
        )  # fmt: skip
        self.library = Library()
        for number in range(1, ADAPTERS + 1):
            self.library.footprints[number] = Footprint({"qkv": 1 + number % 2, "down": number % 3})
            self.library.sizes[number] = 100 * number
        self.runner = FakeRunner(self.capacity, self.library, max_host=4)
        self.core = Scheduler(self.capacity, Bounds(2, 4, None, "lru"), window)
        self.epoch = 0
        self.asked: set[int] = set()
        self.ended: set[int] = set()
        self.now = 0.0
        self._receive(self.core.drain_outbox())

    # ------------------------------------------------------------------------------------------------- messages

    def message(self) -> ToScheduler:
        """Draws a message of the tokenizer process, valid or not."""
        kind = self.draw.random()
        if kind < 0.5:
            return self.generate(self.number(1, 400), odd=0.2)
        if kind < 0.62:
            return Abort(self._epoch(), self.number(1, 400))
        if kind < 0.74:
            adapter_id = self.number(1, ADAPTERS + 1) if self.draw.random() < 0.8 else self.number(1, 50)
            path = f"adapters/{adapter_id % ADAPTERS + 1}"
            return LoadAdapter(
                adapter_id=adapter_id, path=path, pinned=self.draw.random() < 0.2,
                preload=self.draw.random() < 0.5, name=self.mutator.text(),
            )  # fmt: skip
        if kind < 0.84:
            return UnloadAdapter(self.number(1, ADAPTERS + 1) if self.draw.random() < 0.5 else self.number(1, 50))
        if kind < 0.94:
            return PinAdapter(self.number(1, ADAPTERS + 1), self.draw.random() < 0.5)
        return Hello("tokenizer", self._epoch(), "ipc://x")

    def generate(self, request_id: int, odd: float) -> Generate:
        """Draws a request; each field is out of range with probability `odd`."""
        return Generate(
            epoch=self._epoch() if odd else self.epoch,
            request_id=request_id,
            prompt=self.tokens(0 if odd else 1, 30, odd / 10),
            generated=self.tokens(0, 3, odd / 10) if self.draw.random() < odd else [],
            lora=self.lora(odd),
            sampling=Sampling(
                temperature=self.draw.choice(SCALES),
                top_k=self.number(0, 9),
                seed=self.number(0, 999),
                min_tokens=self.number(0, 5) if self.draw.random() < odd else 0,
                prompt_logprobs=self.draw.choice([-1, -1, 0, 3]),
                logprobs=self.draw.choice([-1, 0]),
                repetition_penalty=self.draw.choice([1.0, *SCALES]),
            ),
            stopping=Stopping(
                self.number(1, 9) if self.draw.random() < odd else self.draw.randrange(1, 12),
                self.number(0, 5) if self.draw.random() < odd else 0,
                self.tokens(0, 9, odd),
            ),
            priority=self.number(0, 2) if self.draw.random() < odd else 0,
            cache_salt=self.mutator.text(),
            tenant=self.mutator.text(),
        )

    def lora(self, odd: float) -> list[tuple[int, float]]:
        """Draws an adapter selection: none, one, a mix, unknown adapters, the same one twice, or extreme scales."""
        count = self.draw.choice([0, 0, 1, 1, 1, 2, 5])
        return [
            (
                self.number(0, 50) if self.draw.random() < odd else self.draw.randrange(1, ADAPTERS + 1),
                self.draw.choice(SCALES) if self.draw.random() < odd else 0.5,
            )
            for _ in range(count)
        ]

    def number(self, low: int, high: int) -> int:
        """Draws a number, usually from range(low, high)."""
        return self.draw.randrange(low, high) if self.draw.random() < 0.9 else self.draw.choice(INTEGERS)

    def tokens(self, low: int, high: int, odd: float) -> list[int]:
        """Draws a list of token ids, each out of range with probability `odd`."""
        size = self.draw.choice([low, self.draw.randrange(low, high), self.draw.randrange(low, high)])
        return [
            self.draw.choice(INTEGERS) if self.draw.random() < odd else self.draw.randrange(VOCAB) for _ in range(size)
        ]

    def _epoch(self) -> int:
        """Returns the last epoch, or in a few cases that of a newer or older process."""
        what = self.draw.random()
        return self.epoch if what < 0.96 else max(-1, self.epoch + self.draw.choice([-1, 1, 2]))

    # ------------------------------------------------------------------------------------------------ the loop

    def send(self, message: ToScheduler) -> None:
        """Sends one message, then accepts all steps that can be planned; audits the scheduler after each of the two."""
        self.now += 1.0
        if isinstance(message, Generate | Hello) and message.epoch > self.epoch:
            self.epoch = message.epoch
            self.asked, self.ended = set(), set()
        if isinstance(message, Generate) and message.epoch == self.epoch:
            self.asked.add(message.request_id)
            self.ended.discard(message.request_id)
        self._receive(self.core.handle(message, self.now))
        self.core.check()
        while (step := self.core.plan(self.now)) is not None:
            self._receive(self.core.drain_outbox())
            self.runner.accept(step)
        self._receive(self.core.drain_outbox())
        self.core.check()

    def answer_one(self) -> bool:
        """Sends one message of the runner to the scheduler. Returns False if the runner has none."""
        if self.runner.events and (not self.runner.queue or self.draw.random() < 0.3):
            self.send(self.runner.deliver(self.draw.randrange(len(self.runner.events))))
        elif self.runner.queue:
            self.send(self.runner.finish())
        else:
            return False
        return True

    def answer_all(self) -> None:
        """Sends the runner's messages until it has none left; fails after 20,000 messages."""
        for _ in range(20_000):
            if not self.answer_one():
                return
        raise AssertionError("not done after 20,000 answers")

    def _receive(self, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, Progress):
                assert message.epoch == self.epoch
                for update in message.updates:
                    assert update.request_id in self.asked
                    if update.finish is not None or update.error is not None:
                        self.ended.add(update.request_id)
            elif isinstance(message, LoadAdapter | UnloadAdapter | EvictAdapter | Step):
                self.runner.accept(message)
            else:
                assert isinstance(message, Capacity | AdapterState)


@pytest.mark.parametrize(("seed", "window"), [(1, 1), (2, 2), (3, 3), (4, 2)])
def test_audit_holds_after_any_message_of_the_tokenizer(seed: int, window: int) -> None:
    world = HostileWorld(seed, window)
    for _ in range(CASES):
        world.send(world.message())
        if world.draw.random() < 0.6:
            world.answer_one()
        if world.draw.random() < 0.002:
            epoch = world.runner.epoch + 1
            world.runner = FakeRunner(world.capacity, world.library, epoch, max_host=4)
            world.send(RunnerReady(epoch=epoch, capacity=world.capacity))
    world.answer_all()
    for adapter_id in range(1, ADAPTERS + 1):
        world.send(PinAdapter(adapter_id, False))
    world.answer_all()
    assert world.asked == world.ended, "a request was never answered"
    last = world.generate(1 << 40, odd=0.0)
    sane = Generate(epoch=world.epoch, request_id=1 << 40, prompt=[1, 2], sampling=last.sampling, stopping=Stopping(3))
    world.send(sane)
    world.answer_all()
    assert 1 << 40 in world.ended
    stats = world.core.stats()
    assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
    assert stats.generation_tokens > 500
