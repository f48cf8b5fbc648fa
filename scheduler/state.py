"""All tables of the scheduler in one place. scheduler.audit asserts that they agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from engine.messages import AdapterState, Capacity, EvictAdapter, Generate, LoadAdapter, UnloadAdapter, Update
from scheduler.adapters.copies import AdapterCopy
from scheduler.adapters.device_cache import DeviceCache
from scheduler.adapters.host_cache import HostCache
from scheduler.adapters.lanes import Lanes
from scheduler.adapters.registry import AdapterRegistry
from scheduler.adapters.stamp_order import Policy
from scheduler.kv_cache.kv_cache_manager import KvCacheManager
from scheduler.requests.blame import BlameTracker
from scheduler.requests.fairness import make_ordering
from scheduler.requests.policy import SchedulePolicy
from scheduler.requests.queue import WaitingQueue
from scheduler.requests.request import Request
from scheduler.requests.rows import RunningRows
from scheduler.requests.starvation import StarvationTracker
from scheduler.stats import Counters
from scheduler.types import LaneKey, Order, Owner

MIN_PREFILL_TOKENS = 64  # the least default of `max_prefill_tokens`: smaller chunks read all weights for little work


@dataclass(slots=True)
class InFlightStep:
    """A step that was sent and whose StepDone has not come yet."""

    id: int
    parts: list[tuple[Request, bool, int]] = field(default_factory=list)  # per chunk: request, samples, scored count
    starts: list[int] = field(default_factory=list)  # per chunk: its first position


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits and policies that the command line's flags set."""

    max_loras: int = 0  # the most lanes
    max_loaded_loras: int | None = None  # the most copies in the host cache; None: no limit
    lora_host_bytes: int | None = None  # the most bytes in the host cache; None: the runner's capacity gives the limit
    eviction_policy: Policy = "lru"  # the eviction policy of both caches
    lora_max_wait: float = 5.0  # seconds that a request may be overtaken by later requests because of its adapter
    max_prefill_tokens: int | None = None  # the most in a step with decodes; None: a quarter of max_batched_tokens
    prefix_cache: bool = True
    schedule_policy: SchedulePolicy = "fcfs"
    tenant_weights: dict[str, float] = field(default_factory=dict)  # for the fair policy


