"""scheduler.requests.rows: rows are reused in new generations, and sorted by order."""

from __future__ import annotations

import pytest

from engine.messages import Sampling, Stopping
from scheduler.requests.request import Request
from scheduler.requests.rows import RunningRows
from scheduler.types import BASE


def _request(arrival: int, priority: int = 0) -> Request:
    return Request(arrival, BASE, (priority, arrival), 1, [1], Sampling(), Stopping(1), priority=priority)


def test_row_gets_a_new_generation_at_each_reuse() -> None:
    running = RunningRows(1)
    first, second = _request(1), _request(2)
    running.add(first)
    running.remove(first)
    running.add(second)
    assert (first.row, first.generation, second.row, second.generation) == (0, 1, 0, 2)
    assert RunningRows(2, running.generations).generations == [2, 0]


def test_running_rows_are_sorted_and_audited() -> None:
    running = RunningRows(3)
    late, urgent, early = _request(5), _request(9, priority=-1), _request(3)
    for request in (late, urgent, early):
        running.add(request)
    assert running.ordered == [urgent, early, late]
    running.audit()
    running.ordered.remove(early)
    with pytest.raises(AssertionError, match="rows"):
        running.audit()
