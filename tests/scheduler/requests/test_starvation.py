"""scheduler.requests.starvation: against a list of all who wait."""

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
    return Request(1, BASE, order, 1, [1], Sampling(), Stopping(1), priority=int(order[0]))


def test_only_who_is_before_the_frontier_was_passed() -> None:
    overtaking = StarvationTracker()
    overtaking.passed((0, 6), 1.0)
    overtaking.passed((0, 4), 2.0)
    overtaking.passed((0, 9), 3.0)
    assert [overtaking.since((0, n)) for n in (1, 5, 6, 8, 9)] == [1.0, 1.0, 3.0, 3.0, None]
    overtaking.settle((0, 7))
    assert [overtaking.since((0, n)) for n in (7, 9)] == [3.0, None]
    overtaking.settle(None)
    assert overtaking.since((0, 7)) is None


def test_who_had_a_turn_goes_behind_all_who_were_passed() -> None:
    ordering, overtaking = Ordering(), StarvationTracker()
    had = request_at((0, 2))
    assert ordering.behind(had, overtaking.frontier, 20) == (0, 2), "nobody was passed"
    overtaking.passed((0, 5), 1.0)
    first = ordering.behind(had, overtaking.frontier, 20)
    had.order = first
    again = ordering.behind(had, overtaking.frontier, 21)
    assert (0, 5) < first < again < (0, 6)
    assert ordering.behind(request_at((0, 7)), overtaking.frontier, 22) == (0, 7), "never before its old place"
    overtaking.passed((3, 4, float("inf")), 2.0)
    assert ordering.behind(had, overtaking.frontier, 23) == (0, 23), "nor in another priority"
    assert (3, 4) < ordering.behind(request_at((3, 1)), overtaking.frontier, 24) < (3, 5)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=40), st.booleans())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_history_equals_a_note_on_everyone(history: list[tuple[int, int]], settles: bool) -> None:
    overtaking, noted, now = StarvationTracker(), dict[int, float](), 0.0
    waiting = set(range(30))
    for number, pause in history:
        now += pause
        overtaking.passed((0, number), now)
        for each in waiting:
            if each < number:
                noted.setdefault(each, now)
        waiting.discard(number)
        if settles:
            overtaking.settle((0, min(waiting)))
        assert {each: overtaking.since((0, each)) for each in waiting} == {each: noted.get(each) for each in waiting}


def test_a_long_history_is_merged_to_earlier_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.requests.starvation.LONGEST", 8)
    overtaking = StarvationTracker()
    for number in range(100):
        overtaking.passed((0, number), float(number))
    for number in range(99):
        since = overtaking.since((0, number))
        assert since is not None
        assert since <= number + 1
    assert len(overtaking._orders) == len(overtaking._times) <= 8
