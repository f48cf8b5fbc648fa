"""scheduler.requests.starvation: frontier and times, against a record of when each request was first overtaken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Sampling, Stopping
from scheduler.requests.policy import Ordering
from scheduler.requests.request import Request
from scheduler.requests.starvation import StarvationTracker
from scheduler.types import BASE, Order


def request_at(order: Order) -> Request:
    return Request(1, BASE, order, 1, [1], Sampling(), Stopping(1), priority=int(order[1]))


def test_requests_before_the_frontier_were_passed() -> None:
    starvation = StarvationTracker()
    starvation.mark_passed((0, 0, 6), 1.0)
    starvation.mark_passed((0, 0, 4), 2.0)
    starvation.mark_passed((0, 0, 9), 3.0)
    assert [starvation.passed_since((0, 0, n)) for n in (1, 5, 6, 8, 9)] == [1.0, 1.0, 3.0, 3.0, None]
    starvation.forget_before((0, 0, 7))
    assert [starvation.passed_since((0, 0, n)) for n in (7, 9)] == [3.0, None]
    starvation.forget_before(None)
    assert starvation.passed_since((0, 0, 7)) is None


def test_preempted_lane_goes_behind_all_passed_requests() -> None:
    ordering, starvation = Ordering(), StarvationTracker()
    preempted = request_at((0, 0, 2))
    assert ordering.order_behind(preempted, starvation.frontier, 20) == (0, 0, 2), "no request was passed"
    starvation.mark_passed((0, 0, 5), 1.0)
    first = ordering.order_behind(preempted, starvation.frontier, 20)
    preempted.order = first
    again = ordering.order_behind(preempted, starvation.frontier, 21)
    assert (0, 0, 5) < first < again < (0, 0, 6)
    assert ordering.order_behind(request_at((0, 0, 7)), starvation.frontier, 22) == (0, 0, 7), (
        "never before its old order"
    )
    starvation.mark_passed((0, 3, 4, float("inf")), 2.0)
    assert ordering.order_behind(preempted, starvation.frontier, 23) == (0, 0, 23), "never in another priority"
    assert (0, 3, 4) < ordering.order_behind(request_at((0, 3, 1)), starvation.frontier, 24) < (0, 3, 5)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=40), st.booleans())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_history_equals_a_note_of_each_request(history: list[tuple[int, int]], forgets: bool) -> None:
    starvation, noted, now = StarvationTracker(), dict[int, float](), 0.0
    waiting = set(range(30))
    for number, pause in history:
        now += pause
        starvation.mark_passed((0, 0, number), now)
        for each in waiting:
            if each < number:
                noted.setdefault(each, now)
        waiting.discard(number)
        if forgets:
            starvation.forget_before((0, 0, min(waiting)))
        assert {each: starvation.passed_since((0, 0, each)) for each in waiting} == {
            each: noted.get(each) for each in waiting
        }


def test_long_history_is_merged_to_earlier_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.requests.starvation.MAX_MOVES", 8)
    starvation = StarvationTracker()
    for number in range(100):
        starvation.mark_passed((0, 0, number), float(number))
    for number in range(99):
        since = starvation.passed_since((0, 0, number))
        assert since is not None
        assert since <= number + 1
    assert len(starvation) <= 8
