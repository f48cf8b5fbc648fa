"""scheduler.core in scripted cases: which messages each call sends."""

from __future__ import annotations

import pytest
from fixtures.scheduling.by_hand import add_adapter, capacity_of, done, generate, new_core, plan_of

from engine.messages import (
    Abort,
    AdapterState,
    Footprint,
    Generate,
    Hello,
    LoadAdapter,
    Progress,
    RunnerReady,
    Sampling,
    StepDone,
    Update,
)
from scheduler.state import Bounds


def test_prefill_then_decode_then_length() -> None:
    core = new_core()
    core.handle(generate(1, max_tokens=2), 0.0)
    first = plan_of(core)
    assert [(r.row, r.generation, r.prompt_length, r.history) for r in first.new_rows] == [(0, 1, 3, [])]
    (chunk,) = first.chunks
    assert (chunk.start, chunk.length, chunk.tokens, chunk.samples, len(chunk.pages)) == (0, 3, [10, 11, 12], True, 1)
    assert core.plan(0.0) is None, "the window is full"
    assert done(core, first) == [Update(request_id=1, index=0, tokens=[50])]
    second = plan_of(core)
    (chunk,) = second.chunks
    assert (chunk.start, chunk.length, chunk.tokens, chunk.pages, second.new_rows) == (3, 1, [], [], [])
    assert done(core, second) == [Update(request_id=1, index=1, tokens=[50], finish="length")]
    assert core.plan(0.0) is None
    assert (core.stats().running, core.stats().kv_pages_used) == (0, 0)


def test_nothing_is_planned_beyond_the_last_token() -> None:
    core = new_core(window=3)
    core.handle(generate(1, max_tokens=2), 0.0)
    one, two = plan_of(core), plan_of(core)
    assert core.plan(0.0) is None
    assert done(core, one)[0].finish is None
    assert done(core, two)[0].finish == "length"


def test_long_prompts_are_chunked_behind_decodes() -> None:
    core = new_core()
    core.handle(generate(1), 0.0)
    done(core, plan_of(core))
    core.handle(generate(2, prompt=12), 0.0)
    step = plan_of(core)
    assert [(c.row, c.start, c.length, c.samples) for c in step.chunks] == [(0, 3, 1, True), (1, 0, 7, False)]
    assert len(step.chunks[1].pages) == 3
    assert [update.request_id for update in done(core, step)] == [1]
    step = plan_of(core)
    assert [(c.row, c.start, c.length, c.samples) for c in step.chunks] == [(0, 4, 1, True), (1, 7, 5, True)]
    assert len(step.chunks[0].pages) == 1


@pytest.mark.parametrize(("flag", "bound"), [(None, 128), (32, 32)])
def test_long_prompt_does_not_delay_decodes(flag: int | None, bound: int) -> None:
    sizes = {"max_batched_tokens": 512, "max_length": 2000, "kv_pages": 1000}
    core = new_core(bounds=Bounds(2, max_prefill_tokens=flag), **sizes)
    core.handle(generate(1, prompt=600, max_tokens=4), 0.0)
    step = plan_of(core)
    assert [chunk.length for chunk in step.chunks] == [512], "no row decodes"
    done(core, step)
    done(core, plan_of(core))
    core.handle(generate(2, prompt=1500), 0.0)
    for _ in range(3):
        step = plan_of(core)
        assert [chunk.length for chunk in step.chunks] == [1, bound]
        done(core, step)
    assert [chunk.length for chunk in plan_of(core).chunks] == [512]


def test_replay_continues_after_the_generated_tokens() -> None:
    core = new_core()
    core.handle(generate(1, max_tokens=3, generated=[1, 2], sampling=Sampling(repetition_penalty=1.1)), 0.0)
    step = plan_of(core)
    assert step.chunks[0].tokens == [10, 11, 12, 1, 2]
    assert step.new_rows[0].history == [10, 11, 12, 1, 2]
    assert done(core, step) == [Update(request_id=1, index=2, tokens=[50], finish="length")]


def test_replay_with_its_last_token_ends_at_once() -> None:
    core = new_core()
    (progress,) = core.handle(generate(1, generated=[1, 7], end_ids=[7]), 0.0)
    assert progress == Progress(0, [Update(request_id=1, index=2, finish="stop", stop_reason=7)])
    core.check()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (generate(1, prompt=64), "64 tokens, but at most 63"),
        (generate(1, prompt=0), "empty"),
        (generate(1, lora=[(9, 1.0)]), "adapter 9 is not loaded"),
    ],
)
def test_request_that_can_never_run_is_refused(message: Generate, text: str) -> None:
    core = new_core()
    (progress,) = core.handle(message, 0.0)
    assert isinstance(progress, Progress)
    assert text in (progress.updates[0].error or "")
    core.check()


@pytest.mark.parametrize("started", [False, True])
def test_abort_frees_everything_and_is_answered_once(started: bool) -> None:
    core = new_core()
    core.handle(generate(1), 0.0)
    step = plan_of(core) if started else None
    assert core.handle(Abort(0, 1), 0.0) == [Progress(0, [Update(request_id=1, index=0, finish="abort")])]
    core.check()
    assert core.handle(Abort(0, 1), 0.0) == []
    if step is not None:
        assert done(core, step) == []
    assert core.stats().kv_pages_used == 0


