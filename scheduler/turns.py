"""Whose turn it is: who is admitted next, and which lanes make way for somebody who waited too long.

    next       the first in order among ACTIVE heads and, unless one of these was skipped, READY and COLD heads
    skipped    a READY or COLD head that finds no lane or no rank pages: only ACTIVE ones, whose lane is in the step
               anyway, pass it. When the first of those that could go lacks a row or KV pages, nobody is admitted:
               a smaller request must not pass a larger one for ever
    late       passed for a fifth of the bound: a lane takes nobody any more until it is free
    overdue    passed for most of the bound, less a step and the time of its fill: a lane is taken from its rows; they
               go back to the queue, and what was made free is for who was overdue, though they may be before it in
               order. A key is as late as the one of its requests that was passed for longest

Knows nothing of steps' contents. Times are those of the caller.
"""

from __future__ import annotations

from collections import Counter

from scheduler.adapter import Copy
from scheduler.admission import Admission
from scheduler.books import Books
from scheduler.filling import Filling, Outcome
from scheduler.preemption import HeldLane, by_drain, by_loss
from scheduler.request import LaneKey, Order, Request
from scheduler.waiting import Place

DRAIN_SHARE = 0.2  # of the bound: then a lane begins to drain
TAKE_SHARE = 0.8  # of the bound: then a lane is taken; the rest is for the others that became overdue at the same time
FRONT = 32  # requests of a key whose clocks are looked at: who went back to the queue stands before who waits for long
HEADS = 512  # that are looked at: who went back to the queue is before many who never had a lane
LEAST_SHARE = 1 / 16  # of the bound: a lane is held for so long, however many wait
LOOKS = 64  # at the clocks of those who wait, within the bound
FIRST: Order = (float("-inf"),)  # before everyone
LAST = float("inf")


