"""scheduler.loading.disk_loader in scripted cases: host cache limits, order of loads, evictions, missing files."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.scheduling.by_hand import add_adapter, done, generate, new_core, plan_of
from fixtures.scheduling.loads_by_hand import (
    answer_eviction,
    answer_load,
    core_without_free_pages,
    load,
    of_kind,
    states_of,
)

from engine.messages import (
    AdapterState,
    EvictAdapter,
    LoadAdapter,
    PinAdapter,
    Progress,
    UnloadAdapter,
)
from scheduler.state import Bounds


def test_spare_copies_are_evicted_above_the_count() -> None:
    core = core_without_free_pages(max_loaded_loras=2)
    load(core, 1)
    assert states_of(answer_load(core, 1)) == [(1, "host")]
    assert load(core, 2) == [EvictAdapter(1)], "the load begins when the eviction is answered"
    sent = answer_eviction(core, 1)
    assert (states_of(sent), [sent_load.adapter_id for sent_load in of_kind(sent, LoadAdapter)]) == ([(1, "disk")], [2])
    stats = core.stats()
    assert (stats.host_adapters, stats.host_evictions, stats.adapter_loads) == (2, 1, 2)


@pytest.mark.parametrize(("policy", "first"), [("lru", 2), ("fifo", 1)])
def test_copies_are_evicted_once_bytes_are_known_to_exceed(policy: Any, first: int) -> None:
    core = new_core(bounds=Bounds(2, lora_host_bytes=250, eviction_policy=policy), rank_pages={"qkv": 4})
    add_adapter(core, 3)
    for adapter_id in (1, 2):
        load(core, adapter_id)
        answer_load(core, adapter_id)
        step = core.plan(0.0)
        assert step is not None
        done(core, step)
        core.handle(AdapterState(adapter_id=adapter_id, state="resident"), 0.0)
    core.handle(generate(1, max_tokens=1, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core))
    load(core, 4)
    sent = answer_load(core, 4)
    # copy 3 has no bytes but is the oldest: both policies evict it first, then a copy that frees enough bytes
    assert [evict.adapter_id for evict in of_kind(sent, EvictAdapter)] == [3, first]
    answer_eviction(core, 3)
    assert answer_eviction(core, first) == [], "it is still resident"
    assert core.stats().host_bytes == 200
    assert first in core.stats().resident


def test_adapter_larger_than_the_limit_is_refused() -> None:
    core = new_core(bounds=Bounds(2, lora_host_bytes=250))
    load(core, 1)
    sent = answer_load(core, 1, size=300)
    assert of_kind(sent, EvictAdapter) == [EvictAdapter(1)]
    (state,) = of_kind(sent, AdapterState)
    assert (state.state, "--lora-host-memory" in state.error) == ("failed", True)
    assert answer_eviction(core, 1) == []
    assert core.stats().host_bytes == 0


def test_request_reloads_its_adapter_by_its_revision() -> None:
    core = core_without_free_pages(max_loaded_loras=2)
    load(core, 1, roots=["/srv"])
    answer_load(core, 1)
    load(core, 2)
    answer_eviction(core, 1)
    answer_load(core, 2)
    core.handle(PinAdapter(9, False), 0.0)
    sent = core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    assert sent == [EvictAdapter(9)] or sent == [EvictAdapter(2)]
    sent = answer_eviction(core, sent[0].adapter_id)
    assert of_kind(sent, LoadAdapter) == [LoadAdapter(adapter_id=1, path="p1", revision="r1", roots=["/srv"])]
    assert (1, "loading") in states_of(sent)
    answer_load(core, 1)
    assert [fill.adapter_id for fill in plan_of(core).fills] == [1]


def test_missing_files_fail_one_request_and_are_retried() -> None:
    core = core_without_free_pages(max_loaded_loras=2)
    load(core, 1)
    answer_load(core, 1)
    load(core, 2)
    answer_eviction(core, 1)
    answer_load(core, 2)
    for request_id in (1, 2):
        sent = core.handle(generate(request_id, lora=[(1, 1.0)]), 0.0)
        sent += answer_eviction(core, 2) if of_kind(sent, EvictAdapter) else []
        assert len(of_kind(sent, LoadAdapter)) == 1
        sent = core.handle(AdapterState(adapter_id=1, state="failed", error="p1: no such file"), 0.0)
        core.check()
        (progress,) = of_kind(sent, Progress)
        assert [(u.request_id, u.error) for u in progress.updates] == [(request_id, "p1: no such file")]
        assert [(s.state, s.error) for s in of_kind(sent, AdapterState)] == [("disk", "p1: no such file")]
        assert of_kind(sent, LoadAdapter) == [], "no request waits for it any more"


def test_loads_are_few_and_alternate_with_requested_ones() -> None:
    core = new_core()
    sent = [message for adapter_id in range(1, 8) for message in load(core, adapter_id)]
    assert [sent_load.adapter_id for sent_load in sent] == [1, 2, 3, 4]
    core.handle(generate(1, lora=[(7, 1.0)]), 0.0)
    started = [
        sent_load.adapter_id for i in (1, 2) for sent_load in of_kind(answer_load(core, i, pages=2), LoadAdapter)
    ]
    assert sorted(started) == [5, 7], "loads for requests alternate with requested loads"


def test_preload_comes_before_later_requests() -> None:
    core = new_core(rank_pages={"qkv": 2})
    add_adapter(core, 1, pages=2)
    core.handle(generate(1, prompt=1, max_tokens=2, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    load(core, 2, preload=True)
    answer_load(core, 2, pages=2)
    load(core, 3)
    answer_load(core, 3, pages=2)
    core.handle(generate(2, lora=[(3, 1.0)]), 0.0)
    done(core, step)
    step = plan_of(core)
    assert step.fills == []
    core.handle(AdapterState(adapter_id=1, state="resident"), 0.0)  # the adapter is resident already
    done(core, step)
    assert [fill.adapter_id for fill in plan_of(core).fills] == [2]


def test_preload_that_never_fits_is_reported() -> None:
    core = core_without_free_pages()
    load(core, 1, preload=True)
    answer_load(core, 1)
    assert core.plan(0.0) is None
    (state,) = of_kind(core.drain_outbox(), AdapterState)
    assert (state.state, "pinned" in state.error) == ("host", True)


def test_unload_waits_for_a_load_but_not_on_disk() -> None:
    core = core_without_free_pages(max_loaded_loras=2)
    load(core, 1)
    answer_load(core, 1)
    load(core, 2)
    answer_eviction(core, 1)
    sent = core.handle(UnloadAdapter(1), 0.0)
    assert (states_of(sent), of_kind(sent, UnloadAdapter)) == ([(1, "draining"), (1, "gone")], [UnloadAdapter(1)])
    assert states_of(core.handle(UnloadAdapter(2), 0.0)) == [(2, "draining")]
    assert of_kind(answer_load(core, 2), UnloadAdapter) == [UnloadAdapter(2)]
    assert states_of(core.handle(AdapterState(adapter_id=2, state="gone"), 0.0)) == [(2, "gone")]
    core.check()


@pytest.mark.parametrize("scales", [(float("nan"), 1.0), (float("inf"), float("-inf")), (1e308, 1e308)])
def test_scales_must_be_finite(scales: tuple[float, float]) -> None:
    core = new_core()
    (progress,) = core.handle(generate(1, lora=[(1, scales[0]), (1, scales[1])]), 0.0)
    assert isinstance(progress, Progress)
    assert "finite" in (progress.updates[0].error or "")
    core.check()


def test_mix_larger_than_the_host_cache_is_refused() -> None:
    core = new_core(bounds=Bounds(2, max_loaded_loras=1))
    load(core, 1)
    load(core, 2)
    (progress,) = of_kind(core.handle(generate(1, lora=[(1, 0.5), (2, 0.5)]), 0.0), Progress)
    assert "--max-loaded-loras" in (progress.updates[0].error or "")
