"""scheduler.batching.deadlines: the pictures of its text, and against a search over all ways to hand out lanes."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.batching.deadlines import Wait, to_drain, to_take


def waits(*slacks: float, work: float = 0.0) -> list[Wait]:
    return [Wait(slack, work) for slack in slacks]


def test_nothing_is_taken_before_it_must_be() -> None:
    assert to_take(waits(0.1, 0.2), [], 9.0) == 0
    assert to_take(waits(0.0, 0.2), [], 9.0) == 1
    assert to_take(waits(-1.0, 0.0), [], 9.0) == 2
    assert to_take([], [1.0], 9.0) == 0


def test_what_is_free_in_time_is_not_taken() -> None:
    assert to_take(waits(0.0, 0.1), [0.0], 9.0) == 0
    assert to_take(waits(-0.1, 0.0), [0.0], 9.0) == 1


def test_what_is_done_one_after_the_other_begins_sooner() -> None:
    """Three deadlines at once and fills of a second: the third must be begun on before those of the first two."""
    assert to_take(waits(2.5, 2.5, 2.5, work=1.0), [], 9.0) == 3
    assert to_take(waits(3.5, 3.5, 3.5, work=1.0), [], 9.0) == 0
    assert to_take(waits(2.5, 2.5, 2.5, work=1.0), [2.0], 9.0) == 2, "a lane will be free: two others are enough"


def test_no_more_is_taken_than_there_is_time_for() -> None:
    late = waits(-1.0, -1.0, -1.0, -1.0, work=1.0)
    assert [to_take(late, [], most) for most in (0.0, 1.0, 2.5, 9.0)] == [1, 1, 2, 4]
    assert to_take(waits(5.0, work=1.0), [], 0.0) == 0


def test_a_lane_drains_when_it_just_meets_a_deadline() -> None:
    assert to_drain(waits(1.0), [0.4, 0.95, 1.2], 0.1) == [1]
    assert to_drain(waits(1.0), [0.4, 0.8], 0.1) == [], "the one that is free last in time may be joined for longer"
    assert to_drain(waits(1.0, 1.0), [0.93, 0.95], 0.1) == [1, 0]
    assert to_drain(waits(0.5), [0.6], 0.1) == []


times = st.integers(-3, 12).map(lambda tenth: tenth / 4)


def met(slacks: list[float], ends: list[float]) -> int:
    """How many deadlines can be met by lanes that are free by themselves, of all ways to pair them."""
    shorter, longer = sorted((slacks, ends), key=len)
    by_slack = shorter is slacks
    ways = (zip(shorter, way, strict=True) for way in permutations(longer, len(shorter)))
    return max(sum((end <= slack) for slack, end in (pair if by_slack else pair[::-1] for pair in way)) for way in ways)


@given(st.lists(times, max_size=5), st.lists(times, max_size=5), times)
@settings(derandomize=True, max_examples=80, deadline=None)
def test_against_all_ways_to_pair(slacks: list[float], ends: list[float], grace: float) -> None:
    slacks, ends = sorted(slacks), sorted(ends)
    due = [slack for slack in slacks if slack <= 0]
    assert to_take(waits(*slacks), ends, 9.0) >= len(due) - met(due, ends)
    assert to_take(waits(*slacks), [], 9.0) == len(due)
    drain = to_drain(waits(*slacks), ends, grace)
    assert len(drain) == len(set(drain)) <= met(slacks, ends)
    assert len(to_drain(waits(*slacks), ends, 100.0)) == met(slacks, ends)
