"""scheduler.loading.lifecycle in scripted cases: lanes, fills, evictions, failures, unloading."""

from __future__ import annotations

from fixtures.scheduling.by_hand import add_adapter, capacity_of, done, generate, new_core, plan_of

from engine.messages import (
    Abort,
    AdapterState,
    EvictAdapter,
    Footprint,
    LanePages,
    LoadAdapter,
    PinAdapter,
    Progress,
    StepDone,
    UnloadAdapter,
    Update,
)
from scheduler.core import Scheduler
from scheduler.state import Bounds


def test_lane_blocked_request_is_passed() -> None:
    core = Scheduler(capacity_of(), Bounds(1))
    core.drain_outbox()
    add_adapter(core, 1)
    add_adapter(core, 2)
    core.handle(generate(1, prompt=1, max_tokens=2, lora=[(1, 1.0)]), 0.0)
    core.handle(generate(2, prompt=1, lora=[(2, 1.0)]), 0.0)
    core.handle(generate(3, prompt=1), 0.0)
    core.handle(generate(4, prompt=1, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    assert [chunk.lane for chunk in step.chunks] == [1, 0, 1]
    assert [lane.lane for lane in step.lanes] == [1]
    core.handle(Abort(0, 4), 0.0)
    done(core, step)
    done(core, plan_of(core))  # request 1 ends
    step = plan_of(core)
    assert [(lane.lane, len(lane.pages["qkv"])) for lane in step.lanes] == [(1, 1)]
    assert [chunk.lane for chunk in step.chunks] == [0, 1]


def test_request_waits_for_its_adapter_while_rows_decode() -> None:
    core = new_core()
    load = LoadAdapter(adapter_id=1, path="p")
    core.handle(load, 0.0)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    assert core.plan(0.0) is None
    core.handle(generate(2), 0.0)
    done(core, plan_of(core))
    large = AdapterState(adapter_id=1, state="host", footprint=Footprint({"qkv": 2}), bytes=100_000_000)
    core.handle(large, 0.0)
    step = plan_of(core)
    assert ([fill.at_once for fill in step.fills], [chunk.lane for chunk in step.chunks]) == ([False], [0])
    done(core, step)
    step = plan_of(core)
    assert [chunk.lane for chunk in step.chunks] == [0]
    core.handle(AdapterState(adapter_id=1, state="resident"), 0.0)
    done(core, step)
    step = plan_of(core)
    pages = step.lanes[0].pages["qkv"]
    assert (sorted(page for page, _ in pages), [scale for _, scale in pages]) == ([0, 1], [1.0, 1.0])


def test_idle_adapter_is_evicted_and_reported() -> None:
    core = new_core()
    add_adapter(core, 1, pages=2)
    add_adapter(core, 2, pages=2)
    core.handle(generate(1, lora=[(2, 0.5)]), 0.0)
    step = core.plan(0.0)
    assert step is not None
    assert [fill.adapter_id for fill in step.fills] == [2]
    assert [(s.adapter_id, s.state) for s in core.drain_outbox() if isinstance(s, AdapterState)] == [(1, "host")]
    done(core, step)
    core.handle(AdapterState(adapter_id=2, state="resident"), 0.0)
    assert plan_of(core).lanes == [LanePages(1, {"qkv": [(0, 0.5), (1, 0.5)]})] or step.fills[0].pages["qkv"] != [0, 1]


def test_pinned_adapter_is_not_evicted() -> None:
    core = new_core()
    add_adapter(core, 1, pages=2, pinned=True)
    add_adapter(core, 2, pages=2)
    core.handle(generate(1, lora=[(2, 1.0)]), 0.0)
    assert core.plan(0.0) is None
    (progress,) = core.drain_outbox()
    assert isinstance(progress, Progress)
    assert "pinned" in (progress.updates[0].error or "")
    core.handle(PinAdapter(1, False), 0.0)
    core.handle(generate(2, lora=[(2, 1.0)]), 0.0)
    assert [fill.adapter_id for fill in plan_of(core).fills] == [2]


def test_repeated_load_says_whether_it_is_pinned() -> None:
    """A tokenizer process may die between an unpin that it recorded and the PinAdapter."""
    core = new_core()
    add_adapter(core, 1, pages=2, pinned=True)
    core.handle(LoadAdapter(adapter_id=1, path="p", pinned=False), 0.0)
    add_adapter(core, 2, pages=2)
    core.handle(generate(1, lora=[(2, 1.0)]), 0.0)
    assert [fill.adapter_id for fill in plan_of(core).fills] == [2]


def test_failed_adapter_fails_its_requests() -> None:
    core = new_core()
    core.handle(LoadAdapter(adapter_id=1, path="p"), 0.0)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    progress, state = core.handle(AdapterState(adapter_id=1, state="failed", error="bad file"), 0.0)
    assert progress == Progress(0, [Update(request_id=1, index=0, error="bad file")])
    assert isinstance(state, AdapterState)
    assert (state.state, state.error) == ("failed", "bad file")
    assert core.handle(generate(2, lora=[(1, 1.0)]), 0.0) == [
        Progress(0, [Update(request_id=2, index=0, error="bad file")])
    ]


def test_failed_adapter_is_retried_only_under_a_new_id() -> None:
    """LoadAdapter of a failed id only reports the failure: the same id is sent again whenever a runner starts."""
    core = new_core()
    add_adapter(core, 1)
    core.handle(AdapterState(adapter_id=1, state="failed", error="bad file"), 0.0)
    (state,) = core.handle(LoadAdapter(adapter_id=1, path="p", pinned=True, preload=True), 0.0)
    assert isinstance(state, AdapterState)
    assert (state.state, state.error) == ("failed", "bad file")
    again = LoadAdapter(adapter_id=2, path="p")
    assert core.handle(again, 0.0) == [again]
    core.check()


def test_adapter_larger_than_the_pool_is_refused() -> None:
    core = new_core()
    core.handle(LoadAdapter(adapter_id=1, path="p"), 0.0)
    evict, state = core.handle(AdapterState(adapter_id=1, state="host", footprint=Footprint({"qkv": 3})), 0.0)
    assert evict == EvictAdapter(1), "the runner must not keep it"
    assert isinstance(state, AdapterState)
    assert state.state == "failed"
    assert "needs 3 LoRA rank pages of group qkv" in (state.error or "")


def test_unload_waits_for_the_last_request() -> None:
    core = new_core()
    add_adapter(core, 1)
    core.handle(generate(1, max_tokens=1, lora=[(1, 1.0)]), 0.0)
    (state,) = core.handle(UnloadAdapter(1), 0.0)
    assert isinstance(state, AdapterState)
    assert state.state == "draining"
    (progress,) = core.handle(generate(2, lora=[(1, 1.0)]), 0.0)
    assert isinstance(progress, Progress)
    assert "being unloaded" in (progress.updates[0].error or "")
    step = plan_of(core)
    sent = core.handle(StepDone(epoch=0, id=step.id, tokens=[5]), 0.0)
    assert [type(message) for message in sent] == [Progress, UnloadAdapter]
    assert core.stats().rank_pages_used == {"qkv": 0}
    (gone,) = core.handle(AdapterState(adapter_id=1, state="gone"), 0.0)
    assert isinstance(gone, AdapterState)
    assert gone.state == "gone"
    core.check()


def test_draining_adapter_that_fails_is_unloaded() -> None:
    core = new_core()
    add_adapter(core, 1)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    core.handle(UnloadAdapter(1), 0.0)
    sent = core.handle(AdapterState(adapter_id=1, state="failed", error="lost"), 0.0)
    assert sent == [Progress(0, [Update(request_id=1, index=0, error="lost")]), UnloadAdapter(1)]
    assert done(core, step) == []
    core.handle(AdapterState(adapter_id=1, state="gone"), 0.0)
    assert core.stats().rank_pages_used == {"qkv": 0}
    core.check()


def test_small_adapters_do_not_starve_a_large_one() -> None:
    core = new_core(rank_pages={"qkv": 4}, max_lane_pages=4)
    add_adapter(core, 1, pages=2)
    add_adapter(core, 2, pages=1)
    add_adapter(core, 3, pages=3)
    core.handle(generate(1, prompt=1, max_tokens=3, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core))
    core.handle(generate(2, lora=[(3, 1.0)]), 0.0)  # waits for the rank pages of adapter 1
    core.handle(generate(3, lora=[(2, 1.0)]), 0.0)  # could run now, but comes after request 2
    for _ in range(2):
        step = plan_of(core)
        assert [chunk.row for chunk in step.chunks] == [0]
        done(core, step)
    assert plan_of(core).fills[0].adapter_id == 3


def test_second_load_only_reports_the_adapter() -> None:
    core = new_core()
    load = LoadAdapter(adapter_id=1, path="p")
    assert core.handle(load, 0.0) == [load]
    assert core.handle(load, 0.0) == []
    core.handle(AdapterState(adapter_id=1, state="host", revision="r", footprint=Footprint({"qkv": 1})), 0.0)
    (state,) = core.handle(load, 0.0)
    assert isinstance(state, AdapterState)
    assert (state.state, state.revision) == ("host", "r")
