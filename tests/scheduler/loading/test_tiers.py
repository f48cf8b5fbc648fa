"""The host tier through the core by hand: bounds, loads in order, evictions, files that are gone, twins."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.scheduling.by_hand import add_adapter, capacity_of, done, generate, new_core, plan_of

from engine.messages import (
    AdapterState,
    EvictAdapter,
    Footprint,
    LoadAdapter,
    PinAdapter,
    Progress,
    RunnerReady,
    UnloadAdapter,
)
from scheduler.core import Scheduler
from scheduler.state import Bounds


def _of(messages: list[Any], kind: type[Any]) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


def _states(messages: list[Any]) -> list[tuple[int, str]]:
    return [(state.adapter_id, state.state) for state in _of(messages, AdapterState)]


def _host(core: Scheduler, adapter_id: int, revision: str = "", size: int = 100, pages: int = 1) -> list[Any]:
    card = AdapterState(
        adapter_id=adapter_id,
        state="host",
        revision=revision or f"r{adapter_id}",
        footprint=Footprint({"qkv": pages}),
        bytes=size,
    )
    sent = core.handle(card, 0.0)
    core.check()
    return sent


def _load(core: Scheduler, adapter_id: int, **fields: Any) -> list[Any]:
    sent = core.handle(LoadAdapter(adapter_id=adapter_id, path=f"p{adapter_id}", **fields), 0.0)
    core.check()
    return sent


def _disk(core: Scheduler, adapter_id: int) -> list[Any]:
    sent = core.handle(AdapterState(adapter_id=adapter_id, state="disk"), 0.0)
    core.check()
    return sent


def _no_pool(**bounds: Any) -> Scheduler:
    """A core whose adapters stay on the host: the pool is full of a pinned one."""
    core = new_core(bounds=Bounds(2, **bounds), rank_pages={"qkv": 1})
    _load(core, 9, pinned=True)
    _host(core, 9, size=0)
    done(core, plan_of(core))
    core.handle(AdapterState(adapter_id=9, state="resident"), 0.0)
    return core


def test_the_count_is_a_bound_and_the_idle_go() -> None:
    core = _no_pool(max_loaded_loras=2)
    _load(core, 1)
    assert _states(_host(core, 1)) == [(1, "host")]
    assert _load(core, 2) == [EvictAdapter(1)], "the load begins when there is a place"
    sent = _disk(core, 1)
    assert (_states(sent), [load.adapter_id for load in _of(sent, LoadAdapter)]) == ([(1, "disk")], [2])
    stats = core.stats()
    assert (stats.host_adapters, stats.host_evictions, stats.adapter_loads) == (2, 1, 2)


@pytest.mark.parametrize(("policy", "first"), [("lru", 2), ("fifo", 1)])
def test_bytes_are_a_bound_once_they_are_known(policy: Any, first: int) -> None:
    core = new_core(bounds=Bounds(2, lora_host_bytes=250, eviction_policy=policy), rank_pages={"qkv": 4})
    add_adapter(core, 3)
    for adapter_id in (1, 2):
        _load(core, adapter_id)
        _host(core, adapter_id)
        step = core.plan(0.0)
        assert step is not None
        done(core, step)
        core.handle(AdapterState(adapter_id=adapter_id, state="resident"), 0.0)
    core.handle(generate(1, max_tokens=1, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core))
    _load(core, 4)
    sent = _host(core, 4)
    # 3 takes no bytes here, but it is the oldest: it goes first by either policy, then who frees enough
    assert [evict.adapter_id for evict in _of(sent, EvictAdapter)] == [3, first]
    _disk(core, 3)
    assert _disk(core, first) == [], "it is resident still"
    assert core.stats().host_bytes == 200
    assert first in core.stats().resident


def test_one_larger_than_the_bound_is_refused_by_its_flag() -> None:
    core = new_core(bounds=Bounds(2, lora_host_bytes=250))
    _load(core, 1)
    sent = _host(core, 1, size=300)
    assert _of(sent, EvictAdapter) == [EvictAdapter(1)]
    (state,) = _of(sent, AdapterState)
    assert (state.state, "--lora-host-memory" in state.error) == ("failed", True)
    assert _disk(core, 1) == []
    assert core.stats().host_bytes == 0


def test_a_request_brings_its_adapter_back_with_its_revision() -> None:
    core = _no_pool(max_loaded_loras=2)
    _load(core, 1)
    _host(core, 1)
    _load(core, 2)
    _disk(core, 1)
    _host(core, 2)
    core.handle(PinAdapter(9, False), 0.0)
    sent = core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    assert sent == [EvictAdapter(9)] or sent == [EvictAdapter(2)]
    sent = _disk(core, sent[0].adapter_id)
    assert _of(sent, LoadAdapter) == [LoadAdapter(adapter_id=1, path="p1", revision="r1")]
    assert (1, "loading") in _states(sent)
    _host(core, 1)
    assert [fill.adapter_id for fill in plan_of(core).fills] == [1]


def test_files_that_are_gone_fail_their_requests_only_and_the_next_one_tries_again() -> None:
    core = _no_pool(max_loaded_loras=2)
    _load(core, 1)
    _host(core, 1)
    _load(core, 2)
    _disk(core, 1)
    _host(core, 2)
    for request_id in (1, 2):
        sent = core.handle(generate(request_id, lora=[(1, 1.0)]), 0.0)
        sent += _disk(core, 2) if _of(sent, EvictAdapter) else []
        assert len(_of(sent, LoadAdapter)) == 1
        sent = core.handle(AdapterState(adapter_id=1, state="failed", error="p1: no such file"), 0.0)
        core.check()
        (progress,) = _of(sent, Progress)
        assert [(u.request_id, u.error) for u in progress.updates] == [(request_id, "p1: no such file")]
        assert [(s.state, s.error) for s in _of(sent, AdapterState)] == [("disk", "p1: no such file")]
        assert _of(sent, LoadAdapter) == [], "nobody waits for it any more"


def test_at_most_a_few_loads_at_a_time_in_order_of_those_who_wait() -> None:
    core = new_core()
    sent = [message for adapter_id in range(1, 8) for message in _load(core, adapter_id)]
    assert [load.adapter_id for load in sent] == [1, 2, 3, 4]
    core.handle(generate(1, lora=[(7, 1.0)]), 0.0)
    started = [load.adapter_id for i in (1, 2) for load in _of(_host(core, i, pages=2), LoadAdapter)]
    assert sorted(started) == [5, 7], "who is waited for takes turns with who is not"


def test_twins_share_pages_and_a_lane() -> None:
    core = new_core(rank_pages={"qkv": 4})
    add_adapter(core, 1)
    core.handle(generate(1, prompt=1, lora=[(1, 1.0)]), 0.0)
    _load(core, 2)
    core.handle(generate(2, prompt=1, lora=[(2, 1.0)]), 0.0)
    sent = _host(core, 2, revision="r1")
    assert _of(sent, UnloadAdapter) == [UnloadAdapter(2)]
    assert [(s.adapter_id, s.state, s.revision) for s in _of(sent, AdapterState)] == [(2, "resident", "r1")]
    assert core.handle(AdapterState(adapter_id=2, state="gone"), 0.0) == []
    step = plan_of(core)
    assert [chunk.lane for chunk in step.chunks] == [1, 1]
    assert step.lanes[0].pages["qkv"][0][1] == 1.0
    stats = core.stats()
    assert (stats.resident, stats.rank_pages_used, stats.host_adapters) == ([1, 2], {"qkv": 1}, 1)
    assert stats.running_adapters == {1: 1, 2: 1}


def test_a_twin_outlives_the_name_that_was_first() -> None:
    core = new_core(rank_pages={"qkv": 4})
    add_adapter(core, 1)
    _load(core, 2)
    _host(core, 2, revision="r1")
    core.handle(AdapterState(adapter_id=2, state="gone"), 0.0)
    assert _states(core.handle(UnloadAdapter(1), 0.0)) == [(1, "draining"), (1, "gone")]
    core.check()
    core.handle(generate(1, max_tokens=1, lora=[(2, 1.0)]), 0.0)
    done(core, plan_of(core))
    sent = core.handle(UnloadAdapter(2), 0.0)
    assert (_states(sent), _of(sent, UnloadAdapter)) == ([(2, "draining")], [UnloadAdapter(1)])
    assert _states(core.handle(AdapterState(adapter_id=1, state="gone"), 0.0)) == [(2, "gone")]
    core.check()
    assert (core.stats().rank_pages_used, core.stats().host_adapters) == ({"qkv": 0}, 0)


def test_a_mix_of_twins_is_one_part_with_the_sum_of_the_scales() -> None:
    core = new_core(rank_pages={"qkv": 4})
    add_adapter(core, 1)
    _load(core, 2)
    core.handle(generate(1, lora=[(1, 0.5), (2, -0.25)]), 0.0)
    _host(core, 2, revision="r1")
    assert [scale for _, scale in plan_of(core).lanes[0].pages["qkv"]] == [0.25]


def test_a_twin_whose_files_are_there_helps_one_whose_files_are_gone() -> None:
    core = _no_pool(max_loaded_loras=2)
    _load(core, 1)
    _host(core, 1)
    _load(core, 2)
    _disk(core, 1)
    sent = _host(core, 2, revision="r1")
    assert _of(sent, UnloadAdapter) == [UnloadAdapter(1)], "the first one was on disk: the second is held"
    assert _states(sent) == [(1, "host"), (2, "host")]
    core.handle(RunnerReady(epoch=0, capacity=capacity_of()), 0.0)
    sent = core.handle(AdapterState(adapter_id=2, state="failed", error="gone"), 0.0)
    assert [load.path for load in _of(sent, LoadAdapter)] == ["p2"]


def test_preload_goes_before_younger_requests_and_takes_no_used_page() -> None:
    core = new_core(rank_pages={"qkv": 2})
    add_adapter(core, 1, pages=2)
    core.handle(generate(1, prompt=1, max_tokens=2, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    _load(core, 2, preload=True)
    _host(core, 2, pages=2)
    _load(core, 3)
    _host(core, 3, pages=2)
    core.handle(generate(2, lora=[(3, 1.0)]), 0.0)
    done(core, step)
    step = plan_of(core)
    assert step.fills == []
    core.handle(AdapterState(adapter_id=1, state="resident"), 0.0)  # no news
    done(core, step)
    assert [fill.adapter_id for fill in plan_of(core).fills] == [2]


def test_a_preload_that_cannot_be_says_so() -> None:
    core = _no_pool()
    _load(core, 1, preload=True)
    _host(core, 1)
    assert core.plan(0.0) is None
    (state,) = _of(core.drain_outbox(), AdapterState)
    assert (state.state, "pinned" in state.error) == ("host", True)


def test_unload_of_what_is_on_disk_is_immediate_and_of_what_loads_is_not() -> None:
    core = _no_pool(max_loaded_loras=2)
    _load(core, 1)
    _host(core, 1)
    _load(core, 2)
    _disk(core, 1)
    sent = core.handle(UnloadAdapter(1), 0.0)
    assert (_states(sent), _of(sent, UnloadAdapter)) == ([(1, "draining"), (1, "gone")], [UnloadAdapter(1)])
    assert _states(core.handle(UnloadAdapter(2), 0.0)) == [(2, "draining")]
    assert _of(_host(core, 2), UnloadAdapter) == [UnloadAdapter(2)]
    assert _states(core.handle(AdapterState(adapter_id=2, state="gone"), 0.0)) == [(2, "gone")]
    core.check()


def test_an_id_of_a_name_that_went_is_not_taken_again() -> None:
    core = new_core()
    add_adapter(core, 1)
    _load(core, 2)
    _host(core, 2, revision="r1")
    core.handle(UnloadAdapter(1), 0.0)
    (state,) = _load(core, 1)
    assert (state.state, "used before" in state.error) == ("failed", True)


@pytest.mark.parametrize("scales", [(float("nan"), 1.0), (float("inf"), float("-inf")), (1e308, 1e308)])
def test_scales_must_be_finite(scales: tuple[float, float]) -> None:
    core = new_core()
    (progress,) = core.handle(generate(1, lora=[(1, scales[0]), (1, scales[1])]), 0.0)
    assert isinstance(progress, Progress)
    assert "finite" in (progress.updates[0].error or "")
    core.check()


def test_a_mix_larger_than_the_tier_is_refused_by_its_flag() -> None:
    core = new_core(bounds=Bounds(2, max_loaded_loras=1))
    _load(core, 1)
    _load(core, 2)
    (progress,) = _of(core.handle(generate(1, lora=[(1, 0.5), (2, 0.5)]), 0.0), Progress)
    assert "--max-loaded-loras" in (progress.updates[0].error or "")
