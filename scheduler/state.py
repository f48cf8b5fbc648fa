"""All tables of the scheduler in one place, and the audit that proves them. Decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from engine.messages import AdapterState, Capacity, EvictAdapter, Generate, LoadAdapter, UnloadAdapter, Update
from scheduler.adapters.copies import Copy, Device, Host
from scheduler.adapters.device_cache import DeviceCache
from scheduler.adapters.eviction import Policy
from scheduler.adapters.host_cache import HostCache
from scheduler.adapters.lanes import Lanes
from scheduler.adapters.registry import AdapterRegistry
from scheduler.kv_cache.kv_cache_manager import KvCacheManager
from scheduler.requests.blame import BlameTracker
from scheduler.requests.fairness import make_ordering
from scheduler.requests.policy import SchedulePolicy
from scheduler.requests.queue import WaitingQueue, WaitState
from scheduler.requests.request import Request
from scheduler.requests.rows import RunningRows
from scheduler.requests.starvation import StarvationTracker
from scheduler.stats import Counters
from scheduler.types import BASE, LaneKey, Order, Owner

MIN_PREFILL_TOKENS = 64  # fewer would read all weights for next to nothing


@dataclass(slots=True)
class InFlightStep:
    """A step that was sent and not answered: by chunk, (request, whether it samples, how many positions it scores), and
    the position that it starts at.
    """

    id: int
    parts: list[tuple[Request, bool, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the flags say: lanes, the host tier (None: no count; bytes as the runner's capacity says), the policy.

    `lora_max_wait`: seconds that a request may be passed by others because of its adapter. `max_prefill_tokens`: in a
    step in which somebody decodes; None: a quarter of the runner's `max_batched_tokens`, at least MIN_PREFILL_TOKENS.
    """

    max_loras: int = 0
    max_loaded_loras: int | None = None
    lora_host_bytes: int | None = None
    eviction_policy: Policy = "lru"
    lora_max_wait: float = 5.0
    max_prefill_tokens: int | None = None
    prefix_cache: bool = True
    schedule_policy: SchedulePolicy = "fcfs"
    tenant_weights: dict[str, float] = field(default_factory=dict)


