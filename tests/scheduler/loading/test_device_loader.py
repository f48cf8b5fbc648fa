"""scheduler.loading.device_loader in scripted cases: which copies are filled at once, which in the background."""

from __future__ import annotations

import pytest
from fixtures.scheduling.by_hand import capacity_of, done, generate, plan_of

from engine.messages import Abort, AdapterState, EvictAdapter, Footprint, LanePages, LoadAdapter, UnloadAdapter
from scheduler.core import Scheduler
from scheduler.state import Bounds

STEP = 0.1  # seconds: fills at once may take 50 ms, which is 100 MB at the default rate
SMALL, MIDDLE, LARGE = 8_000_000, 45_000_000, 400_000_000


def _core(window: int = 1, lanes: int = 4, **changes: object) -> Scheduler:
    core = Scheduler(
        capacity_of(max_loras=lanes, rows=8, **({"rank_pages": {"qkv": 4}} | changes)), Bounds(lanes), window
    )
    core.drain_outbox()
    return core


def _host(core: Scheduler, adapter_id: int, size: int = SMALL, pages: int = 1) -> None:
    """Loads an adapter to the host, and removes it from the opportunistic fills."""
    core.handle(LoadAdapter(adapter_id=adapter_id, path=f"p{adapter_id}"), 0.0)
    info = AdapterState(
        adapter_id=adapter_id,
        state="host",
        revision=f"r{adapter_id}",
        footprint=Footprint({"qkv": pages}),
        bytes=size,
    )
    core.handle(info, 0.0)
    core._state.opportunistic_fills.clear()
    core.check()


def _decoding(core: Scheduler) -> None:
    core.handle(generate(100, max_tokens=50), 0.0)
    done(core, plan_of(core), seconds=STEP)


def _resident(core: Scheduler, adapter_id: int, seconds: float = 0.0) -> list[object]:
    sent = core.handle(AdapterState(adapter_id=adapter_id, state="resident", seconds=seconds), 0.0)
    core.check()
    return list(sent)


def test_small_fill_and_its_lane_go_in_one_step() -> None:
    core = _core()
    _host(core, 1)
    _decoding(core)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    (fill,) = step.fills
    assert (fill.adapter_id, fill.at_once) == (1, True)
    assert step.lanes == [LanePages(1, {"qkv": [(fill.pages["qkv"][0], 1.0)]})]
    assert [chunk.lane for chunk in step.chunks] == [0, 1]
    (state,) = _resident(core, 1, 0.004)
    assert isinstance(state, AdapterState)
    assert (state.state, state.seconds) == ("resident", 0.004)


def test_fills_at_once_take_at_most_half_of_a_step() -> None:
    core = _core()
    for number in (1, 2, 3):
        _host(core, number, MIDDLE)
    _decoding(core)
    for number in (1, 2, 3):
        core.handle(generate(number, prompt=1, lora=[(number, 1.0)]), 0.0)
    step = plan_of(core)
    assert [(fill.adapter_id, fill.at_once) for fill in step.fills] == [(1, True), (2, True)]
    assert core.wait_reason(3) == "fill"
    done(core, step, seconds=STEP)
    step = plan_of(core)
    assert [(fill.adapter_id, fill.at_once) for fill in step.fills] == [(3, True)]
    assert [lane.lane for lane in step.lanes] == [3]


def test_large_copy_is_filled_in_the_background() -> None:
    core = _core()
    _host(core, 1, LARGE)
    _decoding(core)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    assert ([fill.at_once for fill in step.fills], [chunk.lane for chunk in step.chunks]) == ([False], [0])


def test_large_copy_is_filled_at_once_if_no_row_decodes() -> None:
    core = _core()
    _host(core, 1, LARGE)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    assert ([fill.at_once for fill in step.fills], [chunk.lane for chunk in step.chunks]) == ([True], [1])


def test_measured_rate_limits_fills_at_once() -> None:
    core = _core()
    _host(core, 1)
    core.handle(generate(1, max_tokens=50, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core), seconds=STEP)
    for _ in range(30):
        core._device_loader.record_fill_seconds(core._state.registry.copies[1], 1.0)
    _host(core, 2)
    core.handle(generate(2, lora=[(2, 1.0)]), 0.0)
    assert [fill.at_once for fill in plan_of(core).fills] == [False]


def test_fill_at_once_takes_pages_that_steps_in_flight_read() -> None:
    core = _core(window=2, rank_pages={"qkv": 1})
    _host(core, 1)
    _host(core, 2)
    core.handle(generate(1, max_tokens=50, lora=[(1, 1.0)]), 0.0)
    one = plan_of(core)
    _resident(core, 1)
    core.handle(Abort(0, 1), 0.0)
    core.handle(generate(2, lora=[(2, 1.0)]), 0.0)
    two = plan_of(core)
    core.drain_outbox()
    assert (two.fills[0].pages, two.fills[0].at_once) == (one.fills[0].pages, True)
    done(core, one)
    done(core, two)


