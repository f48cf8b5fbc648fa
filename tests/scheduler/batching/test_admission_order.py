"""scheduler.batching.admission_order, with the whole core: how long requests are overtaken, which lane is preempted.

Time is virtual: each step advances it by STEP seconds.
"""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.scheduling.by_hand import add_adapter, capacity_of, generate

from engine.messages import AdapterState, Footprint, LoadAdapter, Progress, Step, StepDone, Update
from scheduler.core import Scheduler
from scheduler.state import Bounds

STEP = 0.125


def _host(adapter_id: int) -> AdapterState:
    return AdapterState(adapter_id=adapter_id, state="host", revision="r", footprint=Footprint({"qkv": 1}))


class TimedCore:
    """A core with a simulated runner that takes STEP seconds for a step."""

    def __init__(self, max_wait: float = 2.0, lanes: int = 1, window: int = 1, **changes: Any) -> None:
        numbers = {"rows": 8, "kv_pages": 64, "max_batched_tokens": 64, "rank_pages": {"qkv": 4}} | changes
        self.core = Scheduler(capacity_of(max_loras=lanes, **numbers), Bounds(lanes, lora_max_wait=max_wait), window)
        self.core.drain_outbox()
        self.now = 0.0
        self.steps: list[Step] = []
        self.updates: list[Update] = []
        self.open: set[int] = set()

    def adapters(self, count: int) -> TimedCore:
        for number in range(1, count + 1):
            add_adapter(self.core, number)
        return self

    def ask(self, request_id: int, adapter: int, **fields: Any) -> None:
        self.open.add(request_id)
        self.core.handle(generate(request_id, lora=[(adapter, 1.0)] if adapter else [], **fields), self.now)
        self.core.check()

    def step(self) -> None:
        """Plans all steps that the window allows, and ends the oldest one."""
        while (step := self.core.plan(self.now)) is not None:
            self.core.check()
            self.steps.append(step)
        self.now += STEP
        if self.steps:
            step = self.steps.pop(0)
            tokens = [50] * sum(chunk.samples for chunk in step.chunks)
            sent = self.core.handle(StepDone(epoch=0, id=step.id, tokens=tokens, seconds=STEP), self.now)
            updates = [u for message in sent if isinstance(message, Progress) for u in message.updates]
            self.updates += updates
            self.open -= {update.request_id for update in updates if update.finish is not None}
            self.core.check()
            for fill in step.fills:
                self.core.handle(AdapterState(adapter_id=fill.adapter_id, state="resident", seconds=1e-4), self.now)

    def first_token(self, request_id: int) -> bool:
        return any(update.request_id == request_id for update in self.updates)

    def running(self) -> set[int]:
        """Returns the requests that were sent, have not ended and are not waiting."""
        return {request_id for request_id in self.open if self.core.wait_reason(request_id) is None}


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 3])
def test_endless_arrivals_for_running_lanes_starve_no_request(lanes: int, window: int) -> None:
    """In each step a request for each running lane arrives, so no lane ever becomes free without preemption."""
    clock = TimedCore(lanes=lanes, window=window, rows=64, kv_pages=256).adapters(4)
    request_id = 0
    for _ in range(8):
        for adapter in range(1, lanes + 1):
            request_id += 1
            clock.ask(request_id, adapter, max_tokens=6)
        clock.step()
    clock.ask(1000, 4)
    asked = clock.now
    while not clock.first_token(1000):
        for adapter in range(1, lanes + 1):
            request_id += 1
            clock.ask(request_id, adapter, max_tokens=6)
        clock.step()
        assert clock.now - asked < 10, "request 1000 starves"
    assert clock.now - asked <= 2.0 + (window + 1) * STEP
    assert clock.core.stats().lane_preemptions == 0, "there was time to drain a lane"


def test_lane_can_be_joined_until_it_barely_meets_a_deadline() -> None:
    clock = TimedCore().adapters(2)
    clock.ask(1, 1, max_tokens=10)
    clock.step()
    clock.ask(2, 2)
    clock.ask(3, 1, max_tokens=9)
    clock.step()
    assert clock.running() == {1, 3}, "request 3 passes 2"
    while clock.now < 0.75:
        clock.step()
    clock.ask(4, 1, max_tokens=7)
    clock.step()
    assert clock.running() == {1, 3, 4}, "with request 4 the lane is still free in time"
    clock.ask(5, 1, max_tokens=7)
    clock.ask(6, 0)
    clock.step()
    assert clock.running() == {1, 3, 4, 6}, "with request 5 it would not be; 6 needs no lane"
    assert clock.core.wait_reason(5) == "lanes"
    while 2 not in clock.running():
        clock.step()
    assert clock.now <= 2.0 + STEP
    assert clock.core.stats().lane_preemptions == 0


