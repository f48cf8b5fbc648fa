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

from scheduler.adapters.copies import AdapterCopy
from scheduler.admission.admission import Admission
from scheduler.loading.device_loader import DeviceLoader, Outcome
from scheduler.requests.blame import InFlightPosition
from scheduler.requests.policy import with_suspicion
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import InFlightStep, SchedulerState

log = logging.getLogger(__name__)

FAULTS_ALONE = 2  # faults in a row with only this fill under way that prove the fill to blame
FAULTS_TOGETHER = 4  # faults in a row with the same fills under way that prove all of them to blame
POISON = "poison_request"
RUNNABLE = (WaitState.ACTIVE, WaitState.READY)

ENDED = "the model runner died again and again while it worked on this request alone; the request is ended for it"
ASIDE = (
    "the model runner died twice while it copied this adapter to the device; it is set aside until it is loaded again"
)


class Isolation:
    """Runs one suspect at a time."""

    def __init__(self, state: SchedulerState, admission: Admission, device_loader: DeviceLoader) -> None:
        self._state = state
        self._admission = admission
        self._device_loader = device_loader
        self._to_end: Request | None = None
        self._faults: dict[int, int] = {}  # by copy: faults in a row with its fill under way
        self._to_set_aside: list[AdapterCopy] = []

    # ----------------------------------------------------------------------------------------------- while it is on

    @property
    def is_on(self) -> bool:
        """Whether there is a suspect: then no other request is planned."""
        return len(self._state.blame) > 0

    @property
    def must_wait(self) -> bool:
        """Whether steps are in flight beside which the next suspect must not run."""
        return self.is_on and bool(self._state.in_flight) and not self._state.running.ordered

    def next_suspect(self) -> Request | None:
        """The suspect to be admitted now, with its copies resident; None while one runs, is filled, or is loaded."""
        state = self._state
        if state.running.ordered or state.in_flight:
            return None
        for request in sorted((state.requests[i] for i in state.blame), key=lambda request: request.order):
            if request.done:
                continue
            wait_state = state.waiting.state_of(request.key)
            if wait_state is WaitState.COLD:
                if self._device_loader.request_fill(request, request.order) in (Outcome.RESIDENT, Outcome.FILLING):
                    return None  # the fill is alone in its step
            elif wait_state in RUNNABLE and state.kv.can_allocate(request, state.owner(request.key), 0):
                return request
        return None

    def step_answered(self, step: InFlightStep) -> None:
        """Requeues a suspect that is past its point, so that the next one can run."""
        state = self._state
        if state.blame.is_empty:
            return
        for (request, _, _), start in zip(step.parts, step.starts, strict=True):
            if state.blame.chunk_answered(request.id, start) and self.is_on and request.row >= 0:
                self._admission.preempt(request, with_suspicion(request.order, False))

    # -------------------------------------------------------------------------------------------------- at a death

    def runner_died(self, own_fault: bool) -> None:
        """A runner died; its steps in flight and fills are still in the tables."""
        state = self._state
        in_flight: dict[int, InFlightPosition] = {}
        for step in state.in_flight:
            for (request, _, _), start in zip(step.parts, step.starts, strict=True):
                if not request.done:
                    reached = in_flight[request.id].reached if request.id in in_flight else start
                    in_flight[request.id] = InFlightPosition(reached, max(request.computed, start + 1))
        blamed = state.blame.runner_died(in_flight, own_fault)
        self._to_end = None if blamed is None else state.requests[blamed]
        if own_fault:
            self._blame_fills(bool(in_flight))

    def move_suspects_first(self) -> None:
        """Moves the suspects before all other requests. All requests wait, and their wait states are not set yet."""
        state = self._state
        for request in [state.requests[i] for i in state.blame]:
            if not request.is_suspect:
                state.waiting.remove(request)
                request.order = with_suspicion(request.order, True)
                state.waiting.push(request)

    def end_blamed(self) -> None:
        """Ends the request and sets aside the adapters that were proved to blame. The tables are the new runner's."""
        request, self._to_end = self._to_end, None
        if request is not None and not request.done:
            log.error("request %d ended the model runner, and is ended", request.id)
            self._admission.end(request, error=ENDED, code=POISON)
        aside, self._to_set_aside = self._to_set_aside, []
        for copy in aside:
            if copy.id in self._state.registry.copies and copy.error is None:
                log.error("adapter %d ended the model runner, and is set aside", copy.id)
                self._admission.fail_copy(copy, ASIDE)
            self._faults.pop(copy.id, None)

    def _blame_fills(self, in_flight: bool) -> None:
        state = self._state
        filled = [copy for copy in state.registry.copies.values() if copy.device.fills_in_flight]
        self._faults = {copy.id: self._faults.get(copy.id, 0) + 1 for copy in filled}
        state.suspect_fills = set(self._faults)
        enough = FAULTS_ALONE if len(filled) == 1 else FAULTS_TOGETHER
        for copy in filled:
            if self._faults[copy.id] >= enough and not (in_flight and copy.references.requests):
                self._to_set_aside.append(copy)
            else:
                self._suspect_users(copy)

    def _suspect_users(self, copy: AdapterCopy) -> None:
        for request in self._state.requests.values():
            if any(copy_id == copy.id for copy_id, _ in request.key):
                self._state.blame.add_suspect(request.id)
