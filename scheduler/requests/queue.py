"""Waiting requests, indexed by lane key, so that planning only looks at the first request (the head) of a few keys.

    state      the requests of a key wait for           when their heads are looked at
    ACTIVE     a row and KV pages (their lane is held)  in each step
    READY      a lane, a row and KV pages               while a lane is free
    COLD       rank pages, for a fill                   when fills are chosen
    DISK       an adapter to be loaded                  when loads are chosen
    DRAINING   their lane to drain: it admits none      when a request has waited for long
    BLOCKED    an adapter that is loading or filling    never

Does not know the state of adapters: the caller sets the states of the keys.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from heapq import merge

from scheduler.requests.request import Request
from scheduler.types import LaneKey, Order


class WaitState(Enum):
    """What the waiting requests of a key need next."""

    ACTIVE = "active"
    DRAINING = "draining"
    READY = "ready"
    COLD = "cold"
    DISK = "disk"
    BLOCKED = "blocked"


@dataclass(slots=True)
class _KeyQueue:
    """The waiting requests of one lane key, in order."""

    state: WaitState
    since: float = 0.0
    entries: list[tuple[Order, Request]] = field(default_factory=list)


class WaitingQueue:
    """A sorted queue for each key, and for each state the sorted heads of its keys."""

    def __init__(self) -> None:
        self._queues: dict[LaneKey, _KeyQueue] = {}
        self._heads: dict[WaitState, list[tuple[Order, LaneKey]]] = {state: [] for state in WaitState}
        self._keys_of: dict[int, dict[LaneKey, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            for _, request in queue.entries:
                yield request

    def __contains__(self, key: LaneKey) -> bool:
        return key in self._queues

    def push(self, request: Request) -> None:
        """Inserts the request by its order. A new key is BLOCKED until the caller sets its state."""
        queue = self._queues.get(request.key)
        if queue is None:
            queue = self._queues[request.key] = _KeyQueue(WaitState.BLOCKED)
            for copy_id, _ in request.key:
                self._keys_of.setdefault(copy_id, {})[request.key] = None
        else:
            self._unlist(request.key, queue)
        insort(queue.entries, (request.order, request))
        self._list(request.key, queue)
        self._count += 1

    def remove(self, request: Request) -> None:
        """Removes the request, and also its key if no other request of the key waits."""
        key, queue = request.key, self._queues[request.key]
        self._unlist(key, queue)
        index = bisect_left(queue.entries, request.order, key=_entry_order)
        assert queue.entries[index][1] is request, f"request {request.id} does not wait"
        del queue.entries[index]
        self._count -= 1
        if queue.entries:
            self._list(key, queue)
        else:
            self._forget(key)

    def set_state(self, key: LaneKey, state: WaitState, now: float = 0.0) -> None:
        """Sets the wait state of a key, which must have waiting requests."""
        queue = self._queues[key]
        if queue.state is not state:
            if queue.state in (WaitState.BLOCKED, WaitState.DISK) and state is WaitState.COLD:
                queue.since = now
            self._unlist(key, queue)
            queue.state = state
            self._list(key, queue)

    def state_of(self, key: LaneKey) -> WaitState:
        """Returns the wait state of a key, which must have waiting requests."""
        return self._queues[key].state

    def first(self, state: WaitState) -> Request | None:
        """Returns the first request, by order, among all keys in a state, or None if there is none."""
        heads = self._heads[state]
        return self._queues[heads[0][1]].entries[0][1] if heads else None

    def heads(self, *states: WaitState) -> Iterator[Request]:
        """Yields the first request of each key in these states, sorted by order."""
        for _, key in merge(*(self._heads[state] for state in states)):
            yield self._queues[key].entries[0][1]

    def since(self, key: LaneKey) -> float:
        """Returns when the key's adapters came to the host: since then it has waited only for rank pages or a lane."""
        return self._queues[key].since

    def first_order_of(self, copy_id: int) -> Order | None:
        """Returns the order of the first waiting request that needs an adapter copy, or None if no request does."""
        keys = self._keys_of.get(copy_id)
        if keys is None:
            return None
        return min([self._queues[key].entries[0][0] for key in keys])

    def count(self, key: LaneKey) -> int:
        """Returns the number of waiting requests of a key, which must have at least one."""
        return len(self._queues[key].entries)

    def head(self, key: LaneKey) -> Request:
        """Returns the first waiting request of a key, which must have at least one."""
        return self._queues[key].entries[0][1]

    def front(self, key: LaneKey, count: int) -> list[Request]:
        """Returns the first `count` waiting requests of a key, in order; the key must have at least one."""
        return [request for _, request in self._queues[key].entries[:count]]

    def requests(self, key: LaneKey) -> list[Request]:
        """Returns all waiting requests of a key, in order; none for a key that is not in the queue."""
        queue = self._queues.get(key)
        return [request for _, request in queue.entries] if queue else []

    def keys_of(self, copy_id: int) -> list[LaneKey]:
        """Returns the keys with waiting requests that contain an adapter copy."""
        return list(self._keys_of.get(copy_id, ()))

    def lane_keys(self) -> list[LaneKey]:
        """Returns all keys that have waiting requests."""
        return list(self._queues)

    def audit(self) -> None:
        """Asserts that each key's queue is sorted, and that each key is listed once, under its state and its head."""
        listed: dict[LaneKey, WaitState] = {}
        for state, heads in self._heads.items():
            assert heads == sorted(heads), f"the {state.value} keys are out of order"
            for order, key in heads:
                assert key not in listed, f"key {key} is listed twice"
                listed[key] = state
                assert self._queues[key].entries[0][0] == order, f"key {key} is listed by another head"
        assert listed == {key: queue.state for key, queue in self._queues.items()}, "keys are listed in other states"
        assert self._count == sum(len(queue.entries) for queue in self._queues.values()), "the count is wrong"
        for key, queue in self._queues.items():
            orders = [order for order, _ in queue.entries]
            assert orders == sorted(set(orders)), f"the queue of {key} is out of order"
            assert all(key in self._keys_of[copy_id] for copy_id, _ in key), f"key {key} is not indexed"

    def _list(self, key: LaneKey, queue: _KeyQueue) -> None:
        insort(self._heads[queue.state], (queue.entries[0][0], key))

    def _unlist(self, key: LaneKey, queue: _KeyQueue) -> None:
        heads = self._heads[queue.state]
        index = bisect_left(heads, (queue.entries[0][0], key))
        assert heads[index][1] == key, f"key {key} is not listed"
        del heads[index]

    def _forget(self, key: LaneKey) -> None:
        del self._queues[key]
        for copy_id, _ in key:
            keys = self._keys_of[copy_id]
            del keys[key]
            if not keys:
                del self._keys_of[copy_id]


def _entry_order(entry: tuple[Order, Request]) -> Order:
    return entry[0]
