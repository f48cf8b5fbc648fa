"""scheduler.overtaking: against a list of all who wait."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.overtaking import Overtaking


def test_only_who_is_before_the_frontier_was_passed() -> None:
    overtaking = Overtaking()
    overtaking.passed((0, 6), 1.0)
    overtaking.passed((0, 4), 2.0)
    overtaking.passed((0, 9), 3.0)
    assert [overtaking.since((0, n)) for n in (1, 5, 6, 8, 9)] == [1.0, 1.0, 3.0, 3.0, None]
    overtaking.settle((0, 7))
    assert [overtaking.since((0, n)) for n in (7, 9)] == [3.0, None]
    overtaking.settle(None)
    assert overtaking.since((0, 7)) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=40), st.booleans())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_history_equals_a_note_on_everyone(history: list[tuple[int, int]], settles: bool) -> None:
    overtaking, noted, now = Overtaking(), dict[int, float](), 0.0
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
    monkeypatch.setattr("scheduler.overtaking.LONGEST", 8)
    overtaking = Overtaking()
    for number in range(100):
        overtaking.passed((0, number), float(number))
    for number in range(99):
        since = overtaking.since((0, number))
        assert since is not None
        assert since <= number + 1
    assert len(overtaking._orders) == len(overtaking._times) <= 8