def test_preempted_request_continues_with_its_tokens() -> None:
    core = new_core(kv_pages=4, max_batched_tokens=16)
    core.handle(generate(1, prompt=4, max_tokens=9), 0.0)
    core.handle(generate(2, prompt=4, max_tokens=9), 0.0)
    seen = [plan_of(core)]
    while core.stats().preemptions == 0:
        done(core, seen[-1])
        seen.append(plan_of(core))
    assert [chunk.row for chunk in seen[-1].chunks] == [0]
    while len(seen[-1].new_rows) == 0:
        done(core, seen[-1])
        seen.append(plan_of(core))
    (back,) = seen[-1].chunks
    assert (back.start, back.tokens) == (4, [50] * back.length), "its first page was kept"
    assert (seen[-1].new_rows[0].generation, back.samples) == (2, True)
    (update,) = done(core, seen[-1])
    assert (update.request_id, update.index) == (2, back.length)


def test_memory_blocked_head_is_not_passed() -> None:
    core = new_core(kv_pages=6, max_batched_tokens=16)
    core.handle(generate(1, prompt=12), 0.0)
    done(core, plan_of(core))
    core.handle(generate(2, prompt=12), 0.0)
    core.handle(generate(3, prompt=1), 0.0)
    assert plan_of(core).new_rows == []
    assert core.stats().waiting == 2


def test_priority_comes_before_arrival() -> None:
    core = new_core(max_batched_tokens=3)
    core.handle(generate(1, priority=1), 0.0)
    core.handle(generate(2, priority=0), 0.0)
    assert done(core, plan_of(core))[0].request_id == 2


def test_new_runner_gets_adapters_and_rows_again() -> None:
    core = new_core(window=2)
    add_adapter(core, 1)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    one, two = plan_of(core), plan_of(core)
    done(core, one)
    smaller = capacity_of(kv_pages=8)
    sent = core.handle(RunnerReady(epoch=1, capacity=smaller), 0.0)
    core.check()
    assert sent[0] == smaller
    assert sent[1] == LoadAdapter(adapter_id=1, path="p", revision="r1")
    assert core.handle(StepDone(epoch=0, id=two.id, tokens=[9]), 0.0) == []
    assert core.plan(0.0) is None
    loaded = AdapterState(adapter_id=1, state="host", revision="r1", footprint=Footprint({"qkv": 1}), epoch=1)
    core.handle(loaded, 0.0)
    assert core.handle(AdapterState(adapter_id=1, state="resident"), 0.0) == [], "a late message of the dead runner"
    step = plan_of(core)
    assert (step.epoch, [fill.at_once for fill in step.fills]) == (1, [True])
    assert step.chunks[0].tokens == [10, 11, 12, 50]
    assert core.handle(RunnerReady(epoch=0, capacity=smaller), 0.0) == []


def test_smaller_runner_ends_requests_that_no_longer_fit() -> None:
    core = new_core()
    core.handle(generate(1, prompt=20), 0.0)
    core.handle(generate(2, prompt=5, generated=[1, 2, 3]), 0.0)
    sent = core.handle(RunnerReady(epoch=1, capacity=capacity_of(max_length=8)), 0.0)
    (updates,) = [message.updates for message in sent if isinstance(message, Progress)]
    assert [(u.request_id, u.finish, bool(u.error)) for u in updates] == [(1, None, True), (2, "length", False)]
    core.check()


def test_new_tokenizer_process_ends_the_old_requests() -> None:
    core = new_core()
    core.handle(generate(1), 0.0)
    step = plan_of(core)
    sent = core.handle(Hello("tokenizer", 1, "ipc://t.1"), 0.0)
    assert sent == [capacity_of()]
    assert core.handle(generate(2), 0.0) == []
    assert core.stats().waiting == 0
    core.handle(generate(1, epoch=1), 0.0)
    assert done(core, step) == []
    sent = core.handle(StepDone(epoch=0, id=plan_of(core).id, tokens=[5]), 0.0)
    assert sent == [Progress(1, [Update(request_id=1, index=0, tokens=[5])])]


def test_request_that_arrives_twice_runs_once() -> None:
    core = new_core()
    core.handle(generate(1), 0.0)
    assert core.handle(generate(1), 0.0) == []
    assert len(plan_of(core).new_rows) == 1


def test_stats_count_running_and_waiting_requests() -> None:
    core = new_core(rows=1)
    add_adapter(core, 1)
    for request_id in (1, 2):
        core.handle(generate(request_id, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core), seconds=0.5)
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.running_adapters, stats.waiting_adapters) == (1, 1, {1: 1}, {1: 1})
    assert (stats.resident, stats.rank_pages_used, stats.adapter_hits, stats.adapter_fills) == ([1], {"qkv": 1}, 2, 1)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.steps) == (3, 1, 2)
    assert stats.step_seconds == [0.0, 0.5]
    assert core.stats().step_seconds == []