class Turns:
    """The order of admissions, over the books."""

    def __init__(self, books: Books, admission: Admission, filling: Filling) -> None:
        self._books = books
        self._admission = admission
        self._filling = filling
        self._overdue: dict[int, Request] = {}
        self._skipped: Request | None = None
        self._looked = float("-inf")

    # ------------------------------------------------------------------------------------------------- before a step

    def begin(self) -> None:
        """A step is being planned: lanes drain, or are taken from their rows, for those who waited too long."""
        books = self._books
        self._skipped = None
        self._overdue = {i: r for i, r in self._overdue.items() if self._blocked(r)}
        bound = books.bounds.lora_max_wait
        if not (books.now - self._looked < bound / LOOKS):
            self._looked = books.now
            self._make_way(bound)

    def waited(self, request: Request) -> float:
        """For how long a waiting request has been passed because of its adapter, as far as lanes and pages go."""
        books = self._books
        passed = books.overtaking.since(request.order)
        if passed is None:
            return 0.0
        return books.now - max(passed, request.queued_at, books.waiting.since(request.key))

    def _make_way(self, bound: float) -> None:
        books, filling = self._books, self._filling
        margin = filling.step_seconds + bound / LOOKS
        late: list[Request] = []
        for count, head in enumerate(books.waiting.heads(Place.READY, Place.COLD, Place.DRAINING)):
            if count == 0:
                books.overtaking.settle(self._first_place())
            if books.overtaking.since(head.order) is None:
                break  # nor was anyone behind it
            if count == HEADS:
                break
            request = max(books.waiting.front(head.key, FRONT), key=self.waited)
            waited = self.waited(request)
            if waited >= bound / 4:
                waited += filling.seconds(request.key)
            if waited + margin >= TAKE_SHARE * bound:
                self._overdue.setdefault(request.id, request)
            elif waited >= DRAIN_SHARE * bound:
                late.append(request)
        if late or self._overdue or books.draining:
            lanes = self._lanes()
            for request in self._overdue.values():
                lanes.pop(request.key, None)  # it is draining for another, and has drained for long enough
            way = _Way(books, books.lanes.free)
            self._drain(lanes, way, [*self._take(lanes, way, bound), *late])

    def _first_place(self) -> Order | None:
        return min((request.order for place in Place if (request := self._books.waiting.first(place))), default=None)

    def _lanes(self) -> dict[LaneKey, HeldLane]:
        """All, with their rows."""
        books = self._books
        lanes: dict[LaneKey, HeldLane] = {}
        for request in books.running.ordered:
            if request.lane:
                lane = lanes.get(request.key)
                if lane is None:
                    held = books.now - books.lanes.since(request.key)
                    lane = lanes[request.key] = HeldLane(request.key, held, request.key in books.draining)
                lane.rows.append(request)
        return lanes

    def _take(self, lanes: dict[LaneKey, HeldLane], way: _Way, bound: float) -> list[Request]:
        """Takes lanes from their rows for who is overdue. Returns who got none.

        None is taken that has a row that did not get on in it (else rows that take long to bring back would make way
        for one another for ever), or has not been held for its share of the bound: the more wait, the shorter that is.
        """
        ordered = self._books.running.ordered
        count = self._books.lanes.count
        share = bound * max(LEAST_SHARE, count / (count + len(self._overdue)))
        old = (lane for lane in lanes.values() if lane.held >= share and lane.decoding)
        candidates = by_loss(old, ordered[0] if ordered else None)
        left = list(self._overdue.values())
        while left and (chosen := way.make(left[0], candidates)) is not None:
            left.pop(0)
            for lane in chosen:
                candidates.remove(lane)
                del lanes[lane.key]
                for row in list(lane.rows):
                    self._admission.preempt(row)
                    self._books.counters.lane_preemptions += 1
        return left

    def _drain(self, lanes: dict[LaneKey, HeldLane], way: _Way, late: list[Request]) -> None:
        candidates = by_drain(lanes.values())
        draining: dict[LaneKey, None] = {}
        for request in late:
            if (chosen := way.make(request, candidates)) is None:
                break
            for lane in chosen:
                candidates.remove(lane)
                draining[lane.key] = None
        for key in [key for key in self._books.draining if key not in draining]:
            self._admission.drain(key, False)
        for key in draining:
            if key not in self._books.draining:
                self._admission.drain(key, True)

    # ------------------------------------------------------------------------------------------------ while it is made

    def next(self) -> Request | None:
        """The request to be admitted now, with its copies resident, or None. Ask again after it was admitted."""
        books = self._books
        while self._overdue and books.lanes.free:
            request = next(iter(self._overdue.values()))
            if not self._blocked(request):
                del self._overdue[request.id]
                continue
            if request.flights or not self._has_memory(request):
                return None  # what was made free for it is for nobody else
            opened = self._opens(request, FIRST)
            if opened or request.done:
                del self._overdue[request.id]
            if opened:
                return request
            if not request.done:
                self._skipped = request
                break  # the lane is for it, when it is filled
        while True:
            active = books.waiting.first(Place.ACTIVE)
            head = self._head() if self._skipped is None else None
            best = head if active is None or (head is not None and head.order < active.order) else active
            if best is None or best.flights or not self._has_memory(best):
                return None  # tokens in flight are applied before their request comes back
            if best is active or self._opens(best, best.order):
                books.overtaking.passed(best.order, books.now)
                return best
            if best.key in books.waiting and books.waiting.place_of(best.key) in (Place.READY, Place.COLD):
                self._skipped = best  # else it is being filled, or failed

    def end(self) -> None:
        """Nobody else is admitted to this step. Who was skipped though there is room for it could have gone."""
        if self._skipped is not None and self._has_memory(self._skipped):
            everyone = (*self._books.last_place, LAST)
            self._books.overtaking.passed(everyone, self._books.now)

    def _head(self) -> Request | None:
        ready, cold = self._books.waiting.first(Place.READY), self._books.waiting.first(Place.COLD)
        return cold if ready is None or (cold is not None and cold.order < ready.order) else ready

    def _opens(self, request: Request, order: Order) -> bool:
        """Whether a head may have a lane now: it is resident, or made so in this step as if it were at `order`."""
        books = self._books
        if request.key in books.lanes:
            return True
        if not books.lanes.free:
            return False
        resident = books.waiting.place_of(request.key) is Place.READY
        return resident or self._filling.fetch(request, order) is Outcome.RESIDENT

    def _has_memory(self, request: Request) -> bool:
        """Whether there is a row, and pages for all its tokens; a page is left for each running row."""
        books = self._books
        return books.running.free > 0 and books.kv.admits(request, books.owner(request.key), len(books.running))

    def _blocked(self, request: Request) -> bool:
        """Whether it still waits for a lane or rank pages."""
        books = self._books
        waits = not request.done and request.row < 0 and request.key in books.waiting
        return waits and books.waiting.place_of(request.key) in (Place.READY, Place.COLD, Place.DRAINING)


class _Way:
    """What one request after another would find if lanes were taken for them: lanes, and room for rank pages."""

    def __init__(self, books: Books, free: int) -> None:
        self._books = books
        self._free = free
        self._room = books.residency.room()
        self._users: dict[int, int] = {}

    def make(self, request: Request, candidates: list[HeldLane]) -> list[HeldLane] | None:
        """The first of the candidates, as many as this request needs gone; None if all are too few."""
        books = self._books
        if request.key in books.lanes:
            return []
        room, users = dict(self._room), dict(self._users)
        copies = books.copies(request.key)
        for count in range(len(candidates) + 1):
            if count:
                self._leave(candidates[count - 1], room, users)
            if self._free + count > 0 and not books.residency.lacking_in(copies, room):
                for group, need in _pages(copies).items():
                    room[group] -= need
                self._free, self._room, self._users = self._free + count - 1, room, users
                return candidates[:count]
        return None

    def _leave(self, lane: HeldLane, room: dict[str, int], users: dict[int, int]) -> None:
        for copy in self._books.copies(lane.key):
            users[copy.id] = users.get(copy.id, 0) + 1
            if users[copy.id] == copy.users and not copy.pinned:
                for group, pages in copy.pages.items():
                    room[group] += len(pages)


def _pages(copies: list[Copy]) -> Counter[str]:
    """What copies that are not in use take out of the room."""
    return sum((Counter(copy.need) for copy in copies if not copy.users), Counter())