def test_background_fill_waits_for_steps_in_flight() -> None:
    core = _core(window=3, rank_pages={"qkv": 1})
    _host(core, 1)
    _host(core, 2, LARGE)
    _decoding(core)
    core.handle(generate(1, max_tokens=50, lora=[(1, 1.0)]), 0.0)
    one = plan_of(core)
    _resident(core, 1)
    core.handle(Abort(0, 1), 0.0)
    core.handle(generate(2, lora=[(2, 1.0)]), 0.0)
    two = plan_of(core)
    assert two.fills == []
    core.drain_outbox()
    done(core, one, seconds=STEP)
    assert [fill.at_once for fill in plan_of(core).fills] == [False]


def test_late_answer_counts_for_the_first_fill() -> None:
    """After a fill at once, an eviction and a background fill, the first fill's result does not end the second fill."""
    core = _core(rank_pages={"qkv": 1})
    _host(core, 1)
    _host(core, 2)
    core.handle(generate(1, max_tokens=1, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core), seconds=STEP)
    core.handle(generate(2, max_tokens=1, lora=[(2, 1.0)]), 0.0)
    step = plan_of(core)
    assert [state.adapter_id for state in core.drain_outbox() if isinstance(state, AdapterState)] == [1]
    done(core, step, seconds=STEP)
    _decoding(core)
    core._device_loader._bytes_per_second = 1.0
    core.handle(generate(3, lora=[(1, 1.0)]), 0.0)
    step = plan_of(core)
    core.drain_outbox()
    assert [(fill.adapter_id, fill.at_once) for fill in step.fills] == [(1, False)]
    assert _resident(core, 1) == [], "the answer to the first fill"
    assert core.wait_reason(3) == "fill"
    _resident(core, 1)
    assert core.wait_reason(3) != "fill"


def test_host_copy_stays_until_the_fill_is_answered() -> None:
    core = Scheduler(capacity_of(rank_pages={"qkv": 4}), Bounds(2, max_loaded_loras=2), 1)
    core.drain_outbox()
    _host(core, 1)
    _host(core, 2)
    core.handle(generate(1, max_tokens=1, lora=[(1, 1.0)]), 0.0)
    core.handle(generate(2, max_tokens=1, lora=[(2, 1.0)]), 0.0)
    done(core, plan_of(core), seconds=STEP)
    load = LoadAdapter(adapter_id=3, path="p3")
    assert not [m for m in core.handle(load, 0.0) if isinstance(m, EvictAdapter)], "fills read both copies"
    core.handle(UnloadAdapter(1), 0.0)
    assert not [m for m in core.drain_outbox() if isinstance(m, UnloadAdapter)]
    sent = core.handle(AdapterState(adapter_id=1, state="resident"), 0.0)
    assert UnloadAdapter(1) in sent
    core.check()


@pytest.mark.parametrize(("size", "ahead"), [(SMALL, False), (LARGE, True)])
def test_cpu_fills_ahead_only_large_copies(size: int, ahead: bool) -> None:
    core = _core(lanes=1)
    _host(core, 1)
    _host(core, 2, size)
    core.handle(generate(1, max_tokens=50, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core), seconds=STEP)
    core.handle(generate(2, lora=[(2, 1.0)]), 0.0)
    assert [(fill.adapter_id, fill.at_once) for fill in plan_of(core).fills] == [(2, False)] * ahead


def test_look_ahead_evicts_only_for_earlier_requests() -> None:
    core = _core(lanes=1, rank_pages={"qkv": 3}, device="cuda")
    for number in (1, 2, 3, 4):
        _host(core, number)
    core.handle(generate(1, max_tokens=50, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core), seconds=STEP)
    for number in (2, 3, 4):
        core.handle(generate(number, lora=[(number, 1.0)]), 0.0)
    step = plan_of(core)
    assert [(fill.adapter_id, fill.at_once) for fill in step.fills] == [(2, False), (3, False)]
    for number in (2, 3):
        _resident(core, number)
    done(core, step, seconds=STEP)
    assert [core.wait_reason(number) for number in (2, 3, 4)] == ["lanes"] * 3
    step = plan_of(core)
    assert step.fills == [], "requests 2 and 3 come before 4"
    core.handle(generate(5, priority=-1, lora=[(4, 1.0)]), 0.0)
    core.handle(Abort(0, 1), 0.0)
    done(core, step, seconds=STEP)
    step = plan_of(core)
    assert [(fill.adapter_id, fill.at_once) for fill in step.fills] == [(4, True)], "request 5 comes before 2 and 3"
    assert [state.adapter_id for state in core.drain_outbox() if isinstance(state, AdapterState)] == [1]
