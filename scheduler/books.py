"""All tables of the scheduler in one place, and the audit that proves them. Decides nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.messages import AdapterState, Capacity, LoadAdapter, UnloadAdapter, Update
from scheduler.kv.pages import Pages
from scheduler.lanes import Lanes
from scheduler.request import BASE, LaneKey, Request
from scheduler.residency import Residency, Stage
from scheduler.running import Running
from scheduler.stats import Counters
from scheduler.waiting import Place, Waiting


@dataclass(slots=True)
class Flight:
    """A step that was sent and not answered: by chunk, (request, whether it samples, how many positions it scores)."""

    id: int
    parts: list[tuple[Request, bool, int]] = field(default_factory=list)


class Books:
    """Requests, rows, pages, lanes, adapters, and what is to be told to others.

    `promised` are the keys that use their adapters: they hold a lane, or were granted pages and wait for one.
    """

    def __init__(self, capacity: Capacity, max_loras: int) -> None:
        self.requests: dict[int, Request] = {}
        self.waiting = Waiting()
        self.residency = Residency(capacity)
        self.counters = Counters()
        self.updates: list[Update] = []
        self.news: list[AdapterState | LoadAdapter | UnloadAdapter] = []
        self.max_loras = max_loras
        self.running = Running(0)
        self.open(capacity)

    def open(self, capacity: Capacity) -> None:
        """Empty tables for a (new) runner. Who was running must have been taken out before."""
        assert not self.running.ordered
        self.capacity = capacity
        self.pages = Pages(capacity.kv_pages)
        self.running = Running(capacity.rows, self.running.generations)
        self.lanes = Lanes(min(self.max_loras, capacity.max_loras))
        self.promised: dict[LaneKey, None] = {}
        self.flights: list[Flight] = []

    def audit(self) -> None:
        """Raises AssertionError when a page, row, lane, rank page, reference or queue entry is unaccounted for."""
        self.running.audit()
        self.waiting.audit()
        running = self.running.ordered
        self.pages.audit(page for request in running for page in request.pages)
        self.lanes.audit((request.key, request.lane) for request in running)
        users = Counter(adapter_id for key in self.promised for adapter_id, _ in key)
        names = Counter(adapter_id for request in self.requests.values() for adapter_id, _ in request.key)
        self.residency.audit(users, names)
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
            place, adapters = self.waiting.place_of(key), self.residency.adapters(key)
            if place is Place.ACTIVE:
                assert key == BASE or key in self.lanes, f"key {key} is active without a lane"
            elif place is Place.READY:
                assert key in self.promised, f"key {key} is ready without a promise"
                assert all(a.stage is Stage.RESIDENT for a in adapters), f"key {key} is ready and not resident"
            elif place is Place.COLD:
                assert key not in self.promised, f"key {key} is cold and promised"
                assert all(a.stage in (Stage.HOST, Stage.FILLING, Stage.RESIDENT) for a in adapters), f"{key} is lost"
            else:
                assert any(a.stage in (Stage.LOADING, Stage.FILLING) for a in adapters), f"key {key} waits for nothing"
        for key in self.promised:
            assert key in self.lanes or key in self.waiting, f"key {key} is promised for nobody"
