"""Well-typed nonsense from the tokenizer's side: the scheduler's books balance after every message, and it goes on."""

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


class Hostile:
    """A scheduler between a runner that believes nothing and a tokenizer process that says anything."""

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
        self._take(self.core.drain_outbox())

    # ------------------------------------------------------------------------------------------------- messages

    def message(self) -> ToScheduler:
        """What a tokenizer process may say, and should not."""
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
        """With each of its fields odd by this chance."""
        return Generate(
            epoch=self._epoch() if odd else self.epoch,
            request_id=request_id,
            prompt=self.some(0 if odd else 1, 30, odd / 10),
            generated=self.some(0, 3, odd / 10) if self.draw.random() < odd else [],
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
                self.some(0, 9, odd),
            ),
            priority=self.number(0, 2) if self.draw.random() < odd else 0,
            cache_salt=self.mutator.text(),
        )

    def lora(self, odd: float) -> list[tuple[int, float]]:
        """A selection: none, one, a mix, strangers, the same twice, absurd scales."""
        count = self.draw.choice([0, 0, 1, 1, 1, 2, 5])
        return [
            (
                self.number(0, 50) if self.draw.random() < odd else self.draw.randrange(1, ADAPTERS + 1),
                self.draw.choice(SCALES) if self.draw.random() < odd else 0.5,
            )
            for _ in range(count)
        ]

    def number(self, low: int, high: int) -> int:
        """Mostly in the range."""
        return self.draw.randrange(low, high) if self.draw.random() < 0.9 else self.draw.choice(INTEGERS)

    def some(self, low: int, high: int, odd: float) -> list[int]:
        """Token ids; some may be none."""
        size = self.draw.choice([low, self.draw.randrange(low, high), self.draw.randrange(low, high)])
        return [
            self.draw.choice(INTEGERS) if self.draw.random() < odd else self.draw.randrange(VOCAB) for _ in range(size)
        ]

    def _epoch(self) -> int:
        """Mostly the last one; now and then another process comes, or an old one's word."""
        what = self.draw.random()
        return self.epoch if what < 0.96 else max(-1, self.epoch + self.draw.choice([-1, 1, 2]))

    # ------------------------------------------------------------------------------------------------ the loop

    def say(self, message: ToScheduler) -> None:
        """One message, then whatever can be planned; the books are proved after it."""
        self.now += 1.0
        if isinstance(message, Generate | Hello) and message.epoch > self.epoch:
            self.epoch = message.epoch
            self.asked, self.ended = set(), set()
        if isinstance(message, Generate) and message.epoch == self.epoch:
            self.asked.add(message.request_id)
            self.ended.discard(message.request_id)
        self._take(self.core.handle(message, self.now))
        self.core.check()
        while (step := self.core.plan(self.now)) is not None:
            self._take(self.core.drain_outbox())
            self.runner.accept(step)
        self._take(self.core.drain_outbox())
        self.core.check()

    def work(self) -> bool:
        """The runner does one thing; whether it had one."""
        if self.runner.events and (not self.runner.queue or self.draw.random() < 0.3):
            self.say(self.runner.deliver(self.draw.randrange(len(self.runner.events))))
        elif self.runner.queue:
            self.say(self.runner.finish())
        else:
            return False
        return True

    def settle(self) -> None:
        """Everything that can end ends, in bounded time."""
        for _ in range(20_000):
            if not self.work():
                return
        raise AssertionError("20,000 steps and no end")

    def _take(self, messages: list[Any]) -> None:
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
def test_the_books_balance_whatever_is_said(seed: int, window: int) -> None:
    world = Hostile(seed, window)
    for _ in range(CASES):
        world.say(world.message())
        if world.draw.random() < 0.6:
            world.work()
        if world.draw.random() < 0.002:
            epoch = world.runner.epoch + 1
            world.runner = FakeRunner(world.capacity, world.library, epoch, max_host=4)
            world.say(RunnerReady(epoch=epoch, capacity=world.capacity))
    world.settle()
    for adapter_id in range(1, ADAPTERS + 1):
        world.say(PinAdapter(adapter_id, False))
    world.settle()
    assert world.asked == world.ended, "a request was never answered"
    last = world.generate(1 << 40, odd=0.0)
    sane = Generate(epoch=world.epoch, request_id=1 << 40, prompt=[1, 2], sampling=last.sampling, stopping=Stopping(3))
    world.say(sane)
    world.settle()
    assert 1 << 40 in world.ended
    stats = world.core.stats()
    assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
    assert stats.generation_tokens > 500
