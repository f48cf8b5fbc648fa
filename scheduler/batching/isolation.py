"""After a runner died: who is in flight alone, and who ends because it was. Knows nothing of chunks or sockets.

    runner dies --> suspects (scheduler.requests.blame), before everyone else in the queue
                --> one suspect alone: its adapter is filled (a step without rows), then it computes
                --> past its point: back to the queue in its old place; the next one --> ... --> everyone

An adapter whose fill was under way at two faults in a row, the last time as the only one and with no row in flight (or
nobody who asks for it), is set aside. Whoever names an adapter whose fill was under way is suspect, and nobody fills it
unasked: so that fill is alone the next time.
"""

from __future__ import annotations

import logging

from scheduler.adapters.copies import Copy
from scheduler.admission import Admission
from scheduler.loading.device_loader import Filling, Outcome
from scheduler.requests.blame import InFlightPosition
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import Books, Flight

log = logging.getLogger(__name__)

MOST_FILLS = 2  # faults with this fill alone under way
MOST_TOGETHER = 4  # faults with the same fills under way
POISON = "poison_request"
EARLIER = 1 << 80  # than every priority

ENDED = "the model runner died again and again while it worked on this request alone; the request is ended for it"
ASIDE = (
    "the model runner died twice while it copied this adapter to the device; it is set aside until it is loaded again"
)


class Isolation:
    """One suspect at a time, over the books."""

    def __init__(self, books: Books, admission: Admission, filling: Filling) -> None:
        self._books = books
        self._admission = admission
        self._filling = filling
        self._poison: Request | None = None
        self._faults: dict[int, int] = {}  # by copy: faults in a row with its fill under way
        self._aside: list[Copy] = []

    # ----------------------------------------------------------------------------------------------- while it is on

    @property
    def is_on(self) -> bool:
        """Whether there is a suspect: then nobody else is planned."""
        return len(self._books.blame) > 0

    @property
    def waits(self) -> bool:
        """Whether there are steps in flight that the next suspect must not be beside."""
        return self.is_on and bool(self._books.flights) and not self._books.running.ordered

    def next(self) -> Request | None:
        """The suspect to be admitted now, with its copies resident; None while one runs, is filled, or is read."""
        books = self._books
        if books.running.ordered or books.flights:
            return None
        for request in sorted((books.requests[i] for i in books.blame), key=lambda request: request.order):
            if request.done:
                continue
            place = books.waiting.state_of(request.key)
            if place is WaitState.COLD:
                if self._filling.fetch(request, request.order) in (Outcome.RESIDENT, Outcome.FILLING):
                    return None  # the fill is alone in its step
            elif place in (WaitState.ACTIVE, WaitState.READY) and books.kv.admits(request, books.owner(request.key), 0):
                return request
        return None

    def answered(self, flight: Flight) -> None:
        """Whoever is past its point makes room for the next suspect, or goes on with everyone."""
        books = self._books
        if books.blame.quiet:
            return
        for (request, _, _), start in zip(flight.parts, flight.starts, strict=True):
            if books.blame.answered(request.id, start) and self.is_on and request.row >= 0:
                self._admission.preempt(request, (request.order[0] + EARLIER, *request.order[1:]))

    # -------------------------------------------------------------------------------------------------- at a death

    def died(self, own_fault: bool) -> None:
        """A runner died, whose steps in flight and fills are still in the books."""
        books = self._books
        flying: dict[int, InFlightPosition] = {}
        for flight in books.flights:
            for (request, _, _), start in zip(flight.parts, flight.starts, strict=True):
                if not request.done:
                    reached = flying[request.id].reached if request.id in flying else start
                    flying[request.id] = InFlightPosition(reached, max(request.computed, start + 1))
        poison = books.blame.died(flying, own_fault)
        self._poison = None if poison is None else books.requests[poison]
        if own_fault:
            self._blame_fills(bool(flying))

    def _blame_fills(self, flying: bool) -> None:
        books = self._books
        filled = [copy for copy in books.directory.copies.values() if copy.fills]
        self._faults = {copy.id: self._faults.get(copy.id, 0) + 1 for copy in filled}
        books.doubted = set(self._faults)
        for copy in filled:
            faults = self._faults[copy.id]
            proved = faults >= MOST_FILLS if len(filled) == 1 else faults >= MOST_TOGETHER
            if proved and not (flying and copy.requests):
                self._aside.append(copy)
            else:
                for request in books.requests.values():
                    if any(copy_id == copy.id for copy_id, _ in request.key):
                        books.blame.suspect(request.id)

    def bring_forward(self) -> None:
        """Everyone waits, in places that are not settled yet: suspects go first, so that each of them gets on."""
        books = self._books
        for request in [books.requests[i] for i in books.blame]:
            if request.order[0] > -EARLIER // 2:
                books.waiting.remove(request)
                request.order = (request.order[0] - EARLIER, *request.order[1:])
                books.waiting.push(request)

    def sentence(self) -> None:
        """Ends what was found to end runners; the tables are those of the new one."""
        poison, self._poison = self._poison, None
        if poison is not None and not poison.done:
            log.error("request %d ended the model runner, and is ended", poison.id)
            self._admission.end(poison, error=ENDED, code=POISON)
        aside, self._aside = self._aside, []
        for copy in aside:
            if copy.id in self._books.directory.copies and copy.error is None:
                log.error("adapter %d ended the model runner, and is set aside", copy.id)
                self._admission.fail(copy, ASIDE)
            self._faults.pop(copy.id, None)