def test_preempted_rows_go_behind_all_passed_requests() -> None:
    """Preempted request 1 runs again after 2 and 3, which were overtaken, and 2 before 4, which arrived while 2 ran."""
    clock = TimedCore(lanes=1, rows=2).adapters(4)
    clock.ask(1, 1, max_tokens=50)
    clock.step()
    clock.ask(2, 2, max_tokens=50)
    clock.ask(3, 3, max_tokens=50)
    ran = [1]
    while 4 not in ran:
        clock.step()
        (running,) = clock.running()
        if running != ran[-1]:
            ran.append(running)
            if len(ran) == 2:
                clock.ask(4, 4, max_tokens=50)
        assert clock.now < 10, f"only {ran} ran"
    assert ran == [1, 2, 3, 1, 2, 4]


def test_preempted_lane_resumes_within_the_bound() -> None:
    clock = TimedCore(lanes=2).adapters(3)
    clock.ask(1, 1, max_tokens=60)
    clock.ask(2, 2, max_tokens=60)
    clock.step()
    clock.ask(3, 3, max_tokens=30)
    while 3 not in clock.running():
        clock.step()
    assert 1.0 < clock.now <= STEP + 2.0 + STEP
    assert clock.running() == {1, 3}, "the first request in order is spared"
    assert clock.core.stats().lane_preemptions == 1
    while 2 not in clock.running():
        clock.step()
    assert clock.now <= 4.0 + 3 * STEP, "2 is passed now, for no longer than the bound"
    while clock.running():
        clock.step()
    counts = {i: [u.index for u in clock.updates if u.request_id == i] for i in (1, 2, 3)}
    assert counts == {1: list(range(60)), 2: list(range(60)), 3: list(range(30))}, "no token is lost or repeated"


def test_preempted_lane_is_the_cheapest_to_recompute() -> None:
    clock = TimedCore(lanes=4, rank_pages={"qkv": 6}).adapters(5)
    for number, prompt in ((1, 1), (2, 20), (3, 3), (4, 10)):
        clock.ask(number, number, prompt=prompt, max_tokens=60)
    clock.step()
    clock.ask(5, 5)
    while 5 not in clock.running():
        clock.step()
    assert clock.running() == {1, 2, 4, 5}, "1 is cheaper, but it is the first in order"


def test_rank_pages_are_preempted_like_lanes() -> None:
    clock = TimedCore(lanes=3, rank_pages={"qkv": 3}, max_lane_pages=3)
    for number, pages in ((1, 1), (2, 1), (3, 2)):
        add_adapter(clock.core, number, pages=pages)
    clock.ask(1, 1, max_tokens=60)
    clock.ask(2, 2, max_tokens=60)
    clock.step()
    clock.ask(3, 3)
    clock.ask(4, 2, max_tokens=60)
    clock.step()
    assert clock.core.wait_reason(3) == "rank_pages"
    while 3 not in clock.running():
        clock.step()
    assert 1.5 < clock.now <= 2.0 + 2 * STEP
    assert clock.core.stats().lane_preemptions == 2, "both rows of the lane"


def test_request_that_waits_for_a_row_has_no_deadline() -> None:
    clock = TimedCore(lanes=2, rows=1).adapters(2)
    clock.ask(1, 1, max_tokens=50)
    clock.step()
    clock.ask(2, 2)
    while clock.running() == {1}:
        assert clock.core.wait_reason(2) == "rows"
        clock.step()
    assert clock.core.stats().preemptions == 0


def test_wait_for_a_lane_does_not_count_the_load() -> None:
    """The time until the adapter is on the host does not count as a wait for a lane."""
    clock = TimedCore().adapters(1)
    clock.ask(1, 1, max_tokens=60)
    clock.step()
    clock.core.handle(LoadAdapter(adapter_id=2, path="p"), clock.now)
    clock.ask(2, 2)
    assert clock.core.wait_reason(2) == "load"
    while clock.now < 3.0:
        clock.step()
    clock.core.handle(_host(2), clock.now)
    clock.step()
    assert clock.core.wait_reason(2) == "lanes"
    while clock.now < 4.0:
        assert clock.running() == {1}
        clock.step()