class SchedulerState:
    """Requests, rows, pages, lanes, adapters, and what is to be told to others.

    `now` is the time of the call under way. `draining` are keys whose lane takes nobody any more. `wishes` are copies
    on the host that are to become resident though nobody waits for them, `unasked` those that may while there is room,
    `doubted` those that may not, as a runner died while they were filled.
    `stirred`: something happened since loads and evictions were last thought about.
    """

    def __init__(self, capacity: Capacity, bounds: Bounds) -> None:
        self.bounds = bounds
        self.now = 0.0
        self.ordering = make_ordering(bounds.schedule_policy, bounds.tenant_weights)
        self.starvation = StarvationTracker()
        self.requests: dict[int, Request] = {}
        self.waiting = WaitingQueue()
        self.blame = BlameTracker()
        self.suspect_fills: set[int] = set()
        self.tick = count(1).__next__
        self._arrivals = count()
        self.last_order: Order = (0, -(1 << 62), 0)  # of those who came so far
        self.registry = AdapterRegistry()
        self.host_cache = HostCache(
            bounds.max_loaded_loras, self._host_bytes(capacity), bounds.eviction_policy, self.tick
        )
        self.device_cache = DeviceCache(capacity, bounds.eviction_policy, self.tick, self.first_waiting_order)
        self.counters = Counters()
        self.updates: list[Update] = []
        self.outbox: list[Capacity | AdapterState | LoadAdapter | UnloadAdapter | EvictAdapter] = []
        self.preloads: dict[int, None] = {}
        self.opportunistic_fills: dict[int, None] = {}
        self.loads_due = False
        self.running = RunningRows(0)
        self.kv = KvCacheManager(0, capacity.page_size, bounds.prefix_cache)
        self.open(capacity)

    def open(self, capacity: Capacity) -> None:
        """Empty tables for a (new) runner. Who was running must have been taken out before."""
        assert not self.running.ordered
        self.capacity = capacity
        self.kv.reset(capacity.kv_pages, capacity.page_size)
        self.running = RunningRows(capacity.rows, self.running.generations)
        self.lanes = Lanes(min(self.bounds.max_loras, capacity.max_loras))
        self.draining: dict[LaneKey, None] = {}
        self.in_flight: list[InFlightStep] = []
        self.device_cache.reset(capacity)
        self.host_cache.reset(self._host_bytes(capacity))
        self.preloads.clear()
        self.opportunistic_fills.clear()

    @property
    def max_prefill_tokens(self) -> int:
        """The most prefill tokens of a step in which somebody decodes."""
        bound = self.bounds.max_prefill_tokens
        return max(MIN_PREFILL_TOKENS, self.capacity.max_batched_tokens // 4) if bound is None else bound

    def next_order(self) -> Order:
        """The next place in the queue, of the usual priority."""
        return self.ordering.order_without_request(next(self._arrivals))

    def order_on_arrival(self, message: Generate) -> Order:
        """The place of a request that comes now."""
        order = self.ordering.order_on_arrival(message, next(self._arrivals))
        self.last_order = max(self.last_order, order)
        return order

    def order_behind_passed(self, request: Request) -> Order:
        """The place behind everyone of a running request's priority who was passed, and before all others."""
        return self.ordering.order_behind(request, self.starvation.frontier, next(self._arrivals))

    def first_waiting_order(self, copy: Copy) -> Order | None:
        """The place of the first who waits for it, if anyone does."""
        first = self.waiting.first_order_of(copy.id)
        if first is None or copy.preload_order is None:
            return first or copy.preload_order
        return min(first, copy.preload_order)

    def queue_fill(self, copy: Copy) -> None:
        """The copy came to the host tier: it is to be filled though nobody waits for it, if only when there is room."""
        if copy.preload_order is not None:
            self.preloads[copy.id] = None
        elif copy.id not in self.suspect_fills:
            self.opportunistic_fills[copy.id] = None

    def first_preload(self) -> Copy | None:
        """The first of the wishes that can be filled."""
        while self.preloads:
            copy = self.registry.copies.get(next(iter(self.preloads)))
            if copy is not None and copy.preload_order is not None and copy.can_fill:
                return copy
            del self.preloads[next(iter(self.preloads))]
        return None

    def copies(self, key: LaneKey) -> list[Copy]:
        """The copies of a key."""
        return self.registry.of(key)

    def owner(self, key: LaneKey) -> Owner:
        """Whose KV pages a request of this key computes: by revision, which is known of whoever was loaded."""
        copies = self.registry.copies
        return tuple(sorted((copies[copy_id].identity, scale) for copy_id, scale in key))

    def drop_revision(self, copy: Copy) -> None:
        """Nobody else is to share the copy, and no KV page of its revision is found any more."""
        if self.registry.unlist_revision(copy):
            self.kv.drop_revision(copy.identity)

    def lane_pages(self, key: LaneKey) -> dict[str, list[tuple[int, float]]]:
        """What the lane of a key holds, all of which is resident."""
        return self.device_cache.lane_pages(zip(self.registry.of(key), (scale for _, scale in key), strict=True))

    def mark_used(self, keys: Iterable[LaneKey], step: int) -> None:
        """Step `step` names the pages of these keys."""
        copies = self.registry.copies
        for key in keys:
            for copy_id, _ in key:
                copies[copy_id].last_step = step

    def reclassify(self, copy: Copy) -> None:
        """Something about it changed: is it spare, is it idle?"""
        self.host_cache.reclassify(copy)
        self.device_cache.reclassify(copy)
        self.loads_due = True

    def report(self, copy: Copy, seconds: float = 0.0, error: str | None = None) -> None:
        """News of the copy, under each of its names."""
        self.outbox += [adapter.to_message(seconds, error) for adapter in copy.names.values()]

    def _host_bytes(self, capacity: Capacity) -> int:
        bound = self.bounds.lora_host_bytes
        return capacity.host_bytes if bound is None else bound

    def audit(self, kv_pages: int | None = None) -> None:
        """Raises AssertionError when a page, row, lane, rank page, reference or queue entry is unaccounted for.

        Of more than `kv_pages` KV pages only the sums and as many in turn are proved.
        """
        self.running.audit()
        self.waiting.audit()
        running = self.running.ordered
        self.kv.audit(running, kv_pages)
        self.lanes.audit((request.key, request.lane) for request in running)
        users = Counter(copy_id for key in self.lanes.active() for copy_id, _ in key)
        names = Counter(adapter_id for request in self.requests.values() for adapter_id in request.adapter_ids)
        wanted = Counter(copy_id for request in self.requests.values() for copy_id, _ in request.key)
        self.registry.audit(names, wanted)
        self.device_cache.audit(self.registry.copies.values(), users)
        self.host_cache.audit(self.registry.copies.values())
        assert set(self.draining) <= set(self.lanes.active()), "a lane is draining that is free"
        self._audit_requests()
        self._audit_in_flight()
        self._audit_places()

    def _audit_requests(self) -> None:
        running, waiting = {r.id for r in self.running.ordered}, [r.id for r in self.waiting]
        assert len(waiting) == len(set(waiting)), "a request waits twice"
        assert not running & set(waiting), "a request runs and waits"
        assert running | set(waiting) == set(self.requests), "a request is lost"
        assert set(self.blame) <= set(self.requests), "a suspect has ended"
        assert not len(self.blame) or running <= set(self.blame), "others run beside a suspect"
        assert not len(self.blame) or len(running) <= 1, "suspects run together"
        for request in self.running.ordered:
            room = len(request.pages) * self.capacity.page_size
            assert request.computed <= room, f"request {request.id} computed {request.computed} in room for {room}"
            assert request.computed <= len(request.tokens) + request.pending, f"request {request.id} ran ahead"
        for request in self.waiting:
            assert request.row < 0, f"request {request.id} waits with a row"
            assert not request.pages, f"request {request.id} waits with pages"

    def _audit_in_flight(self) -> None:
        named: Counter[Request] = Counter()
        samples: Counter[Request] = Counter()
        for step in self.in_flight:
            for request, sampling, _ in step.parts:
                named[request] += 1
                samples[request] += sampling
        for request in self.requests.values():
            counted = request.steps_in_flight
            assert counted == named[request], f"request {request.id} counts {counted} steps in flight"
            assert request.pending == samples[request], f"request {request.id} counts {request.pending} pending"

    def _audit_places(self) -> None:
        for key in self.waiting.lane_keys():
            place, copies = self.waiting.state_of(key), self.registry.of(key)
            if place in (WaitState.ACTIVE, WaitState.DRAINING):
                assert key == BASE or key in self.lanes, f"key {key} is active without a lane"
                assert (key in self.draining) == (place is WaitState.DRAINING), f"key {key} drains and does not"
            elif place is WaitState.READY:
                assert key not in self.lanes, f"key {key} waits for the lane that it has"
                assert all(c.device is Device.RESIDENT for c in copies), f"key {key} is ready and not resident"
            elif place is WaitState.COLD:
                assert any(c.device is Device.NONE for c in copies), f"key {key} is cold and has pages"
                assert all(c.on_device or c.host is Host.HELD for c in copies), f"key {key} is cold and not on the host"
            elif place is WaitState.DISK:
                assert any(c.to_load for c in copies), f"key {key} waits for a load that nobody needs"
            else:
                assert all(not c.to_load for c in copies), f"key {key} waits for a load that nobody starts"
                busy = [c for c in copies if c.device is not Device.RESIDENT and not c.can_fill]
                assert busy, f"key {key} waits for nothing"
