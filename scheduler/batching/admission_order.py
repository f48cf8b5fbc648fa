"""Chooses which request is admitted next, and which lanes are drained or preempted for overtaken requests.

    head       the first waiting request of a lane key
    next       the first in order among ACTIVE heads and, unless a head was skipped, READY and COLD heads
    skipped    a READY or COLD head that finds no lane or no rank pages: only ACTIVE requests, whose lane is in the step
               anyway, overtake it. If the first request whose adapters lack nothing finds no row or too few KV pages,
               no request is admitted: otherwise small requests could overtake a large one for ever
    deadline   `lora_max_wait` after a head was first overtaken, less the time of its fill, two steps and the interval
               of checks. A lane whose rows end just before a deadline admits no more requests (DRAINING). If too few
               lanes end in time, some are preempted
    overdue    the requests for which lanes were preempted: they get these lanes, even if other requests come before
               them in the queue

    overtaken: a . b . c | d ...       the rows of a preempted lane are requeued behind all overtaken requests, with a
                         ^ row         new deadline. So the keys take turns

With B keys waiting for L lanes, a lane can be held for lora_max_wait * L / B on average if all deadlines are to be met.
A lane that was held for a shorter time is preempted after all others, and a lane that was held for less than
LEAST_SHARE of lora_max_wait is not preempted at all. So deadlines are met while B is at most L / LEAST_SHARE and the
adapters of B keys can be filled in time. With more keys all requests wait longer, in the order of their deadlines.

Does not read a clock: callers set `SchedulerState.now`.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from scheduler.admission.admission import Admission
from scheduler.batching.deadlines import Deadline, count_to_preempt, lanes_to_drain
from scheduler.batching.lane_preemption import LanePreemption
from scheduler.batching.preemption import HeldLane, sorted_by_cost, sorted_by_end
from scheduler.loading.device_loader import DeviceLoader, Outcome
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import SchedulerState
from scheduler.types import LaneKey, Order

LEAST_SHARE = 1 / 16  # the share of lora_max_wait for which a lane is held at least, however many keys wait
CHECKS_PER_WAIT = 64  # how often the deadlines are checked within lora_max_wait
HEADS_PER_LANE = 4  # the most waiting heads that a check of the deadlines visits, per lane (of at least 16)
FILL_FACTOR = 2  # how much longer a fill takes beside running steps than by itself
REQUESTS_PER_KEY = 32  # the most requests of a key whose waits are compared if the key's head was requeued
BEFORE_ALL: Order = (float("-inf"),)
AFTER_ALL = float("inf")
NEEDS_LANE = (WaitState.READY, WaitState.COLD, WaitState.DRAINING)


class AdmissionOrder:
    """Chooses the requests that each step admits, and drains and preempts lanes for overdue requests."""

    def __init__(self, state: SchedulerState, admission: Admission, device_loader: DeviceLoader) -> None:
        self._state = state
        self._admission = admission
        self._device_loader = device_loader
        self._overdue: dict[int, Request] = {}
        self._skipped: Request | None = None
        self._checked_at = float("-inf")

    # ------------------------------------------------------------------------------------------------- before a step

    def begin_step(self) -> None:
        """Prepares for the planning of a step. If a check of the deadlines is due, drains and preempts lanes."""
        state = self._state
        self._skipped = None
        self._overdue = {i: r for i, r in self._overdue.items() if self._needs_lane(r)}
        max_wait = state.bounds.lora_max_wait
        if not (state.now - self._checked_at < max_wait / CHECKS_PER_WAIT):
            self._checked_at = state.now
            self._check_deadlines(max_wait)

    def waited(self, request: Request) -> float:
        """Returns for how many seconds a waiting request has been overtaken for lack of a lane or rank pages."""
        state = self._state
        passed = state.starvation.passed_since(request.order)
        if passed is None:
            return 0.0
        return state.now - max(passed, request.queued_at, state.waiting.since(request.key))

    def _check_deadlines(self, max_wait: float) -> None:
        state, step = self._state, self._device_loader.step_seconds
        waits = self._deadlines(max_wait)
        if not (waits or state.draining):
            return
        lanes = sorted_by_end(self._held_lanes().values())
        ends = [step * lane.remaining for lane in lanes]
        margin = max_wait / CHECKS_PER_WAIT
        preempt = count_to_preempt([deadline for deadline, _ in waits], ends, most=max(step, margin))
        self._overdue = {request.id: request for _, request in waits[:preempt]}
        unmet = [deadline for deadline, _ in waits[max(preempt, state.lanes.free) :]]
        needed = lanes_to_drain(unmet, ends, grace=2 * (step + margin))
        self._set_draining({lanes[index].key: None for index in needed})
        if self._overdue:
            self._preempt_lanes(lanes, max_wait, len(waits))

    def _deadlines(self, max_wait: float) -> list[tuple[Deadline, Request]]:
        """Returns the most urgent request of each key that was overtaken, with its deadline, sorted by slack."""
        state, device_loader = self._state, self._device_loader
        margin = 2 * device_loader.step_seconds + max_wait / CHECKS_PER_WAIT
        least_work = LEAST_SHARE * max_wait / max(1, state.lanes.count)
        found: list[tuple[Deadline, Request]] = []
        heads = state.waiting.heads(*NEEDS_LANE)
        for count, head in enumerate(islice(heads, HEADS_PER_LANE * max(state.lanes.count, 16))):
            if count == 0:
                state.starvation.forget_before(self._first_waiting())
            passed = state.starvation.passed_since(head.order)
            if passed is None:
                break  # heads come in order, so no head after this one was overtaken either
            request = head
            if head.queued_at > passed:  # it was requeued: other requests of its key may have been overtaken for longer
                request = max(state.waiting.front(head.key, REQUESTS_PER_KEY), key=self.waited)
            fill = self._device_loader.fill_seconds(request.key)
            slack = max_wait - margin - fill - self.waited(request)
            found.append((Deadline(slack, max(FILL_FACTOR * fill, least_work)), request))
        return sorted(found, key=_slack)

    def _first_waiting(self) -> Order | None:
        heads = [self._state.waiting.first(state) for state in WaitState]
        return min((head.order for head in heads if head is not None), default=None)

    def _held_lanes(self) -> dict[LaneKey, HeldLane]:
        """Returns all lanes in use, with their rows."""
        state = self._state
        lanes: dict[LaneKey, HeldLane] = {}
        for request in state.running.ordered:
            if request.lane:
                lane = lanes.get(request.key)
                if lane is None:
                    held = state.now - state.lanes.since(request.key)
                    lane = lanes[request.key] = HeldLane(request.key, held)
                lane.rows.append(request)
        return lanes

    def _set_draining(self, keys: Collection[LaneKey]) -> None:
        """Makes exactly these lanes draining: all other lanes admit requests again."""
        for key in [key for key in self._state.draining if key not in keys]:
            self._admission.set_draining(key, False)
        for key in keys:
            if key not in self._state.draining:
                self._admission.set_draining(key, True)

    def _preempt_lanes(self, lanes: list[HeldLane], max_wait: float, waiting: int) -> None:
        """Preempts lanes for the overdue requests.

        A lane with a row that has not decoded yet is not preempted: otherwise rows that take long to recompute would
        preempt one another for ever.
        """
        state = self._state
        first = state.running.ordered[0] if state.running.ordered else None
        own = {request.key for request in self._overdue.values()}  # these may hold draining lanes
        least = LEAST_SHARE * max_wait
        old = (lane for lane in lanes if lane.held >= least and lane.all_decoding and lane.key not in own)
        candidates = sorted_by_cost(old, first, fair=max_wait * state.lanes.count / max(1, waiting))
        room = LanePreemption(state, state.lanes.free)
        for request in self._overdue.values():
            if (chosen := room.lanes_to_preempt(request, candidates)) is None:
                break
            for lane in chosen:
                candidates.remove(lane)
                for row in list(lane.rows):
                    self._admission.preempt(row, state.order_behind_passed(row))
                    state.counters.lane_preemptions += 1

    # --------------------------------------------------------------------------------------------------- in a step

    def next_request(self) -> Request | None:
        """Returns the request to be admitted now, or None. Its copies are resident, or filled at once in this step.

        The planner calls it again after each admission.
        """
        if self._overdue and self._state.lanes.free:
            request, final = self._next_overdue()
            if request is not None or final:
                return request
        return self._next_in_order()

    def end_step(self) -> None:
        """Ends the admissions of a step.

        If a request was skipped though there is memory for it, all requests that are still waiting count as overtaken.
        """
        if self._skipped is not None and self._has_memory(self._skipped):
            after_all = (*self._state.last_order, AFTER_ALL)
            self._state.starvation.mark_passed(after_all, self._state.now)

    def _next_overdue(self) -> tuple[Request | None, bool]:
        """Returns (an overdue request that gets a lane now, or None; whether no other request may be admitted now)."""
        state = self._state
        while self._overdue and state.lanes.free:
            request = next(iter(self._overdue.values()))
            if not self._needs_lane(request):
                del self._overdue[request.id]
                continue
            if request.steps_in_flight or not self._has_memory(request):
                return None, True  # the memory that was freed for this request must not go to another one
            opened = self._can_open_lane(request, BEFORE_ALL)
            if opened or request.done:
                del self._overdue[request.id]
            if opened:
                return request, False
            if not request.done:
                self._skipped = request  # it gets a lane in a later step, once its fill is done
                break
        return None, False

    def _next_in_order(self) -> Request | None:
        state = self._state
        while True:
            active = state.waiting.first(WaitState.ACTIVE)
            head = self._first_inactive() if self._skipped is None else None
            best = head if active is None or (head is not None and head.order < active.order) else active
            if best is None or best.steps_in_flight or not self._has_memory(best):
                return None  # a preempted request is admitted only after its tokens in flight were applied
            if best is active or self._can_open_lane(best, best.order):
                state.starvation.mark_passed(best.order, state.now)
                return best
            if best.key in state.waiting and state.waiting.state_of(best.key) in (WaitState.READY, WaitState.COLD):
                self._skipped = best  # in any other state, its fill is in flight or its request has ended

    def _first_inactive(self) -> Request | None:
        ready, cold = self._state.waiting.first(WaitState.READY), self._state.waiting.first(WaitState.COLD)
        return cold if ready is None or (cold is not None and cold.order < ready.order) else ready

    def _can_open_lane(self, request: Request, order: Order) -> bool:
        """Returns whether a head can have a lane now: its copies are resident, or this step fills them at once.

        Fills are requested as if the head were at `order` in the queue.
        """
        state = self._state
        if request.key in state.lanes:
            return True
        if not state.lanes.free:
            return False
        resident = state.waiting.state_of(request.key) is WaitState.READY
        return resident or self._device_loader.request_fill(request, order) is Outcome.RESIDENT

    def _has_memory(self, request: Request) -> bool:
        """Returns whether a row is free, and KV pages for all the request's tokens plus one page per running row."""
        state = self._state
        return state.running.free > 0 and state.kv.can_allocate(
            request, state.owner(request.key), reserve=len(state.running)
        )

    def _needs_lane(self, request: Request) -> bool:
        """Returns whether the request still waits for a lane or rank pages."""
        state = self._state
        waits = not request.done and request.row < 0 and request.key in state.waiting
        return waits and state.waiting.state_of(request.key) in NEEDS_LANE


def _slack(wait: tuple[Deadline, Request]) -> tuple[float, Order]:
    return wait[0].slack, wait[1].order
