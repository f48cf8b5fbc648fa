"""Which adapters are read from disk now, and which host copies go for them. Knows nothing of rank pages or steps.

Loads begin in the order of those who wait for them, at most MAX_LOADS at a time; errands (loads that a client asked
for, and copies that are to be here though nobody waits) take turns with them and have a place in the same order.

To make room, in this order:    spare copies, by the policy
                                host copies of resident ones (their rank pages stay)
                                copies that only later ones wait for, the latest first

So a copy that somebody waits for never goes for someone behind him, and the first in order always gets on.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from engine.messages import EvictAdapter
from scheduler.adapters.copies import Adapter, Copy, Device, Host
from scheduler.admission import Admission
from scheduler.requests.queue import WaitState
from scheduler.state import SchedulerState
from scheduler.types import BASE, LaneKey, Order

MAX_LOADS = 4
BEFORE_ALL: Order = (-(1 << 62), 0)  # before everyone: whoever waits may be made to wait longer


class DiskLoader:
    """Loads and host evictions, over the books."""

    def __init__(self, state: SchedulerState, admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self._requested: dict[int, Order] = {}
        self._to_reload: dict[int, None] = {}  # were here before the runner died: read again while there is room
        self._requested_goes_next = False

    def request_load(self, copy: Copy) -> None:
        """The copy is to be read though nobody waits for it."""
        self._requested.setdefault(copy.id, copy.preload_order or self._state.next_order())
        self._state.loads_due = True

    def reload_when_room(self, copies: list[Copy]) -> None:
        """These were in the tiers of a runner that died."""
        self._to_reload = {copy.id: None for copy in copies}

    def reset(self) -> None:
        """A new runner: whoever is to be read is asked for again."""
        self._requested.clear()
        self._to_reload.clear()

    def start_loads(self) -> None:
        """Evicts what is above the bounds and begins the loads that may begin; nothing to do unless books stirred."""
        state = self._state
        while state.loads_due:
            state.loads_due = False
            self._evict_over_limit()
            while state.host_cache.loading < MAX_LOADS and self._start_one():
                pass

    def retry_other_path(self, copy: Copy) -> bool:
        """A load failed: tries the files of another of its names, if there is one; true if it does."""
        adapter = self._untried(copy)
        if adapter is not None:
            self._send(copy, adapter)
        return adapter is not None

    # ------------------------------------------------------------------------------------------------------- loads

    def _start_one(self) -> bool:
        """Begins the next load; false if there is none or it must wait."""
        waiting, requested = self._next_waiting(), self._next_requested()
        if waiting is None and requested is None:
            return self._start_reload()
        if waiting is None or requested is None:
            return self._try(waiting, requested)
        requested_first = self._requested_goes_next
        if self._try(None if requested_first else waiting, requested if requested_first else None):
            self._requested_goes_next = not requested_first
            return True
        may_try_other = (waiting[2] < requested[1]) if requested_first else (requested[1] < waiting[2])
        return may_try_other and self._try(waiting if requested_first else None, None if requested_first else requested)

    def _try(self, waiting: tuple[Copy, LaneKey, Order] | None, requested: tuple[Copy, Order] | None) -> bool:
        """Begins this load if there is room, or ends the wait for what can never be."""
        if waiting is not None:
            copy, key, order = waiting
        else:
            assert requested is not None
            (copy, order), key = requested, BASE
        if self._make_room(copy, order):
            self._start(copy)
            if waiting is not None and key in self._state.waiting:
                self._state.ordering.on_transfer(self._state.waiting.head(key), copy.info.bytes)
            return True
        state = self._state
        copies = state.copies(key) or [copy]
        problem = state.host_cache.never_fits(copies, state.registry.pinned.values())
        if problem is None:
            return False
        if key != BASE:
            self._admission.fail_waiting(key, problem)
            return True
        self._requested.pop(copy.id, None)
        copy.preload_order = None
        if copy.known:
            state.report(copy, error=problem)
        else:
            self._admission.fail_copy(copy, problem)
        return True

    def _next_waiting(self) -> tuple[Copy, LaneKey, Order] | None:
        request = self._state.waiting.first(WaitState.DISK)
        if request is None:
            return None
        copy = next(copy for copy in self._state.copies(request.key) if copy.to_load)
        return copy, request.key, request.order

    def _next_requested(self) -> tuple[Copy, Order] | None:
        for copy_id, order in list(self._requested.items()):
            copy = self._state.registry.copies.get(copy_id)
            if copy is not None and copy.to_load and copy.error is None and not copy.is_unloading:
                return copy, order
            if copy is None or copy.host is not Host.EVICTING:
                del self._requested[copy_id]
        return None

    def _start_reload(self) -> bool:
        while self._to_reload:
            copy = self._state.registry.copies.get(next(iter(self._to_reload)))
            if copy is not None and copy.to_load and copy.error is None and not copy.is_unloading:
                if not self._state.host_cache.has_room(copy):
                    self._to_reload.clear()
                    return False
                self._start(copy)
                return True
            del self._to_reload[next(iter(self._to_reload))]
        return False

    def _start(self, copy: Copy) -> None:
        self._requested.pop(copy.id, None)
        self._to_reload.pop(copy.id, None)
        self._state.host_cache.start(copy)
        copy.tried_paths.clear()
        adapter = self._untried(copy)
        assert adapter is not None
        self._send(copy, adapter)
        if copy.known:
            self._state.report(copy)
        self._admission.update_wait_states(copy)

    def _send(self, copy: Copy, adapter: Adapter) -> None:
        copy.tried_paths.append(adapter.source.path)
        copy.sent_to_runner = True
        source, revision = adapter.source, copy.info.revision
        self._state.outbox.append(replace(source, adapter_id=copy.runner_id, revision=revision, pinned=copy.pinned))

    @staticmethod
    def _untried(copy: Copy) -> Adapter | None:
        return next((adapter for adapter in copy.names.values() if adapter.source.path not in copy.tried_paths), None)

    # --------------------------------------------------------------------------------------------------- evictions

    def _make_room(self, copy: Copy, order: Order) -> bool:
        """Whether the load may begin; sends away what it needs gone, or nobody if that is not enough."""
        host = self._state.host_cache
        places, size = host.lacking(copy)
        if places or size:
            victims: list[Copy] = []
            for victim in self._victims(order):
                victims.append(victim)
                places, size = places - 1, size - victim.info.bytes
                if places <= 0 and size <= 0:
                    break
            if places > 0 or size > 0:
                return False
            for victim in victims:
                self._evict(victim)
        return host.has_room(copy)

    def _evict_over_limit(self) -> None:
        """Back within the bound on bytes, as far as it goes."""
        if self._state.host_cache.lacking() == (0, 0):
            return
        for victim in list(self._victims(BEFORE_ALL)):
            if self._state.host_cache.lacking() == (0, 0):
                return
            self._evict(victim)

    def _victims(self, order: Order) -> Iterator[Copy]:
        """Who may go for a load in this place of the order, in the order of going."""
        host = self._state.host_cache
        yield from [host.held[copy_id] for copy_id in host.spare]
        busy = [c for c in host.held.values() if host.evictable(c) and c.id not in host.spare]
        yield from (copy for copy in busy if copy.device is Device.RESIDENT)
        waited = ((self._state.first_waiting_order(copy), copy.id) for copy in busy if copy.device is Device.NONE)
        for _, copy_id in sorted(((p, i) for p, i in waited if p is not None and p > order), reverse=True):
            yield host.held[copy_id]

    def _evict(self, copy: Copy) -> None:
        state = self._state
        state.host_cache.evict(copy)
        state.counters.host_evictions += 1
        state.outbox.append(EvictAdapter(copy.runner_id))
        if copy.preload_order is not None:
            state.preloads.pop(copy.id, None)
            self._requested[copy.id] = copy.preload_order
        self._admission.update_wait_states(copy)