class SchedulerState:
    """Requests, rows, KV pages, lanes, adapters, and the messages to be sent."""

    def __init__(self, capacity: Capacity, bounds: Bounds) -> None:
        self.bounds = bounds
        self.now = 0.0  # the time of the current call, in seconds
        self.tick = count(1).__next__  # counts the uses of copies, by which eviction sorts them
        self.counters = Counters()
        # requests
        self.requests: dict[int, Request] = {}  # all running and waiting requests, by id, in the order of arrival
        self.waiting = WaitingQueue()
        self.running = RunningRows(0)
        self.ordering = make_ordering(bounds.schedule_policy, bounds.tenant_weights)
        self.starvation = StarvationTracker()
        self.blame = BlameTracker()
        self.last_order: Order = (0, -(1 << 62), 0)  # the largest order of all requests that arrived
        self._arrivals = count()
        # adapters
        self.registry = AdapterRegistry(self.tick)
        self.host_cache = HostCache(
            bounds.max_loaded_loras, self._host_bytes(capacity), bounds.eviction_policy, self.tick
        )
        self.device_cache = DeviceCache(capacity, bounds.eviction_policy, self.tick, self.wanted_order)
        self.preloads: dict[int, None] = {}  # ids of copies on the host that have a preload
        self.opportunistic_fills: dict[int, None] = {}  # ids of copies that are filled only into free pages
        self.suspect_fills: set[int] = set()  # ids of copies whose fill was in flight when a runner died
        self.loads_due = False  # True if a table changed since DiskLoader.start_loads last ran
        # messages to be sent
        self.updates: list[Update] = []  # updates of requests, to be sent in Progress messages
        self.outbox: list[Capacity | AdapterState | LoadAdapter | UnloadAdapter | EvictAdapter] = []
        # tables of what the runner holds, emptied when a new runner starts
        self.kv = KvCacheManager(0, capacity.page_size, bounds.prefix_cache)
        self.replace_runner(capacity)

    def replace_runner(self, capacity: Capacity) -> list[AdapterCopy]:
        """Empties the tables for a new runner. No request may be running. Returns the copies that the old one held."""
        assert not self.running.ordered
        self.capacity = capacity
        self.kv.reset(capacity.kv_pages, capacity.page_size)
        self.running = RunningRows(capacity.rows, self.running.generations)
        self.lanes = Lanes(min(self.bounds.max_loras, capacity.max_loras))
        self.draining: dict[LaneKey, None] = {}  # keys whose lane admits no more requests
        self.in_flight: list[InFlightStep] = []  # oldest first
        self.preloads.clear()
        self.opportunistic_fills.clear()
        copies = list(self.registry.copies.values())
        held = [copy for copy in copies if copy.on_host or copy.on_device]
        self.device_cache.reset(capacity, copies)
        self.host_cache.reset(self._host_bytes(capacity), copies)
        return held

    @property
    def max_prefill_tokens(self) -> int:
        """The most prefill tokens in a step that also has decodes."""
        bound = self.bounds.max_prefill_tokens
        return max(MIN_PREFILL_TOKENS, self.capacity.max_batched_tokens // 4) if bound is None else bound

    # ------------------------------------------------------------------------------------------------------- orders

    def next_order(self) -> Order:
        """Returns the next order at the default priority, for a load or fill that no request waits for."""
        return self.ordering.order_without_request(next(self._arrivals))

    def order_on_arrival(self, message: Generate) -> Order:
        """Returns the order of a request that arrives now."""
        order = self.ordering.order_on_arrival(message, next(self._arrivals))
        self.last_order = max(self.last_order, order)
        return order

    def order_behind_passed(self, request: Request) -> Order:
        """Returns an order for a request to be requeued: right behind all overtaken requests of its priority."""
        return self.ordering.order_behind(request, self.starvation.frontier, next(self._arrivals))

    def wanted_order(self, copy: AdapterCopy) -> Order | None:
        """Returns the order of the first waiting request or preload that needs the copy, or None."""
        first, preload = self.waiting.first_order_of(copy.id), copy.references.preload_order
        if first is None or preload is None:
            return first or preload
        return min(first, preload)

    # ------------------------------------------------------------------------------------------------------- copies

    def copies(self, key: LaneKey) -> list[AdapterCopy]:
        """Returns the copies of a lane key."""
        return self.registry.of(key)

    def owner(self, key: LaneKey) -> Owner:
        """Returns the owner of the KV pages that requests with this lane key compute."""
        copies = self.registry.copies
        return tuple(sorted((copies[copy_id].identity, scale) for copy_id, scale in key))

    def lane_pages(self, key: LaneKey) -> dict[str, list[tuple[int, float]]]:
        """Returns by group the (rank page, scale) pairs of the key's lane. The key's copies must be resident."""
        scales = (scale for _, scale in key)
        return self.device_cache.lane_pages(zip(self.registry.of(key), scales, strict=True))

    def mark_used(self, keys: Iterable[LaneKey], step: int) -> None:
        """Records that step `step` names the rank pages of these keys."""
        copies = self.registry.copies
        self.device_cache.mark_used((copies[copy_id] for key in keys for copy_id, _ in key), step)

    def drop_revision(self, copy: AdapterCopy) -> None:
        """Unlists the copy from its revision: no more names share it, and no lookup finds KV pages of the revision."""
        if self.registry.unlist_revision(copy):
            self.kv.drop_revision(copy.identity)

    def queue_fill(self, copy: AdapterCopy) -> None:
        """Queues the fill of a copy on the host: for its preload, or without a preload only into free pages."""
        if copy.references.preload_order is not None:
            self.preloads[copy.id] = None
        elif copy.id not in self.suspect_fills:
            self.opportunistic_fills[copy.id] = None

    def next_preload(self) -> tuple[AdapterCopy, Order] | None:
        """Returns the first copy that can be filled for its preload, with the preload's order, or None."""
        while self.preloads:
            copy = self.registry.copies.get(next(iter(self.preloads)))
            if copy is not None and copy.can_fill and (order := copy.references.preload_order) is not None:
                return copy, order
            del self.preloads[next(iter(self.preloads))]
        return None

    def reclassify(self, copies: Iterable[AdapterCopy]) -> None:
        """Updates in both caches whether these copies, which have changed, may be evicted. Marks loads as due."""
        for copy in copies:
            self.host_cache.reclassify(copy)
            self.device_cache.reclassify(copy)
        self.loads_due = True

    def report(self, copy: AdapterCopy, seconds: float = 0.0, error: str | None = None) -> None:
        """Puts the state of each name of the copy into the outbox, for the tokenizer process."""
        self.outbox += [adapter.to_message(seconds, error) for adapter in copy.names.values()]

    def _host_bytes(self, capacity: Capacity) -> int:
        bound = self.bounds.lora_host_bytes
        return capacity.host_bytes if bound is None else bound
