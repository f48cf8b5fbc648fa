"""All tables of the scheduler in one place, and the audit that proves them. Decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from engine.messages import AdapterState, Capacity, EvictAdapter, LoadAdapter, UnloadAdapter, Update
from scheduler.adapter import Copy, Device, Host
from scheduler.directory import Directory
from scheduler.eviction import Policy
from scheduler.host_tier import HostTier
from scheduler.kv.pages import Pages
from scheduler.lanes import Lanes
from scheduler.request import BASE, LaneKey, Order, Request
from scheduler.residency import Residency
from scheduler.running import Running
from scheduler.stats import Counters
from scheduler.waiting import Place, Waiting


@dataclass(slots=True)
class Flight:
    """A step that was sent and not answered: by chunk, (request, whether it samples, how many positions it scores)."""

    id: int
    parts: list[tuple[Request, bool, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the flags say: lanes, the host tier (None: no count; bytes as the runner's capacity says), the policy."""

    max_loras: int = 0
    max_loaded_loras: int | None = None
    lora_host_bytes: int | None = None
    eviction_policy: Policy = "lru"


class Books:
    """Requests, rows, pages, lanes, adapters, and what is to be told to others.

    `promised` are the keys that use their copies: they hold a lane, or were granted pages and wait for one.
    `wishes` are copies on the host that are to become resident though nobody waits for them. `stirred`: something
    happened since loads and evictions were last thought about.
    """

    def __init__(self, capacity: Capacity, bounds: Bounds) -> None:
        self.bounds = bounds
        self.requests: dict[int, Request] = {}
        self.waiting = Waiting()
        self.tick = count(1).__next__
        self._arrivals = count()
        self.directory = Directory()
        self.host = HostTier(bounds.max_loaded_loras, self._host_bytes(capacity), bounds.eviction_policy, self.tick)
        self.residency = Residency(capacity, bounds.eviction_policy, self.tick)
        self.counters = Counters()
        self.updates: list[Update] = []
        self.news: list[Capacity | AdapterState | LoadAdapter | UnloadAdapter | EvictAdapter] = []
        self.wishes: dict[int, None] = {}
        self.stirred = False
        self.running = Running(0)
        self.open(capacity)

    def open(self, capacity: Capacity) -> None:
        """Empty tables for a (new) runner. Who was running must have been taken out before."""
        assert not self.running.ordered
        self.capacity = capacity
        self.pages = Pages(capacity.kv_pages)
        self.running = Running(capacity.rows, self.running.generations)
        self.lanes = Lanes(min(self.bounds.max_loras, capacity.max_loras))
        self.promised: dict[LaneKey, None] = {}
        self.flights: list[Flight] = []
        self.residency.reset(capacity)
        self.host.reset(self._host_bytes(capacity))
        self.wishes.clear()

    def next_order(self) -> Order:
        """The next place in the queue, of the usual priority."""
        return 0, next(self._arrivals)

    def copies(self, key: LaneKey) -> list[Copy]:
        """The copies of a key."""
        return self.directory.of(key)

    def lane_pages(self, key: LaneKey) -> dict[str, list[tuple[int, float]]]:
        """What the lane of a key holds, all of which is resident."""
        return self.residency.lane_pages(zip(self.directory.of(key), (scale for _, scale in key), strict=True))

    def name(self, keys: Iterable[LaneKey], step: int) -> None:
        """Step `step` names the pages of these keys."""
        copies = self.directory.copies
        for key in keys:
            for copy_id, _ in key:
                copies[copy_id].last_step = step

    def rest(self, copy: Copy) -> None:
        """Something about it changed: is it spare, is it idle?"""
        self.host.rest(copy)
        self.residency.rest(copy)
        self.stirred = True

    def tell(self, copy: Copy, seconds: float = 0.0, error: str | None = None) -> None:
        """News of the copy, under each of its names."""
        self.news += [adapter.report(seconds, error) for adapter in copy.names.values()]

    def _host_bytes(self, capacity: Capacity) -> int:
        bound = self.bounds.lora_host_bytes
        return capacity.host_bytes if bound is None else bound

    def audit(self) -> None:
        """Raises AssertionError when a page, row, lane, rank page, reference or queue entry is unaccounted for."""
        self.running.audit()
        self.waiting.audit()
        running = self.running.ordered
        self.pages.audit(page for request in running for page in request.pages)
        self.lanes.audit((request.key, request.lane) for request in running)
        users = Counter(copy_id for key in self.promised for copy_id, _ in key)
        names = Counter(adapter_id for request in self.requests.values() for adapter_id in request.names)
        wanted = Counter(copy_id for request in self.requests.values() for copy_id, _ in request.key)
        self.directory.audit(names, wanted)
        self.residency.audit(self.directory.copies.values(), users)
        self.host.audit(self.directory.copies.values())
        assert set(self.lanes.active()) <= set(self.promised), "a lane is not promised its adapters"
        self._audit_requests()
        self._audit_flights()
        self._audit_places()

    def _audit_requests(self) -> None:
        running, waiting = {r.id for r in self.running.ordered}, [r.id for r in self.waiting]
        assert len(waiting) == len(set(waiting)), "a request waits twice"
        assert not running & set(waiting), "a request runs and waits"
        assert running | set(waiting) == set(self.requests), "a request is lost"
        for request in self.running.ordered:
            room = len(request.pages) * self.capacity.page_size
            assert request.computed <= room, f"request {request.id} computed {request.computed} in room for {room}"
            assert request.computed <= len(request.tokens) + request.pending, f"request {request.id} ran ahead"
        for request in self.waiting:
            assert request.row < 0, f"request {request.id} waits with a row"
            assert not request.pages, f"request {request.id} waits with pages"

    def _audit_flights(self) -> None:
        named: Counter[Request] = Counter()
        samples: Counter[Request] = Counter()
        for flight in self.flights:
            for request, sampling, _ in flight.parts:
                named[request] += 1
                samples[request] += sampling
        for request in self.requests.values():
            assert request.flights == named[request], f"request {request.id} counts {request.flights} flights"
            assert request.pending == samples[request], f"request {request.id} counts {request.pending} pending"

    def _audit_places(self) -> None:
        for key in self.waiting.all_keys():
            place, copies = self.waiting.place_of(key), self.directory.of(key)
            if place is Place.ACTIVE:
                assert key == BASE or key in self.lanes, f"key {key} is active without a lane"
            elif place is Place.READY:
                assert key in self.promised, f"key {key} is ready without a promise"
                assert all(c.device is Device.RESIDENT for c in copies), f"key {key} is ready and not resident"
            elif place is Place.COLD:
                assert key not in self.promised, f"key {key} is cold and promised"
                assert all(c.on_device or c.host is Host.HELD for c in copies), f"key {key} is cold and not on the host"
            elif place is Place.DISK:
                assert any(c.to_load for c in copies), f"key {key} waits for a load that nobody needs"
            else:
                assert all(not c.to_load for c in copies), f"key {key} waits for a load that nobody starts"
                busy = [c for c in copies if c.device is not Device.RESIDENT and not c.can_fill]
                assert busy, f"key {key} waits for nothing"
        for key in self.promised:
            assert key in self.lanes or key in self.waiting, f"key {key} is promised for nobody"
