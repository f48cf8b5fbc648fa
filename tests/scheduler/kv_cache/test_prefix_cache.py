"""The prefix cache, in scripted cases with the whole core."""

from __future__ import annotations

import pytest
from fixtures.scheduling.by_hand import add_adapter, capacity_of, done, generate, new_core, plan_of

from engine.messages import (
    AdapterState,
    Footprint,
    Generate,
    LoadAdapter,
    LogprobIds,
    Progress,
    RunnerReady,
    Sampling,
    StepDone,
    UnloadAdapter,
    Update,
)
from scheduler.core import Scheduler


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
    _run(core, generate(1, prompt=6, max_tokens=8, cache_salt="t"))  # generates 50, 50, ...
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
    _load_alora(core, 1, [17, 18])  # at position 7 of the prompt 10, 11, ...
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
