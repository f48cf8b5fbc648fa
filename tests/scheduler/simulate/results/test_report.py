"""scheduler.simulate.results: percentiles, fairness and times of being overtaken, in small scripted cases."""

from __future__ import annotations

import pytest
from fixtures.scheduling.small_world import trace_request
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import Update
from scheduler.simulate.results.report import jain, percentile
from scheduler.simulate.results.request_log import GapHistogram, RequestLog, passed


def log_of(*rows: tuple[float, float]) -> RequestLog:
    """Returns a log of requests with these times (arrived, admitted), all on one replica."""
    found = RequestLog()
    for number, (arrived, admitted) in enumerate(rows):
        found.record_arrival(number, trace_request(arrived, "a"), arrived, 0)
        found.record_admission(number, admitted)
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 1), (1, 2), (2, 3)], 0.0),  # admitted in order: none is overtaken
        ([(0, 9), (1, 2), (2, 3)], 7.0),  # the first is overtaken at time 2
        ([(0, 4), (1, 8), (2, 3)], 5.0),  # the first two are overtaken at time 3
        ([(0, 4), (1, 4), (2, 4)], 0.0),  # admitted at the same time: none is overtaken
    ],
)
def test_request_is_passed_by_later_admissions(rows: list[tuple[float, float]], expected: float) -> None:
    assert max(passed(log_of(*rows).timelines.values()).values()) == expected


def test_request_is_not_passed_by_another_replica() -> None:
    found = log_of((0, 9), (1, 2))
    found.timelines[1].replica = 1
    assert max(passed(found.timelines.values()).values()) == 0.0


def test_second_admission_does_not_count_as_passing() -> None:
    found = log_of((0, 1), (1, 2))
    found.record_admission(0, 30.0)
    assert max(passed(found.timelines.values()).values()) == 0.0


def test_timeline_records_the_updates_of_a_request() -> None:
    found = log_of((1.0, 1.5))
    assert not found.record_update(Update(request_id=0, index=0, tokens=[7], cached_tokens=4), 2.0)
    assert found.record_update(Update(request_id=0, index=1, tokens=[7], finish="length"), 2.5)
    timeline = found.timelines[0]
    assert (timeline.ttft, timeline.e2e, timeline.cached, timeline.served) == (1.0, 1.5, 4, True)
    assert found.gaps.percentile(50) == pytest.approx(0.5, rel=0.011)
    with pytest.raises(AssertionError, match="after its end"):
        found.record_update(Update(request_id=0, index=2, tokens=[7]), 3.0)


def test_jain_index_by_hand() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([5, 0, 0, 0, 0]) == pytest.approx(0.2)
    assert jain([]) == 1.0


def test_percentile_is_the_nearest_rank() -> None:
    values = list(range(100, 0, -1))
    assert [percentile(values, p) for p in (50, 99, 100)] == [50, 99, 100]
    assert percentile([4.0], 50) == 4.0
    assert percentile([], 50) == 0.0


@given(st.lists(st.floats(1e-5, 100.0), min_size=1, max_size=60), st.sampled_from([50, 90, 99]))
def test_gap_percentiles_are_right_to_a_percent(values: list[float], percent: float) -> None:
    gaps, halves = GapHistogram(), (GapHistogram(), GapHistogram())
    for number, value in enumerate(values):
        gaps.add(value)
        halves[number % 2].add(value)
    exact = percentile(values, percent)
    assert gaps.percentile(percent) == pytest.approx(exact, rel=0.011)
    halves[0].merge(halves[1])
    assert halves[0].percentile(percent) == gaps.percentile(percent)
    assert gaps.longest == max(values)
