"""Percentiles, fairness and who was passed, by hand."""

from __future__ import annotations

import pytest
from fixtures.scheduling.small_world import ask
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import Update
from scheduler.simulate.results.journal import Gaps, Journal, passed
from scheduler.simulate.results.report import jain, percentile


def journal(*rows: tuple[float, float]) -> Journal:
    """Requests as (arrived, admitted), all on one replica."""
    found = Journal()
    for number, (arrived, admitted) in enumerate(rows):
        found.arrive(number, ask(arrived, "a"), arrived, 0)
        found.admit(number, admitted)
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 1), (1, 2), (2, 3)], 0.0),  # waiting in a queue is not being passed
        ([(0, 9), (1, 2), (2, 3)], 7.0),  # passed at 2
        ([(0, 4), (1, 8), (2, 3)], 5.0),  # both at 3
        ([(0, 4), (1, 4), (2, 4)], 0.0),  # together
    ],
)
def test_who_was_passed(rows: list[tuple[float, float]], expected: float) -> None:
    assert max(passed(journal(*rows).journeys.values()).values()) == expected


def test_nobody_is_passed_on_another_replica() -> None:
    found = journal((0, 9), (1, 2))
    found.journeys[1].replica = 1
    assert max(passed(found.journeys.values()).values()) == 0.0


def test_a_second_admission_does_not_count() -> None:
    found = journal((0, 1), (1, 2))
    found.admit(0, 30.0)
    assert max(passed(found.journeys.values()).values()) == 0.0


def test_the_life_of_a_request() -> None:
    found = journal((1.0, 1.5))
    assert not found.hear(Update(request_id=0, index=0, tokens=[7], cached_tokens=4), 2.0)
    assert found.hear(Update(request_id=0, index=1, tokens=[7], finish="length"), 2.5)
    journey = found.journeys[0]
    assert (journey.ttft, journey.e2e, journey.cached, journey.served) == (1.0, 1.5, 4, True)
    assert found.gaps.percentile(50) == pytest.approx(0.5, rel=0.011)
    with pytest.raises(AssertionError, match="after its end"):
        found.hear(Update(request_id=0, index=2, tokens=[7]), 3.0)


def test_jain() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([5, 0, 0, 0, 0]) == pytest.approx(0.2)
    assert jain([]) == 1.0


def test_percentile_is_the_nearest_rank() -> None:
    values = list(range(100, 0, -1))
    assert [percentile(values, p) for p in (50, 99, 100)] == [50, 99, 100]
    assert percentile([4.0], 50) == 4.0
    assert percentile([], 50) == 0.0


@given(st.lists(st.floats(1e-5, 100.0), min_size=1, max_size=60), st.sampled_from([50, 90, 99]))
def test_gaps_are_right_to_a_percent(values: list[float], percent: float) -> None:
    gaps, halves = Gaps(), (Gaps(), Gaps())
    for number, value in enumerate(values):
        gaps.add(value)
        halves[number % 2].add(value)
    exact = percentile(values, percent)
    assert gaps.percentile(percent) == pytest.approx(exact, rel=0.011)
    halves[0].merge(halves[1])
    assert halves[0].percentile(percent) == gaps.percentile(percent)
    assert gaps.longest == max(values)
