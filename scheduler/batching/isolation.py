"""After a runner died: suspects run alone, and the request or adapter that is proved to blame is ended.

    runner dies --> suspects (scheduler.requests.blame) go before all other requests in the queue
                --> one suspect alone: its adapter is filled (a step without chunks), then it computes
                --> past its point: back to its old order in the queue; the next suspect --> ... --> all requests

An adapter is set aside if its fill was under way at two faults in a row, the last time as the only fill and with no
request in flight (or none that uses it). Each request that uses an adapter whose fill was under way becomes a suspect,
and such an adapter is not filled unless a request waits for it: so its next fill is alone.

Knows nothing of chunks or sockets.
"""

from __future__ import annotations

import logging

from scheduler.adapters.copies import Copy
from scheduler.admission import Admission
from scheduler.loading.device_loader import Filling, Outcome
from scheduler.requests.blame import InFlightPosition
from scheduler.requests.policy import with_suspicion
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import Books, Flight

log = logging.getLogger(__name__)

FAULTS_ALONE = 2  # in a row, with this fill alone under way, that prove it to blame
FAULTS_TOGETHER = 4  # in a row, with the same fills under way
POISON = "poison_request"
RUNNABLE = (WaitState.ACTIVE, WaitState.READY)

ENDED = "the model runner died again and again while it worked on this request alone; the request is ended for it"
ASIDE = (
    "the model runner died twice while it copied this adapter to the device; it is set aside until it is loaded again"
)


class Isolation:
    """Runs one suspect at a time."""

    def __init__(self, books: Books, admission: Admission, filling: Filling) -> None:
        self._books = books
        self._admission = admission
        self._filling = filling
        self._to_end: Request | None = None
        self._faults: dict[int, int] = {}  # by copy: faults in a row with its fill under way
        self._to_set_aside: list[Copy] = []

    # ----------------------------------------------------------------------------------------------- while it is on

    @property
    def is_on(self) -> bool:
        """Whether there is a suspect: then no other request is planned."""
        return len(self._books.blame) > 0

    @property
    def must_wait(self) -> bool:
        """Whether steps are in flight beside which the next suspect must not run."""
        return self.is_on and bool(self._books.flights) and not self._books.running.ordered

    def next_suspect(self) -> Request | None:
        """The suspect to be admitted now, with its copies resident; None while one runs, is filled, or is loaded."""
        books = self._books
        if books.running.ordered or books.flights:
            return None
        for request in sorted((books.requests[i] for i in books.blame), key=lambda request: request.order):
            if request.done:
                continue
            state = books.waiting.state_of(request.key)
            if state is WaitState.COLD:
                if self._filling.fetch(request, request.order) in (Outcome.RESIDENT, Outcome.FILLING):
                    return None  # the fill is alone in its step
            elif state in RUNNABLE and books.kv.can_allocate(request, books.owner(request.key), 0):
                return request
        return None

    def step_answered(self, flight: Flight) -> None:
        """Requeues a suspect that is past its point, so that the next one can run."""
        books = self._books
        if books.blame.is_empty:
            return
        for (request, _, _), start in zip(flight.parts, flight.starts, strict=True):
            if books.blame.chunk_answered(request.id, start) and self.is_on and request.row >= 0:
                self._admission.preempt(request, with_suspicion(request.order, False))

    # -------------------------------------------------------------------------------------------------- at a death

    def runner_died(self, own_fault: bool) -> None:
        """A runner died; its steps in flight and fills are still in the tables."""
        books = self._books
        in_flight: dict[int, InFlightPosition] = {}
        for flight in books.flights:
            for (request, _, _), start in zip(flight.parts, flight.starts, strict=True):
                if not request.done:
                    reached = in_flight[request.id].reached if request.id in in_flight else start
                    in_flight[request.id] = InFlightPosition(reached, max(request.computed, start + 1))
        blamed = books.blame.runner_died(in_flight, own_fault)
        self._to_end = None if blamed is None else books.requests[blamed]
        if own_fault:
            self._blame_fills(bool(in_flight))

    def move_suspects_first(self) -> None:
        """Moves the suspects before all other requests. All requests wait, and their wait states are not set yet."""
        books = self._books
        for request in [books.requests[i] for i in books.blame]:
            if not request.is_suspect:
                books.waiting.remove(request)
                request.order = with_suspicion(request.order, True)
                books.waiting.push(request)

    def end_blamed(self) -> None:
        """Ends the request and sets aside the adapters that were proved to blame. The tables are the new runner's."""
        request, self._to_end = self._to_end, None
        if request is not None and not request.done:
            log.error("request %d ended the model runner, and is ended", request.id)
            self._admission.end(request, error=ENDED, code=POISON)
        aside, self._to_set_aside = self._to_set_aside, []
        for copy in aside:
            if copy.id in self._books.directory.copies and copy.error is None:
                log.error("adapter %d ended the model runner, and is set aside", copy.id)
                self._admission.fail(copy, ASIDE)
            self._faults.pop(copy.id, None)

    def _blame_fills(self, in_flight: bool) -> None:
        books = self._books
        filled = [copy for copy in books.directory.copies.values() if copy.fills]
        self._faults = {copy.id: self._faults.get(copy.id, 0) + 1 for copy in filled}
        books.doubted = set(self._faults)
        enough = FAULTS_ALONE if len(filled) == 1 else FAULTS_TOGETHER
        for copy in filled:
            if self._faults[copy.id] >= enough and not (in_flight and copy.requests):
                self._to_set_aside.append(copy)
            else:
                self._suspect_users(copy)

    def _suspect_users(self, copy: Copy) -> None:
        for request in self._books.requests.values():
            if any(copy_id == copy.id for copy_id, _ in request.key):
                self._books.blame.add_suspect(request.id)
