"""Isolates the cause after a runner died: each suspect runs alone, and the request or adapter to blame is ended.

    runner dies --> suspects (scheduler.requests.blame) go before all other requests in the queue
                --> one suspect alone: its adapter is filled (in a step without chunks), then the suspect runs
                --> past its point: back to its old order in the queue; the next suspect --> ... --> all requests

The point of a suspect is the position up to which it had been planned when the runner died.

An adapter is set aside (fails until it is loaded again) if its fill was in flight at FAULTS_ALONE faults in a row and
was the only fill at the last fault, or at FAULTS_TOGETHER faults in a row beside other fills; and if at the last fault
no request was in flight, or no request uses it. Otherwise all requests that use the adapter become suspects. Such an
adapter is filled only when a request waits for it, so that its next fill is the only one in its step.
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

FAULTS_ALONE = 2  # after this many faults in a row a fill is to blame, if no other fill was in flight at the last one
FAULTS_TOGETHER = 4  # after this many faults in a row a fill is to blame, even if other fills were in flight too
POISON = "poison_request"
RUNNABLE = (WaitState.ACTIVE, WaitState.READY)

ENDED = "the model runner died again and again while it worked on this request alone; the request is ended for it"
ASIDE = (
    "the model runner died twice while it copied this adapter to the device; it is set aside until it is loaded again"
)


class Isolation:
    """Finds the request or adapter that crashes the runner, by running one suspect at a time, and ends it."""

    def __init__(self, state: SchedulerState, admission: Admission, device_loader: DeviceLoader) -> None:
        self._state = state
        self._admission = admission
        self._device_loader = device_loader
        self._to_end: Request | None = None
        self._faults: dict[int, int] = {}  # by copy id: faults in a row at which its fill was in flight
        self._to_set_aside: list[AdapterCopy] = []

    # ------------------------------------------------------------------------------------- while there are suspects

    @property
    def is_on(self) -> bool:
        """Whether there is a suspect. While there is one, only suspects are planned."""
        return len(self._state.blame) > 0

    @property
    def must_wait(self) -> bool:
        """Whether the next suspect must wait for steps in flight to end: it must not run beside them."""
        return self.is_on and bool(self._state.in_flight) and not self._state.running.ordered

    def next_suspect(self) -> Request | None:
        """Returns the suspect to be admitted now, whose copies are resident, or None.

        Returns None while a suspect runs, while a step is in flight, and while suspects wait for loads or fills. Starts
        the fill of the first suspect that needs one.
        """
        state = self._state
        if state.running.ordered or state.in_flight:
            return None
        for request in sorted((state.requests[i] for i in state.blame), key=lambda request: request.order):
            if request.done:
                continue
            wait_state = state.waiting.state_of(request.key)
            if wait_state is WaitState.COLD:
                if self._device_loader.request_fill(request, request.order) in (Outcome.RESIDENT, Outcome.FILLING):
                    return None  # the step contains only the fill
            elif wait_state in RUNNABLE and state.kv.can_allocate(request, state.owner(request.key), 0):
                return request
        return None

    def step_answered(self, step: InFlightStep) -> None:
        """Requeues a suspect that this step brought past its point, so that the next suspect can run."""
        state = self._state
        if state.blame.is_empty:
            return
        for (request, _, _), start in zip(step.parts, step.starts, strict=True):
            if state.blame.chunk_answered(request.id, start) and self.is_on and request.row >= 0:
                self._admission.preempt(request, with_suspicion(request.order, False))

    # ------------------------------------------------------------------------------------- when a runner has died

    def runner_died(self, own_fault: bool) -> None:
        """Determines the suspects after a runner died, and the request and adapters that are proved to blame.

        `own_fault`: the runner failed, rather than being killed. Called while the tables still contain the dead
        runner's steps and fills in flight.
        """
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
        """Moves the suspects before all other requests in the queue. Called while all requests are waiting.

        Their wait states are set later.
        """
        state = self._state
        for request in [state.requests[i] for i in state.blame]:
            if not request.is_suspect:
                state.waiting.remove(request)
                request.order = with_suspicion(request.order, True)
                state.waiting.push(request)

    def end_blamed(self) -> None:
        """Ends the request and sets aside the adapters that were proved to blame.

        Called after the tables were reset for the new runner.
        """
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
