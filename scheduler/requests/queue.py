"""Waiting requests, indexed by lane key, so that planning never looks at more than a few heads.

    place      its keys wait for                        their heads are compared
    ACTIVE     a row and pages (their lane is held)     always
    READY      a lane as well                           while a lane is free
    COLD       rank pages: the head is served first     when filling
    DISK       an adapter that is to be read               when loading
    DRAINING   their lane to be free: it takes nobody    when somebody waited long
    BLOCKED    an adapter that loads or is being filled    never

Knows nothing of adapters' states: who waits where is the caller's word.
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
    """What a key's requests wait for."""

    ACTIVE = "active"
    DRAINING = "draining"
    READY = "ready"
    COLD = "cold"
    DISK = "disk"
    BLOCKED = "blocked"


@dataclass(slots=True)
class _Queue:
    place: WaitState
    since: float = 0.0
    entries: list[tuple[Order, Request]] = field(default_factory=list)


class WaitingQueue:
    """Sorted queues by key, and sorted keys (by their heads) by place."""

    def __init__(self) -> None:
        self._queues: dict[LaneKey, _Queue] = {}
        self._heads: dict[WaitState, list[tuple[Order, LaneKey]]] = {place: [] for place in WaitState}
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
        """Queues the request in its order. A new key begins BLOCKED: the caller places it."""
        queue = self._queues.get(request.key)
        if queue is None:
            queue = self._queues[request.key] = _Queue(WaitState.BLOCKED)
            for adapter_id, _ in request.key:
                self._keys_of.setdefault(adapter_id, {})[request.key] = None
        else:
            self._unlist(request.key, queue)
        insort(queue.entries, (request.order, request))
        self._list(request.key, queue)
        self._count += 1

    def remove(self, request: Request) -> None:
        """Takes the request out; its key goes with the last one."""
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

    def set_state(self, key: LaneKey, place: WaitState, now: float = 0.0) -> None:
        """Says what a key that has requests waits for. Its `since` is when its bytes came to the host."""
        queue = self._queues[key]
        if queue.place is not place:
            if queue.place in (WaitState.BLOCKED, WaitState.DISK) and place is WaitState.COLD:
                queue.since = now
            self._unlist(key, queue)
            queue.place = place
            self._list(key, queue)

    def first(self, place: WaitState) -> Request | None:
        """The request that goes first among all keys of a place."""
        heads = self._heads[place]
        return self._queues[heads[0][1]].entries[0][1] if heads else None

    def heads(self, *places: WaitState) -> Iterator[Request]:
        """The heads of all keys of some places, in order."""
        for _, key in merge(*(self._heads[place] for place in places)):
            yield self._queues[key].entries[0][1]

    def since(self, key: LaneKey) -> float:
        """Since when a key waits for no more than a lane or rank pages."""
        return self._queues[key].since

    def first_of(self, adapter_id: int) -> Order | None:
        """The place of the first request whose key names a copy."""
        keys = self._keys_of.get(adapter_id)
        if keys is None:
            return None
        return min([self._queues[key].entries[0][0] for key in keys])

    def count(self, key: LaneKey) -> int:
        """How many requests of a key wait."""
        return len(self._queues[key].entries)

    def head(self, key: LaneKey) -> Request:
        """The first request of a key that has any."""
        return self._queues[key].entries[0][1]

    def front(self, key: LaneKey, count: int) -> list[Request]:
        """The first few requests of a key, in order."""
        return [request for _, request in self._queues[key].entries[:count]]

    def requests(self, key: LaneKey) -> list[Request]:
        """All requests of a key, in order."""
        queue = self._queues.get(key)
        return [request for _, request in queue.entries] if queue else []

    def keys_of(self, adapter_id: int) -> list[LaneKey]:
        """The waiting keys that name an adapter."""
        return list(self._keys_of.get(adapter_id, ()))

    def all_keys(self) -> list[LaneKey]:
        """The keys that have requests."""
        return list(self._queues)

    def state_of(self, key: LaneKey) -> WaitState:
        """What a key that has requests waits for."""
        return self._queues[key].place

    def audit(self) -> None:
        """Proves that every queue is sorted and listed at its place, once, under its head."""
        listed: dict[LaneKey, WaitState] = {}
        for place, heads in self._heads.items():
            assert heads == sorted(heads), f"the {place.value} keys are out of order"
            for order, key in heads:
                assert key not in listed, f"key {key} is listed twice"
                listed[key] = place
                assert self._queues[key].entries[0][0] == order, f"key {key} is listed under another head"
        assert listed == {key: queue.place for key, queue in self._queues.items()}, "keys and places disagree"
        assert self._count == sum(len(queue.entries) for queue in self._queues.values()), "the count is off"
        for key, queue in self._queues.items():
            orders = [order for order, _ in queue.entries]
            assert orders == sorted(set(orders)), f"the queue of {key} is out of order"
            assert all(key in self._keys_of[adapter_id] for adapter_id, _ in key), f"key {key} is not indexed"

    def _list(self, key: LaneKey, queue: _Queue) -> None:
        insort(self._heads[queue.place], (queue.entries[0][0], key))

    def _unlist(self, key: LaneKey, queue: _Queue) -> None:
        heads = self._heads[queue.place]
        index = bisect_left(heads, (queue.entries[0][0], key))
        assert heads[index][1] == key, f"key {key} is not listed"
        del heads[index]

    def _forget(self, key: LaneKey) -> None:
        del self._queues[key]
        for adapter_id, _ in key:
            keys = self._keys_of[adapter_id]
            del keys[key]
            if not keys:
                del self._keys_of[adapter_id]


def _entry_order(entry: tuple[Order, Request]) -> Order:
    return entry[0]
