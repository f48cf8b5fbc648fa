"""Whose turn it is: who is admitted next, and which lanes make way for those who were passed.

    next       the first in order among ACTIVE heads and, unless one of these was skipped, READY and COLD heads
    skipped    a READY or COLD head that finds no lane or no rank pages: only ACTIVE ones, whose lane is in the step
               anyway, pass it. When the first of those that could go lacks a row or KV pages, nobody is admitted:
               a smaller request must not pass a larger one for ever
    deadline   the bound after a head was passed first, less a step and the time of its fill. A lane whose rows end just
               before one takes nobody any more (DRAINING); where too few do, lanes are taken from their rows
    overdue    those for whom lanes had to be taken: what was made free is for them, though others may be before them

    passed . a . b . c | d ...         rows of a taken lane had their turn: they go behind everyone who was passed, and
                      ^ row            the bound begins anew for them. So lanes go around

With B keys waiting for L lanes, a lane is held for bound * L / B on average if all deadlines are to be met. One that
was held for less is taken after all others, and for less than LEAST_SHARE of the bound not at all: so the bound holds
while B is at most L / LEAST_SHARE, and so many adapters can be filled in time. Beyond that all wait longer, in the
order of their deadlines.

Knows nothing of steps' contents. Times are those of the caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import islice

from scheduler.adapters.copies import Copy
from scheduler.admission import Admission
from scheduler.batching.deadlines import Wait, to_drain, to_take
from scheduler.batching.preemption import HeldLane, by_end, by_loss
from scheduler.loading.device_loader import Filling, Outcome
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import Books
from scheduler.types import LaneKey, Order

LEAST_SHARE = 1 / 16  # of the bound: a lane is held for so long, however many wait
LOOKS = 64  # at the clocks of those who wait, within the bound
HEADS = 4  # that are looked at, for each lane
FILL_FACTOR = 2  # a fill takes so many times its seconds: steps go on beside it
FRONT = 32  # requests of a key whose clocks are looked at where the first came back for want of KV pages
FIRST: Order = (float("-inf"),)  # before everyone
LAST = float("inf")


class AdmissionOrder:
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
        passed = books.starvation.since(request.order)
        if passed is None:
            return 0.0
        return books.now - max(passed, request.queued_at, books.waiting.since(request.key))

    def _make_way(self, bound: float) -> None:
        books, step = self._books, self._filling.step_seconds
        waits = self._waits(bound)
        if not (waits or books.draining):
            return
        lanes = by_end(self._lanes().values())
        ends = [step * lane.remaining for lane in lanes]
        take = to_take([wait for wait, _ in waits], ends, most=max(step, bound / LOOKS))
        self._overdue = {request.id: request for _, request in waits[:take]}
        grace = 2 * (step + bound / LOOKS)
        needed = to_drain([wait for wait, _ in waits[max(take, books.lanes.free) :]], ends, grace)
        self._drain({lanes[index].key: None for index in needed})
        if self._overdue:
            self._take(lanes, bound, len(waits))

    def _waits(self, bound: float) -> list[tuple[Wait, Request]]:
        """Who was passed and is the most urgent of its key, by slack."""
        books, filling = self._books, self._filling
        margin = 2 * filling.step_seconds + bound / LOOKS
        pace = LEAST_SHARE * bound / max(1, books.lanes.count)
        found: list[tuple[Wait, Request]] = []
        heads = books.waiting.heads(WaitState.READY, WaitState.COLD, WaitState.DRAINING)
        for count, head in enumerate(islice(heads, HEADS * max(books.lanes.count, 16))):
            if count == 0:
                books.starvation.settle(self._first_place())
            passed = books.starvation.since(head.order)
            if passed is None:
                break  # nor was anyone behind it
            request = head
            if head.queued_at > passed:  # it came back: others of its key may have been passed for longer
                request = max(books.waiting.front(head.key, FRONT), key=self.waited)
            fill = filling.seconds(request.key)
            slack = bound - margin - fill - self.waited(request)
            found.append((Wait(slack, max(FILL_FACTOR * fill, pace)), request))
        return sorted(found, key=_slack)

    def _first_place(self) -> Order | None:
        return min(
            (request.order for place in WaitState if (request := self._books.waiting.first(place))), default=None
        )

    def _lanes(self) -> dict[LaneKey, HeldLane]:
        """All, with their rows."""
        books = self._books
        lanes: dict[LaneKey, HeldLane] = {}
        for request in books.running.ordered:
            if request.lane:
                lane = lanes.get(request.key)
                if lane is None:
                    held = books.now - books.lanes.since(request.key)
                    lane = lanes[request.key] = HeldLane(request.key, held)
                lane.rows.append(request)
        return lanes

    def _drain(self, keys: Collection[LaneKey]) -> None:
        """These lanes take nobody any more, all others do."""
        for key in [key for key in self._books.draining if key not in keys]:
            self._admission.drain(key, False)
        for key in keys:
            if key not in self._books.draining:
                self._admission.drain(key, True)

    def _take(self, lanes: list[HeldLane], bound: float, waiting: int) -> None:
        """Takes lanes from their rows for who is overdue.

        None is taken that has a row that did not get on in it: else rows that take long to bring back would make way
        for one another for ever.
        """
        books = self._books
        first = books.running.ordered[0] if books.running.ordered else None
        theirs = {request.key for request in self._overdue.values()}  # it drains for others, and will have done so
        old = (lane for lane in lanes if lane.held >= LEAST_SHARE * bound and lane.decoding and lane.key not in theirs)
        candidates = by_loss(old, first, fair=bound * books.lanes.count / max(1, waiting))
        way = _Way(books, books.lanes.free)
        for request in self._overdue.values():
            if (chosen := way.make(request, candidates)) is None:
                break
            for lane in chosen:
                candidates.remove(lane)
                for row in list(lane.rows):
                    self._admission.preempt(row, books.behind_passed(row))
                    books.counters.lane_preemptions += 1

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
            active = books.waiting.first(WaitState.ACTIVE)
            head = self._head() if self._skipped is None else None
            best = head if active is None or (head is not None and head.order < active.order) else active
            if best is None or best.flights or not self._has_memory(best):
                return None  # tokens in flight are applied before their request comes back
            if best is active or self._opens(best, best.order):
                books.starvation.passed(best.order, books.now)
                return best
            if best.key in books.waiting and books.waiting.state_of(best.key) in (WaitState.READY, WaitState.COLD):
                self._skipped = best  # else it is being filled, or failed

    def end(self) -> None:
        """Nobody else is admitted to this step. Who was skipped though there is room for it could have gone."""
        if self._skipped is not None and self._has_memory(self._skipped):
            everyone = (*self._books.last_place, LAST)
            self._books.starvation.passed(everyone, self._books.now)

    def _head(self) -> Request | None:
        ready, cold = self._books.waiting.first(WaitState.READY), self._books.waiting.first(WaitState.COLD)
        return cold if ready is None or (cold is not None and cold.order < ready.order) else ready

    def _opens(self, request: Request, order: Order) -> bool:
        """Whether a head may have a lane now: it is resident, or made so in this step as if it were at `order`."""
        books = self._books
        if request.key in books.lanes:
            return True
        if not books.lanes.free:
            return False
        resident = books.waiting.state_of(request.key) is WaitState.READY
        return resident or self._filling.fetch(request, order) is Outcome.RESIDENT

    def _has_memory(self, request: Request) -> bool:
        """Whether there is a row, and pages for all its tokens; a page is left for each running row."""
        books = self._books
        return books.running.free > 0 and books.kv.admits(request, books.owner(request.key), len(books.running))

    def _blocked(self, request: Request) -> bool:
        """Whether it still waits for a lane or rank pages."""
        books = self._books
        waits = not request.done and request.row < 0 and request.key in books.waiting
        return waits and books.waiting.state_of(request.key) in (WaitState.READY, WaitState.COLD, WaitState.DRAINING)


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


def _slack(wait: tuple[Wait, Request]) -> tuple[float, Order]:
    return wait[0].slack, wait[1].order


def _pages(copies: list[Copy]) -> Counter[str]:
    """What copies that are not in use take out of the room."""
    return sum((Counter(copy.need) for copy in copies if not copy.users), Counter())
