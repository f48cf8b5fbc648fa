"""scheduler.admission.wait_reasons: each reason in a scripted case, and all of them in a random workload."""

from __future__ import annotations

import pytest
from fixtures.scheduling.by_hand import add_adapter, capacity_of, done, generate, new_core, plan_of
from fixtures.scheduling.simulation.seeded_world import World
from fixtures.scheduling.simulation.simulation import Simulation

from engine.messages import Abort, AdapterState, Footprint, LoadAdapter, RunnerReady, ToScheduler, WaitingRequest
from scheduler.admission import wait_reasons
from scheduler.core import Scheduler


def _reasons(core: Scheduler) -> dict[str, int]:
    return dict(core.stats().waiting_reasons)


def test_reasons_rows_and_pages() -> None:
    core = new_core(rows=1)
    core.handle(generate(1), 0.0)
    plan_of(core)
    core.handle(generate(2), 0.0)
    core.handle(generate(3), 0.0)
    assert (core.wait_reason(1), core.wait_reason(2), core.wait_reason(9)) == (None, "rows", None)
    assert _reasons(core) == {"rows": 2}
    core = new_core(kv_pages=2)
    core.handle(generate(1, prompt=7), 0.0)
    plan_of(core)
    core.handle(generate(2), 0.0)
    assert (core.wait_reason(2), _reasons(core)) == ("pages", {"pages": 1})


def test_reasons_load_fill_and_lanes() -> None:
    core = new_core(rank_pages={"qkv": 3})
    for number in (1, 2):
        add_adapter(core, number)
        core.handle(generate(number, lora=[(number, 1.0)]), 0.0)
    done(core, plan_of(core))
    core.handle(LoadAdapter(adapter_id=3, path="p"), 0.0)
    core.handle(generate(3, lora=[(3, 1.0)]), 0.0)
    assert core.wait_reason(3) == "load"
    info = AdapterState(adapter_id=3, state="host", footprint=Footprint({"qkv": 1}), bytes=10**9)
    core.handle(info, 0.0)
    done(core, plan_of(core))
    assert core.wait_reason(3) == "fill"
    core.handle(AdapterState(adapter_id=3, state="resident"), 0.0)
    assert (core.wait_reason(3), _reasons(core)) == ("lanes", {"lanes": 1})


def test_reason_rank_pages() -> None:
    core = new_core(rank_pages={"qkv": 2})
    add_adapter(core, 1, pages=1)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core))
    core.handle(LoadAdapter(adapter_id=2, path="p"), 0.0)
    core.handle(AdapterState(adapter_id=2, state="host", footprint=Footprint({"qkv": 2})), 0.0)
    core.handle(generate(2, lora=[(2, 1.0)]), 0.0)
    done(core, plan_of(core))
    assert (core.wait_reason(2), _reasons(core)) == ("rank_pages", {"rank_pages": 1})


def test_reason_turn() -> None:
    core = new_core(max_batched_tokens=4)
    core.handle(generate(1, prompt=9), 0.0)
    core.handle(generate(2), 0.0)
    plan_of(core)
    assert (core.wait_reason(1), core.wait_reason(2)) == (None, "turn"), (
        "rows and pages are free, and the prompt before it takes the step"
    )


def test_shared_pages_are_not_lacking() -> None:
    core = new_core(kv_pages=8, max_batched_tokens=32)
    core.handle(generate(1, prompt=19, cache_salt="same"), 0.0)
    done(core, plan_of(core))
    plan_of(core)
    core.handle(generate(2, prompt=19, cache_salt="same"), 0.0)
    core.handle(generate(3, prompt=19, cache_salt="other"), 0.0)
    assert core.wait_reason(2) == "turn"
    core.handle(Abort(0, 2), 0.0)
    assert core.wait_reason(3) == "pages"


def test_reason_trial() -> None:
    core = new_core()
    core.handle(generate(1), 0.0)
    plan_of(core)
    core.handle(RunnerReady(epoch=1, capacity=capacity_of(), after_fault=True), 0.0)
    core.handle(generate(2), 0.0)
    plan_of(core)
    assert (core.wait_reason(1), core.wait_reason(2), _reasons(core)) == (None, "trial", {"trial": 1})


def test_oldest_requests_are_listed_by_arrival() -> None:
    core = new_core(rows=1)
    add_adapter(core, 1)
    core.handle(generate(1), 1.0)
    plan_of(core)
    core.handle(generate(2, lora=[(1, 1.0)], generated=[5, 6]), 2.0)
    core.handle(generate(3, priority=-1), 3.5)
    core.plan(10.0)
    assert core.stats().oldest_waiting == [WaitingRequest(2, 8.0, "rows", 2), WaitingRequest(3, 6.5, "rows", 0)]


def test_report_lists_at_most_64_requests() -> None:
    core = new_core(rows=1)
    for number in range(1, 2 * wait_reasons.LISTED):
        core.handle(generate(number), 0.0)
    plan_of(core)
    stats = core.stats()
    assert [waiting.request_id for waiting in stats.oldest_waiting] == list(range(2, wait_reasons.LISTED + 2))
    assert stats.waiting == 2 * wait_reasons.LISTED - 2


class CheckedStats(Simulation):
    """A simulation that compares the Stats with the wait reason of each request after each message."""

    def _send(self, message: ToScheduler) -> None:
        super()._send(message)
        stats, requests = self.core.stats(), self.core._state.requests
        waiting = {number: reason for number in requests if (reason := self.core.wait_reason(number)) is not None}
        assert {each.request_id: each.reason for each in stats.oldest_waiting} == dict(
            list(waiting.items())[: wait_reasons.LISTED]
        )
        assert sum(stats.waiting_reasons.values()) == stats.waiting == len(waiting)


@pytest.mark.parametrize("seed", range(3))
def test_stats_agree_with_the_reason_of_each_request(seed: int) -> None:
    faults = {"abort_rate": 0.1, "reset_rate": 0.02, "churn_rate": 0.1, "mix_rate": 0.3}
    CheckedStats(World(900 + seed, 2, requests=40, adapters=8, max_loras=2, rows=4, kv_pages=30, **faults)).run()
