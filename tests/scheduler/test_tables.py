"""The small tables: running rows, lanes, rank pages, the victim."""

from __future__ import annotations

import pytest

from engine.messages import Sampling, Stopping
from scheduler.adapters.lanes import Lanes
from scheduler.adapters.rank_pages import RankPages
from scheduler.batching.preemption import choose_victim
from scheduler.requests.request import Request
from scheduler.requests.rows import RunningRows
from scheduler.types import BASE, LaneKey


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


def test_victim_is_least_urgent_then_cheapest_then_latest() -> None:
    one, two, three, four = _request(1, priority=1), _request(2), _request(3), _request(4)
    one.computed, two.computed, three.computed, four.computed = 900, 5, 20, 20
    assert choose_victim([two, three, four, one], first=two) is one
    assert choose_victim([two, three, four], first=two) is four, "the first in order is cheaper, and is spared"
    four.computed = 21
    assert choose_victim([two, three, four], first=two) is three
    assert choose_victim([two, three, four], first=_request(0)) is two
    assert choose_victim([two], first=two) is two


def test_lanes_are_shared_by_key_and_freed_with_the_last_row() -> None:
    lanes = Lanes(2)
    a, b = ((1, 1.0),), ((1, 0.5),)
    assert lanes.acquire(BASE) == (0, False)
    assert lanes.acquire(a) == (1, True)
    assert lanes.acquire(a) == (1, False)
    assert lanes.acquire(b) == (2, True)
    assert lanes.free == 0
    assert not lanes.release(a)
    assert lanes.release(a)
    assert lanes.free == 1
    lanes.audit([(b, 2), (BASE, 0)])


@pytest.mark.parametrize("rows", [[], [(((1, 1.0),), 2)], [(((1, 1.0),), 1)] * 2, [(BASE, 1), (((1, 1.0),), 1)]])
def test_lane_audit_finds_wrong_rows(rows: list[tuple[LaneKey, int]]) -> None:
    lanes = Lanes(2)
    lanes.acquire(((1, 1.0),))
    with pytest.raises(AssertionError):
        lanes.audit(rows)


def test_rank_pages_cool_until_their_last_step_is_done() -> None:
    pool = RankPages({"qkv": 2, "o": 1})
    pages = pool.grant({"qkv": 2, "o": 0})
    assert (sorted(pages["qkv"]), "o" in pages) == ([0, 1], False)
    assert pool.lacking({"qkv": 1, "o": 1, "head": 1}) == {"qkv": 1, "head": 1}
    pool.release(pages, last_step=5)
    assert pool.lacking({"qkv": 2}) == {"qkv": 2}
    assert pool.lacking({"qkv": 2}, with_cooling=True) == {}
    pool.audit([])
    pool.step_done(4)
    assert pool.lacking({"qkv": 1})
    pool.step_done(5)
    assert not pool.lacking({"qkv": 2})
    pool.release(pool.grant({"qkv": 1}), last_step=5)  # that step is over: free at once
    assert pool.used() == {"qkv": 0, "o": 0}


def test_rank_page_audit_finds_a_leak() -> None:
    pool = RankPages({"qkv": 2})
    pool.grant({"qkv": 1})
    with pytest.raises(AssertionError, match="rank pages of qkv"):
        pool.audit([])
