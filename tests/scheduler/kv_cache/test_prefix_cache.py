"""Shared prefixes through the whole core: by hand, and under any order of events.

The fake runner is the oracle: each slot of a page records its token, position, lane, tenant and step, so it fails at
once when a row reads anything but its own prefix or writes a shared page, and a wrong token shows at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from fixtures.scheduling.by_hand import add_adapter, capacity_of, done, generate, new_core, plan_of
from fixtures.scheduling.fake_runner import FakeRunner, Library, oracle
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
    LogprobIds,
    Progress,
    RunnerReady,
    Sampling,
    Step,
    StepDone,
    Stopping,
    ToScheduler,
    UnloadAdapter,
    Update,
)
from scheduler.core import Scheduler
from scheduler.state import Bounds


def _run(core: Scheduler, message: Generate) -> tuple[int, int]:
    """Runs a request to its end. Returns (where its first chunk began, the cached tokens that were reported)."""
    core.handle(message, 0.0)
    step = plan_of(core)
    (chunk,) = step.chunks
    updates = done(core, step)
    reported = [update.cached_tokens for update in updates]
    while core.stats().running:
        updates = done(core, plan_of(core))
        reported += [update.cached_tokens for update in updates]
    assert reported[1:] == [0] * len(reported[1:]), "cached tokens are reported once"
    return chunk.start, reported[0]


def test_cached_tokens_are_reported_with_the_first_token() -> None:
    core = new_core(max_batched_tokens=32)
    assert _run(core, generate(1, prompt=10, cache_salt="t")) == (0, 0)
    assert _run(core, generate(2, prompt=10, cache_salt="t")) == (8, 8)
    assert _run(core, generate(3, prompt=9, cache_salt="u")) == (0, 0)
    stats = core.stats()
    assert (stats.cached_tokens, stats.prompt_tokens, stats.kv_pages_used) == (8, 29, 0)
    assert stats.kv_pages_cached == 2 * 3, (
        "10 prompt and 3 computed generated tokens have 3 full pages, and so have 9 and 3"
    )


def test_replayed_tokens_are_not_reported_as_cached() -> None:
    core = new_core(max_batched_tokens=32)
    _run(core, generate(1, prompt=6, max_tokens=8, cache_salt="t"))  # then 50, 50, ...
    replay = generate(2, prompt=6, max_tokens=8, generated=[50] * 7, cache_salt="t")
    assert _run(core, replay) == (12, 6)


@pytest.mark.parametrize("lora", [[(1, 1.0)], [(1, 0.5)], [(1, 0.5), (2, 0.5)], []])
def test_adapters_scales_and_mixes_share_no_pages(lora: list[tuple[int, float]]) -> None:
    core = new_core(max_batched_tokens=32)
    add_adapter(core, 1)
    add_adapter(core, 2)
    assert _run(core, generate(1, prompt=9, lora=[(1, 1.0)], cache_salt="t")) == (0, 0)
    start = 8 if lora == [(1, 1.0)] else 0
    assert _run(core, generate(2, prompt=9, lora=lora, cache_salt="t")) == (start, start)
    assert _run(core, generate(3, prompt=9, lora=lora[::-1], cache_salt="t")) == (8, 8)


def _load_alora(core: Scheduler, adapter_id: int, invocation: list[int]) -> None:
    """Loads an activated LoRA with this invocation, and makes it resident."""
    load = LoadAdapter(adapter_id=adapter_id, path="p")
    core.handle(load, 0.0)
    card = AdapterState(
        adapter_id=adapter_id,
        state="host",
        revision=f"r{adapter_id}",
        footprint=Footprint({"qkv": 1}),
        invocation=invocation,
    )
    core.handle(card, 0.0)
    if (step := core.plan(0.0)) is not None:
        done(core, step)
        core.handle(AdapterState(adapter_id=adapter_id, state="resident"), 0.0)


def test_chunk_ends_at_the_invocation_where_the_lane_begins() -> None:
    core = new_core(max_batched_tokens=12)
    _load_alora(core, 1, [17, 18])  # of the prompt 10, 11, ...: position 7
    core.handle(generate(1, prompt=20, lora=[(1, 1.0)], sampling=Sampling(prompt_logprobs=0)), 0.0)
    parts = []
    for _ in range(4):
        step = plan_of(core)
        (chunk,) = step.chunks
        parts.append((chunk.start, chunk.length, chunk.lane, chunk.samples))
        scores = {0: [LogprobIds(t, -1.0, []) for t in chunk.tokens[1:]]} if chunk.scores else {}
        done(core, step, prompt_logprobs=scores)
    assert parts == [(0, 7, 0, False), (7, 12, 1, False), (19, 1, 1, True), (20, 1, 1, True)]


def test_alora_and_base_share_pages_before_the_invocation() -> None:
    core = new_core(kv_pages=700, max_length=2200, max_batched_tokens=2200)
    _load_alora(core, 1, [10 + 2050])
    _load_alora(core, 2, [10 + 2050, 10 + 2051])
    for number, (lora, cached) in enumerate([([], 0), ([(1, 1.0)], 2048), ([(2, 1.0)], 2048), ([(1, 1.0)], 2060)]):
        assert _run(core, generate(number, prompt=2061, lora=lora, cache_salt="t")) == (cached, cached)
    for number, (lora, cached) in enumerate([([(2, 1.0)], 0), ([], 2048), ([(1, 1.0)], 2048)]):
        assert _run(core, generate(10 + number, prompt=2061, lora=lora, cache_salt="u")) == (cached, cached)
    assert core.stats().cached_tokens == 2048 * 4 + 2060


def test_alora_request_without_invocation_runs_as_the_base() -> None:
    core = new_core(max_batched_tokens=32)
    _load_alora(core, 1, [99])
    assert _run(core, generate(1, prompt=9, cache_salt="t")) == (0, 0)
    core.handle(generate(2, prompt=9, lora=[(1, 1.0)], cache_salt="t"), 0.0)
    core.handle(UnloadAdapter(1), 0.0)
    step = plan_of(core)
    assert ([chunk.lane for chunk in step.chunks], step.chunks[0].start, step.lanes) == ([0], 8, [])
    assert core.stats().running_adapters == {1: 1}, "the adapter counts the request, and stays until it ends"
    sent: list[object] = []
    while core.stats().running:
        sent += core.handle(StepDone(epoch=0, id=step.id, tokens=[50]), 0.0)
        step = core.plan(0.0) or step
    assert sent[-1] == UnloadAdapter(1)


def test_requests_are_rekeyed_when_the_first_load_names_an_alora() -> None:
    core = new_core(max_batched_tokens=64)
    core.handle(LoadAdapter(adapter_id=1, path="p"), 0.0)
    core.handle(LoadAdapter(adapter_id=2, path="q"), 0.0)
    for number, (prompt, lora) in enumerate([(9, [(1, 1.0)]), (3, [(1, 1.0)]), (9, [(1, 0.5), (2, 0.5)])]):
        core.handle(generate(number, prompt=prompt, lora=lora), 0.0)
    card = AdapterState(adapter_id=1, state="host", revision="r1", footprint=Footprint({"qkv": 1}), invocation=[15])
    sent = core.handle(card, 0.0)
    core.check()
    (progress,) = [message for message in sent if isinstance(message, Progress)]
    assert [update.request_id for update in progress.updates] == [2]
    assert "cannot be mixed" in (progress.updates[0].error or "")
    step = plan_of(core)
    assert [(chunk.length, chunk.lane, chunk.samples) for chunk in step.chunks] == [(5, 0, False), (3, 0, True)]
    done(core, step)
    assert [(c.length, c.lane, c.samples) for c in plan_of(core).chunks] == [(1, 0, True), (4, 1, True)]


def test_unloaded_adapter_leaves_no_pages() -> None:
    core = new_core(max_batched_tokens=32)
    add_adapter(core, 1)
    _run(core, generate(1, prompt=9, lora=[(1, 1.0)]))
    _run(core, generate(2, prompt=9))
    assert core.stats().kv_pages_cached == 6
    core.handle(UnloadAdapter(1), 0.0)
    core.check()
    assert core.stats().kv_pages_cached == 3


def test_preempted_request_finds_its_pages_and_reports_none() -> None:
    core = new_core(kv_pages=4, max_batched_tokens=32)
    core.handle(generate(1, prompt=4, max_tokens=9), 0.0)
    core.handle(generate(2, prompt=4, max_tokens=9), 0.0)
    updates, starts = list[Update](), list[int]()
    while core.stats().running or core.stats().waiting:
        step = plan_of(core)
        starts += [chunk.start for chunk in step.chunks if chunk.row in {new.row for new in step.new_rows}]
        updates += done(core, step)
    assert core.stats().preemptions > 0
    assert max(starts) >= 4
    assert not any(update.cached_tokens for update in updates)


def test_new_runner_has_no_prefixes() -> None:
    core = new_core(max_batched_tokens=32)
    _run(core, generate(1, prompt=9, cache_salt="t"))
    core.handle(generate(2, prompt=9, cache_salt="t"), 0.0)
    assert plan_of(core).chunks[0].start == 8
    ready = RunnerReady(epoch=1, capacity=capacity_of(max_batched_tokens=32))
    core.handle(ready, 0.0)
    assert plan_of(core).chunks[0].start == 0


# ------------------------------------------------------------------------------------------- any order of events

CONTENTS = {1: Footprint({"qkv": 1}), 2: Footprint({"qkv": 2}), 3: Footprint({"down": 1, "qkv": 1})}
CONTENTS |= {4: Footprint({"qkv": 1}), 5: Footprint({"down": 1})}
INVOCATIONS = {4: [7, 7], 5: [14, 15, 16, 17, 18]}  # contained in the families; one is longer than a page
FAMILIES = [[7] * 24, list(range(24)), [*range(12), *range(50, 62)]]
NAMES, TENANTS, WINDOWS = ["a", "b"], 2, 3


@dataclass
class Asked:
    """A request, and what the scheduler reported for it."""

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
    """Requests that share prefixes; adapters loaded, unloaded and replaced under a name; aborts; dead runners."""

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
        self.take(self.core.take() if message is None else self.core.handle(message, 0.0))
        self.core.check()
        while (step := self.core.plan(0.0)) is not None:
            self.take(self.core.take())
            self.core.check()
            self.runner.accept(step)
        self.take(self.core.take())

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
        """A conversation continues, if its adapter is still loaded."""
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
        """Points the name to these bytes; it may have been new, or have pointed to other bytes or the same."""
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
        """All requests end, with the tokens that each would have had alone."""
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
