"""scheduler.batching.preemption: which row is preempted."""

from __future__ import annotations

from engine.messages import Sampling, Stopping
from scheduler.batching.preemption import choose_victim
from scheduler.requests.request import Request
from scheduler.types import BASE


def _request(arrival: int, priority: int = 0) -> Request:
    return Request(arrival, BASE, (priority, arrival), 1, [1], Sampling(), Stopping(1), priority=priority)


def test_victim_is_least_urgent_then_cheapest_then_latest() -> None:
    one, two, three, four = _request(1, priority=1), _request(2), _request(3), _request(4)
    one.computed, two.computed, three.computed, four.computed = 900, 5, 20, 20
    assert choose_victim([two, three, four, one], first=two) is one
    assert choose_victim([two, three, four], first=two) is four, "the first in order is cheaper, and is spared"
    four.computed = 21
    assert choose_victim([two, three, four], first=two) is three
    assert choose_victim([two, three, four], first=_request(0)) is two
    assert choose_victim([two], first=two) is two
