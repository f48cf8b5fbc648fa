"""scheduler.requests.queue: the order of requests within a key, and of the heads within a state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import Sampling, Stopping
from scheduler.requests.queue import WaitingQueue, WaitState
from scheduler.requests.request import Request
from scheduler.types import BASE, LaneKey

A: LaneKey = ((1, 1.0),)
B: LaneKey = ((1, 0.5), (2, 0.5))


def _request(arrival: int, key: LaneKey = BASE, priority: int = 0) -> Request:
    return Request(arrival, key, (priority, arrival), 1, [1], Sampling(), Stopping(1))


def test_heads_are_compared_within_a_state() -> None:
    waiting = WaitingQueue()
    late, early, other = _request(5, A), _request(3, A), _request(4, B)
    for request in (late, other, early):
        waiting.push(request)
    waiting.set_state(A, WaitState.READY)
    waiting.set_state(B, WaitState.READY)
    assert waiting.first(WaitState.READY) is early
    assert waiting.first(WaitState.COLD) is None
    waiting.remove(early)
    assert waiting.first(WaitState.READY) is other
    waiting.set_state(B, WaitState.COLD)
    assert (waiting.first(WaitState.READY), waiting.first(WaitState.COLD)) == (late, other)
    assert (waiting.head(A), waiting.state_of(B), len(waiting)) == (late, WaitState.COLD, 2)


def test_keys_are_indexed_by_adapter_while_they_have_requests() -> None:
    waiting = WaitingQueue()
    one, two = _request(1, A), _request(2, B)
    waiting.push(one)
    waiting.push(two)
    assert waiting.keys_of(1) == [A, B]
    waiting.remove(one)
    assert (waiting.keys_of(1), A in waiting, waiting.requests(A)) == ([B], False, [])
    waiting.remove(two)
    assert waiting.keys_of(1) == waiting.keys_of(2) == []


def test_wait_for_a_lane_begins_once_the_adapter_is_on_the_host() -> None:
    waiting = WaitingQueue()
    waiting.push(_request(1, A))
    for state, now in (
        (WaitState.DISK, 1.0),
        (WaitState.BLOCKED, 2.0),
        (WaitState.COLD, 3.0),
        (WaitState.BLOCKED, 4.0),
    ):
        waiting.set_state(A, state, now)
    waiting.set_state(A, WaitState.READY, 5.0)
    assert waiting.since(A) == 3.0, "its fill is part of the wait"


def test_audit_finds_a_request_that_was_not_pushed() -> None:
    waiting = WaitingQueue()
    waiting.push(_request(2, A))
    waiting.audit()
    waiting._queues[A].entries.insert(0, ((0, 1), _request(1, A)))
    with pytest.raises(AssertionError, match="another head"):
        waiting.audit()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(list(WaitState))), max_size=40))
def test_queue_equals_a_sorted_list_after_any_history(history: list[tuple[int, int, WaitState]]) -> None:
    waiting, held, states = WaitingQueue(), {}, {}
    keys = [BASE, A, B]
    for arrival, (which, action, state) in enumerate(history):
        key = keys[which]
        if action < 2:
            request = _request(arrival, key, priority=action)
            waiting.push(request)
            held[request.order] = request
            states.setdefault(key, WaitState.BLOCKED)
        elif action == 2 and held:
            order = sorted(held)[which % len(held)]
            waiting.remove(held.pop(order))
        elif key in waiting:
            waiting.set_state(key, state)
            states[key] = state
        states = {k: s for k, s in states.items() if any(r.key == k for r in held.values())}
        waiting.audit()
        for each in WaitState:
            expected = min((o for o, r in held.items() if states[r.key] is each), default=None)
            first = waiting.first(each)
            assert (first.order if first else None) == expected
