"""scheduler.batching.deadlines: scripted cases, and comparison with a search over all pairs of lanes and deadlines."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.batching.deadlines import Deadline, count_to_preempt, lanes_to_drain


def deadlines(*slacks: float, work: float = 0.0) -> list[Deadline]:
    return [Deadline(slack, work) for slack in slacks]


def test_lane_is_preempted_no_sooner_than_needed() -> None:
    assert count_to_preempt(deadlines(0.1, 0.2), [], 9.0) == 0
    assert count_to_preempt(deadlines(0.0, 0.2), [], 9.0) == 1
    assert count_to_preempt(deadlines(-1.0, 0.0), [], 9.0) == 2
    assert count_to_preempt([], [1.0], 9.0) == 0


def test_lane_that_ends_in_time_is_not_preempted() -> None:
    assert count_to_preempt(deadlines(0.0, 0.1), [0.0], 9.0) == 0
    assert count_to_preempt(deadlines(-0.1, 0.0), [0.0], 9.0) == 1


def test_fills_one_after_the_other_are_begun_sooner() -> None:
    """With three equal deadlines and fills of one second each, the first fill begins three seconds before them."""
    assert count_to_preempt(deadlines(2.5, 2.5, 2.5, work=1.0), [], 9.0) == 3
    assert count_to_preempt(deadlines(3.5, 3.5, 3.5, work=1.0), [], 9.0) == 0
    assert count_to_preempt(deadlines(2.5, 2.5, 2.5, work=1.0), [2.0], 9.0) == 2, (
        "one lane is free in time, so two more are enough"
    )


def test_preemptions_are_limited_to_the_given_work() -> None:
    late = deadlines(-1.0, -1.0, -1.0, -1.0, work=1.0)
    assert [count_to_preempt(late, [], most) for most in (0.0, 1.0, 2.5, 9.0)] == [1, 1, 2, 4]
    assert count_to_preempt(deadlines(5.0, work=1.0), [], 0.0) == 0


def test_lane_drains_when_it_barely_meets_a_deadline() -> None:
    assert lanes_to_drain(deadlines(1.0), [0.4, 0.95, 1.2], 0.1) == [1]
    assert lanes_to_drain(deadlines(1.0), [0.4, 0.8], 0.1) == [], "the lane that ends at 0.8 may be joined for longer"
    assert lanes_to_drain(deadlines(1.0, 1.0), [0.93, 0.95], 0.1) == [1, 0]
    assert lanes_to_drain(deadlines(0.5), [0.6], 0.1) == []


times = st.integers(-3, 12).map(lambda tenth: tenth / 4)


def met(slacks: list[float], ends: list[float]) -> int:
    """Returns the most deadlines (`slacks`) that lanes ending at `ends` meet without preemption, over all pairings."""
    shorter, longer = sorted((slacks, ends), key=len)
    by_slack = shorter is slacks
    ways = (zip(shorter, way, strict=True) for way in permutations(longer, len(shorter)))
    return max(sum((end <= slack) for slack, end in (pair if by_slack else pair[::-1] for pair in way)) for way in ways)


@given(st.lists(times, max_size=5), st.lists(times, max_size=5), times)
@settings(derandomize=True, max_examples=80, deadline=None)
def test_counts_equal_a_search_over_all_pairings(slacks: list[float], ends: list[float], grace: float) -> None:
    slacks, ends = sorted(slacks), sorted(ends)
    due = [slack for slack in slacks if slack <= 0]
    assert count_to_preempt(deadlines(*slacks), ends, 9.0) >= len(due) - met(due, ends)
    assert count_to_preempt(deadlines(*slacks), [], 9.0) == len(due)
    drain = lanes_to_drain(deadlines(*slacks), ends, grace)
    assert len(drain) == len(set(drain)) <= met(slacks, ends)
    assert len(lanes_to_drain(deadlines(*slacks), ends, 100.0)) == met(slacks, ends)
