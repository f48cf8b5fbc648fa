"""The prefix cache with the whole core, under any order of events.

The fake runner is the oracle: it records the token, position, lane, tenant and step in each slot of a page, so it fails
at once when a row reads anything but its own prefix or writes a shared page. Wrong tokens are found at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fixtures.scheduling.fake_runner.library import Library, oracle
from fixtures.scheduling.fake_runner.runner import FakeRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    Footprint,
    Generate,
    LoadAdapter,
    Progress,
    RunnerReady,
    Sampling,
    Step,
    Stopping,
    ToScheduler,
    UnloadAdapter,
    Update,
)
from scheduler.core import Scheduler
from scheduler.state import Bounds

CONTENTS = {1: Footprint({"qkv": 1}), 2: Footprint({"qkv": 2}), 3: Footprint({"down": 1, "qkv": 1})}
CONTENTS |= {4: Footprint({"qkv": 1}), 5: Footprint({"down": 1})}
INVOCATIONS = {4: [7, 7], 5: [14, 15, 16, 17, 18]}  # both occur in FAMILIES; one is longer than a page
FAMILIES = [[7] * 24, list(range(24)), [*range(12), *range(50, 62)]]
NAMES, TENANTS, WINDOWS = ["a", "b"], 2, 3


@dataclass
class Asked:
    """A request, and the tokens and end that the scheduler reported for it."""

    message: Generate
    tokens: list[int] = field(default_factory=list)
    end: str = ""

    def take(self, update: Update) -> None:
        assert not self.end
        assert update.index == len(self.tokens)
        assert update.cached_tokens < max(2, len(self.message.prompt))
        self.tokens += update.tokens
        self.end = update.error or update.finish or ""


class AnyOrder(RuleBasedStateMachine):
    """A state machine of requests that share prefixes, adapters that come and go, aborts and runners that die."""

    @initialize(window=st.integers(1, WINDOWS), pages=st.sampled_from([8, 12, 60]))
    def start(self, window: int, pages: int) -> None:
        self.capacity = Capacity(
            kv_pages=pages,
            page_size=4,
            rows=4,
            max_length=40,
            max_batched_tokens=24,
            vocab_size=97,
            max_loras=2,
            rank_pages={"qkv": 4, "down": 2},
            max_lane_pages=4,
        )
        self.window = window
        self.library = Library(dict(CONTENTS), invocations=INVOCATIONS)
        self.runner = FakeRunner(self.capacity, self.library)
        self.core = Scheduler(self.capacity, Bounds(2), window)
        self.asked: dict[int, Asked] = {}
        self.points: dict[str, int] = {}  # name -> adapter id
        self.last_id = 10
        self.send(None)

    def send(self, message: ToScheduler | None) -> None:
        self.take(self.core.drain_outbox() if message is None else self.core.handle(message, 0.0))
        self.core.check()
        while (step := self.core.plan(0.0)) is not None:
            self.take(self.core.drain_outbox())
            self.core.check()
            self.runner.accept(step)
        self.take(self.core.drain_outbox())

    def take(self, messages: list[object]) -> None:
        for message in messages:
            if isinstance(message, Progress):
                for update in message.updates:
                    self.asked[update.request_id].take(update)
            elif not isinstance(message, AdapterState | Capacity):
                assert isinstance(message, LoadAdapter | UnloadAdapter | Step), message
                self.runner.accept(message)

    # ----------------------------------------------------------------------------------------------------- requests

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 24),
        tail=st.lists(st.integers(0, 96), max_size=2) | st.sampled_from([*INVOCATIONS.values()]),
        name=st.sampled_from(["", "a", "b", "a+b"]),
        tenant=st.integers(0, TENANTS - 1),
        tokens=st.sampled_from([1, 3, 9]),
        scores=st.sampled_from([-1, -1, -1, 0]),
    )
    def ask(self, family: int, length: int, tail: list[int], name: str, tenant: int, tokens: int, scores: int) -> None:
        prompt = [*FAMILIES[family][:length], *tail]
        lora = [(self.points[part], 1.0) for part in name.split("+") if part in self.points]
        self.submit(prompt, lora, tenant, tokens, scores)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 7), more=st.integers(0, 96))
    def ask_further(self, which: int, more: int) -> None:
        """Sends the next request of a conversation, if its adapters are still loaded."""
        former = list(self.asked.values())[-1 - which % len(self.asked)]
        prompt = [*former.message.prompt, *former.tokens, more][:30]
        if {i for i, _ in former.message.lora} <= set(self.points.values()):
            self.submit(prompt, former.message.lora, former.message.sampling.seed // 1000, 5, -1)

    def submit(self, prompt: list[int], lora: list[tuple[int, float]], tenant: int, tokens: int, scores: int) -> None:
        number = len(self.asked) + 1
        message = Generate(
            epoch=0,
            request_id=number,
            prompt=prompt,
            lora=lora,
            sampling=Sampling(seed=1000 * tenant + number % 2, prompt_logprobs=scores),
            stopping=Stopping(tokens),
            cache_salt=f"tenant {tenant}",
        )
        self.asked[number] = Asked(message)
        self.send(message)

    @precondition(lambda self: any(not one.end for one in self.asked.values()))
    @rule(which=st.integers(0, 7))
    def abort(self, which: int) -> None:
        going = [number for number, one in self.asked.items() if not one.end]
        self.send(Abort(0, going[which % len(going)]))

    # ----------------------------------------------------------------------------------------------------- adapters

    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(sorted(CONTENTS)))
    def point(self, name: str, content: int) -> None:
        """Loads `content` under the name, which may be new or replace the same or other content."""
        self.last_id += 1
        self.library.twins[self.last_id] = content
        former = self.points.get(name)
        self.points[name] = self.last_id
        self.send(LoadAdapter(adapter_id=self.last_id, path=f"adapters/{self.last_id}"))
        if former is not None:
            self.send(UnloadAdapter(former))

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        if name in self.points:
            self.send(UnloadAdapter(self.points.pop(name)))

    # ----------------------------------------------------------------------------------------------------- the runner

    @precondition(lambda self: self.runner.queue)
    @rule(count=st.integers(1, 4))
    def end_steps(self, count: int) -> None:
        for _ in range(count):
            if self.runner.queue:
                self.send(self.runner.finish())

    @precondition(lambda self: self.runner.events)
    @rule(which=st.integers(0, 3))
    def deliver(self, which: int) -> None:
        self.send(self.runner.deliver(which % len(self.runner.events)))

    @rule()
    def die(self) -> None:
        self.runner = FakeRunner(self.capacity, self.library, self.runner.epoch + 1)
        self.send(RunnerReady(epoch=self.runner.epoch, capacity=self.capacity))

    @invariant()
    def the_window_is_kept(self) -> None:
        if hasattr(self, "runner"):
            assert len(self.runner.queue) <= self.window

    def teardown(self) -> None:
        """Runs all requests to their ends; asserts that each got the tokens that it would get without the others."""
        if not hasattr(self, "runner"):
            return
        while self.runner.queue or self.runner.events:
            self.send(self.runner.finish() if self.runner.queue else self.runner.deliver(0))
        for number, one in self.asked.items():
            tokens, finish, _ = oracle(one.message, self.library, self.capacity)
            assert one.end, f"request {number} did not end"
            if one.end in ("stop", "length"):
                assert not self.library.mixes_activated(one.message.lora)
            if one.end == "abort":
                assert one.tokens == tokens[: len(one.tokens)]
            elif one.end in ("stop", "length"):
                assert (one.tokens, one.end) == (tokens, finish)
            elif "cannot be mixed" in one.end:
                assert self.library.mixes_activated(one.message.lora, known=False), one.message.lora
            elif "died again and again" in one.end:
                assert self.runner.epoch >= 5, "the runner died while it was alone, each time at one position"
            else:
                assert "at most" in one.end, one.end


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(derandomize=True, max_examples=150, stateful_step_count=50, deadline=None)
