"""Chooses which adapters are loaded from disk, and which host copies are evicted for them. Knows no rank pages.

At most MAX_LOADS run at a time. Loads for waiting requests begin in the order of the queue. Requested loads (because a
client asked for one, or a copy is pinned or preloaded) alternate with these, and have orders that compare with theirs.

A load evicts, in this order:    spare copies, by the policy
                                 host copies of copies on the device (their rank pages stay)
                                 copies for which only later requests wait, beginning with the last in the queue

So a copy is never evicted for a request that is behind the first request that waits for the copy, and the first request
in order always advances.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from engine.messages import EvictAdapter
from scheduler.adapters.copies import Adapter, AdapterCopy, HostState
from scheduler.admission.admission import Admission
from scheduler.requests.queue import WaitState
from scheduler.state import SchedulerState
from scheduler.types import BASE, LaneKey, Order

MAX_LOADS = 4
BEFORE_ALL: Order = (-(1 << 62), 0)  # an order before every request: any copy that requests wait for may be evicted


class _Load(NamedTuple):
    """A load that may begin. `key`: the lane key of the request that waits for it, or BASE for a requested load."""

    copy: AdapterCopy
    key: LaneKey
    order: Order


class DiskLoader:
    """Starts loads, and evicts host copies for them."""

    def __init__(self, state: SchedulerState, admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self._requested: dict[int, Order] = {}  # requested loads by copy id: no request waits for them
        self._reloads: dict[int, None] = {}  # ids of copies that a dead runner held: loaded again while there is room
        self._requested_is_next = False  # whether a requested load has its turn: the two kinds of loads alternate

    def request_load(self, copy: AdapterCopy) -> None:
        """Queues a load of the copy that does not depend on waiting requests."""
        self._requested.setdefault(copy.id, copy.references.preload_order or self._state.next_order())
        self._state.loads_due = True

    def reload_into_free_room(self, copies: list[AdapterCopy]) -> None:
        """Queues loads of these copies, which a dead runner held. They begin after all other loads, into free room."""
        self._reloads = {copy.id: None for copy in copies}

    def reset(self) -> None:
        """Forgets all loads that have not begun, for a new runner."""
        self._requested.clear()
        self._reloads.clear()

    def start_loads(self) -> None:
        """If loads are due, evicts copies until the cache is within its limits, and begins the loads that may begin."""
        state = self._state
        while state.loads_due:
            state.loads_due = False
            self._evict_over_limit()
            while state.host_cache.loading < MAX_LOADS and self._start_next():
                pass

    def retry_other_path(self, copy: AdapterCopy) -> bool:
        """Sends a failed load again with the path of another name of the copy. Returns False if all were tried."""
        adapter = self._untried_name(copy)
        if adapter is not None:
            self._send(copy, adapter)
        return adapter is not None

    # ------------------------------------------------------------------------------------------------------- loads

    def _start_next(self) -> bool:
        """Begins the next load. Returns False if there is none, or it must wait."""
        waiting, requested = self._first_waiting(), self._first_requested()
        if waiting is None and requested is None:
            return self._start_reload()
        if waiting is None or requested is None:
            return self._try(waiting or requested)
        first, second = (requested, waiting) if self._requested_is_next else (waiting, requested)
        if self._try(first):
            self._requested_is_next = not self._requested_is_next
            return True
        return second.order < first.order and self._try(second)

    def _try(self, load: _Load | None) -> bool:
        """Begins this load if there is room, or cancels it if it never fits. Returns False if it must wait."""
        assert load is not None
        copy, key, order = load
        if self._make_room(copy, order):
            self._start(copy)
            if key != BASE and key in self._state.waiting:
                self._state.ordering.on_transfer(self._state.waiting.head(key), copy.info.bytes)
            return True
        state = self._state
        error = state.host_cache.never_fits(state.copies(key) or [copy], state.registry.pinned.values())
        if error is None:
            return False
        if key != BASE:
            self._admission.fail_waiting(key, error)
        else:
            self._cancel_requested(copy, error)
        return True

    def _cancel_requested(self, copy: AdapterCopy, error: str) -> None:
        self._requested.pop(copy.id, None)
        self._state.registry.set_preload(copy, None)
        if copy.loaded_once:
            self._state.report(copy, error=error)
        else:
            self._admission.fail_copy(copy, error)

    def _first_waiting(self) -> _Load | None:
        request = self._state.waiting.first(WaitState.DISK)
        if request is None:
            return None
        copy = next(copy for copy in self._state.copies(request.key) if copy.needs_load)
        return _Load(copy, request.key, request.order)

    def _first_requested(self) -> _Load | None:
        for copy_id, order in list(self._requested.items()):
            copy = self._state.registry.copies.get(copy_id)
            if copy is not None and copy.may_load:
                return _Load(copy, BASE, order)
            if copy is None or copy.host.state is not HostState.EVICTING:
                del self._requested[copy_id]
        return None

    def _start_reload(self) -> bool:
        while self._reloads:
            copy = self._state.registry.copies.get(next(iter(self._reloads)))
            if copy is not None and copy.may_load:
                if not self._state.host_cache.has_room(copy):
                    self._reloads.clear()
                    return False
                self._start(copy)
                return True
            del self._reloads[next(iter(self._reloads))]
        return False

    def _start(self, copy: AdapterCopy) -> None:
        self._requested.pop(copy.id, None)
        self._reloads.pop(copy.id, None)
        self._state.host_cache.start_load(copy)
        adapter = self._untried_name(copy)
        assert adapter is not None
        self._send(copy, adapter)
        self._admission.changed([copy], report=copy.loaded_once)

    def _send(self, copy: AdapterCopy, adapter: Adapter) -> None:
        source = adapter.source
        self._state.host_cache.add_tried_path(copy, source.path)
        self._state.outbox.append(
            replace(source, adapter_id=copy.runner_id, revision=copy.info.revision, pinned=copy.pinned)
        )

    @staticmethod
    def _untried_name(copy: AdapterCopy) -> Adapter | None:
        tried = copy.host.tried_paths
        return next((adapter for adapter in copy.names.values() if adapter.source.path not in tried), None)

    # --------------------------------------------------------------------------------------------------- evictions

    def _make_room(self, copy: AdapterCopy, order: Order) -> bool:
        """Evicts copies to make room for a load, or none if this cannot suffice. Returns whether it may begin now.

        An eviction takes time: the load begins when the runner has reported it.
        """
        host_cache = self._state.host_cache
        places, size = host_cache.lacking(copy)
        if places or size:
            victims: list[AdapterCopy] = []
            for victim in self._victims(order):
                victims.append(victim)
                places, size = places - 1, size - victim.info.bytes
                if places <= 0 and size <= 0:
                    break
            if places > 0 or size > 0:
                return False
            self._evict(victims)
        return host_cache.has_room(copy)

    def _evict_over_limit(self) -> None:
        """Evicts copies until the cache is within its limits, or no more copies may be evicted."""
        places, size = self._state.host_cache.lacking()
        victims: list[AdapterCopy] = []
        for victim in self._victims(BEFORE_ALL) if places or size else ():
            if places <= 0 and size <= 0:
                break
            victims.append(victim)
            places, size = places - 1, size - victim.info.bytes
        self._evict(victims)

    def _victims(self, order: Order) -> Iterator[AdapterCopy]:
        """Iterates over the copies that may be evicted for a load at `order`, in the order of eviction."""
        host_cache = self._state.host_cache
        yield from [host_cache.held[copy_id] for copy_id in host_cache.spare]
        wanted = [c for c in host_cache.held.values() if host_cache.is_evictable(c) and c.id not in host_cache.spare]
        yield from (copy for copy in wanted if copy.on_device)
        orders = ((self._state.wanted_order(copy), copy.id) for copy in wanted if not copy.on_device)
        for _, copy_id in sorted(((at, i) for at, i in orders if at is not None and at > order), reverse=True):
            yield host_cache.held[copy_id]

    def _evict(self, copies: list[AdapterCopy]) -> None:
        """Lets the runner evict these copies. Copies that wait for a preload are loaded again when there is room."""
        state = self._state
        for copy in state.host_cache.evict(copies):
            state.outbox.append(EvictAdapter(copy.runner_id))
            if (order := copy.references.preload_order) is not None:
                state.preloads.pop(copy.id, None)
                self._requested[copy.id] = order
        if copies:
            state.counters.host_evictions += len(copies)
            self._admission.changed(copies)
