"""Chooses which copies are filled into rank pages, and whether at once or in the background. Knows no lanes.

    at once      before the forward of the step that carries the fill, which may use the pages already. For requests
                 that are admitted in the step. While rows decode, all fills at once of a step together take at most
                 MAX_FILL_SHARE of the step's time
    background   in slices after the steps; a lane may name the pages once the runner has reported the copy resident.
                 For large copies, for the next requests in the queue (look-ahead), and for copies that no request
                 waits for

A copy is evicted for a request only if it is spare (in the order of the policy), or if all requests that wait for it
come later in the queue (the last one's copy first).
"""

from __future__ import annotations

from enum import Enum

from engine.messages import Fill
from scheduler.adapters import device_limits
from scheduler.adapters.copies import AdapterCopy, DeviceState
from scheduler.admission.admission import Admission
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import SchedulerState
from scheduler.types import LaneKey, Order

MAX_FILL_SHARE = 0.5  # the largest share of a step's time that fills at once may take while rows decode
MAX_BACKGROUND_FILLS = 4
DEFAULT_STEP_SECONDS = 0.02
DEFAULT_BYTES_PER_SECOND = 2e9
LATEST_WEIGHT = 0.2  # the weight of the latest measurement in the moving averages


class Outcome(Enum):
    """The outcome of `DeviceLoader.request_fill`."""

    RESIDENT = "resident"  # the fill runs at once in this step
    FILLING = "filling"  # the fill runs in the background
    LATER = "later"  # the next step is to fill it at once: this step has no time left for it
    NO_PAGES = "no pages"  # there are too few rank pages


class DeviceLoader:
    """Chooses the fills of each step."""

    def __init__(self, state: SchedulerState, admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self._step_seconds = 0.0  # the moving average of a step's time; 0: not measured
        self._bytes_per_second = DEFAULT_BYTES_PER_SECOND  # the moving average of the speed of fills
        self._fills: list[Fill] = []  # the fills of the step being planned
        self._step = 0  # the id of the step being planned
        self._busy = False  # whether rows decode in the step being planned
        self._postponed = False  # whether a request waits for the next step, to be filled at once in it
        self._spent = 0.0  # seconds that the fills at once of the step being planned will take
        self._failed_grant: tuple[list[AdapterCopy], Order, bool, int] | None = (
            None  # the arguments of the last grant that failed, and the device cache's version at that time
        )

    # -------------------------------------------------------------------------------------------------- measurements

    @property
    def step_seconds(self) -> float:
        """How long a step takes: a moving average, or DEFAULT_STEP_SECONDS before the first measurement."""
        return self._step_seconds or DEFAULT_STEP_SECONDS

    def record_step_seconds(self, seconds: float) -> None:
        """Adds the duration of a step to the moving average."""
        if seconds > 0:
            last = self._step_seconds
            self._step_seconds = last + LATEST_WEIGHT * (seconds - last) if last else seconds

    def record_fill_seconds(self, copy: AdapterCopy, seconds: float) -> None:
        """Adds the speed of a fill at once, which took `seconds`, to the moving average."""
        size = self._state.device_cache.fill_bytes([copy])
        if seconds > 0 and size:
            self._bytes_per_second += LATEST_WEIGHT * (size / seconds - self._bytes_per_second)

    def fill_seconds(self, key: LaneKey) -> float:
        """Returns how many seconds the fills of those copies of a key that have no pages are expected to take."""
        missing = [copy for copy in self._state.copies(key) if not copy.on_device]
        return self._state.device_cache.fill_bytes(missing) / self._bytes_per_second

    # --------------------------------------------------------------------------------------------------------- fills

    def begin_step(self, step: int, busy: bool) -> None:
        """Begins the planning of step `step`. `busy`: rows decode in it, which long fills at once would delay."""
        self._step, self._busy, self._spent, self._fills, self._postponed = step, busy, 0.0, [], False

    @property
    def fills(self) -> list[Fill]:
        """The fills of the step being planned."""
        return self._fills

    def request_fill(self, request: Request, order: Order) -> Outcome:
        """Starts the fills of a COLD request's copies, as if the request were at `order` in the queue.

        With Outcome.RESIDENT the step being planned may admit the request.
        """
        copies = self._state.copies(request.key)
        if not self._fill_preloads_before(order, copies):
            return Outcome.NO_PAGES
        seconds = self.fill_seconds(request.key)
        at_once = not self._busy or self._spent + seconds <= MAX_FILL_SHARE * self.step_seconds
        if not at_once and seconds <= MAX_FILL_SHARE * self.step_seconds:
            self._postponed = True
            return Outcome.LATER
        at_once = at_once and not any(copy.device.state is DeviceState.FILLING for copy in copies)
        if not self._grant(copies, order, at_once, request):
            self._end_if_never_fits(request.key)
            return Outcome.NO_PAGES
        if not at_once:
            return Outcome.FILLING
        self._spent += seconds
        return Outcome.RESIDENT

    def look_ahead(self) -> None:
        """Starts background fills in order, up to the first copy that finds no pages, and then opportunistic fills.

        Nothing is started while a request waits to be filled at once in the next step. On a CPU, requests that can be
        filled at once in their own step are not filled ahead: steps and fills share the cores, and the slices of a
        background fill would only delay them.
        """
        state = self._state
        if self._postponed:
            return
        while state.device_cache.filling < MAX_BACKGROUND_FILLS:
            request, preload = state.waiting.first(WaitState.COLD), state.next_preload()
            if preload is not None and (request is None or preload[1] < request.order):
                progressed = self._fill_preload(*preload)
            elif request is not None:
                progressed = self._fill_ahead(request)
            else:
                break
            if not progressed:
                return
        if state.opportunistic_fills and state.waiting.first(WaitState.COLD) is None:
            self._fill_opportunistically()

    def _fill_preloads_before(self, order: Order, copies: list[AdapterCopy]) -> bool:
        """Fills the preloads before `order`, until one is in `copies`. Returns False if there are no pages for one."""
        while (preload := self._state.next_preload()) is not None and preload[1] < order and preload[0] not in copies:
            if not self._fill_preload(*preload):
                return False
        return True

    def _fill_ahead(self, request: Request) -> bool:
        """Fills a request's copies in the background, or ends it if they never fit. Returns False if it must wait."""
        state = self._state
        if state.device_cache.device == "cpu" and self.fill_seconds(request.key) <= MAX_FILL_SHARE * self.step_seconds:
            return False
        copies = state.copies(request.key)
        return self._grant(copies, request.order, at_once=False, request=request) or self._end_if_never_fits(
            request.key
        )

    def _end_if_never_fits(self, key: LaneKey) -> bool:
        """Returns whether the key's copies never fit beside the pinned ones. If so, ends the key's waiting requests."""
        error = self._never_fits(self._state.copies(key))
        if error is not None:
            self._admission.fail_waiting(key, error)
        return error is not None

    def _fill_preload(self, copy: AdapterCopy, order: Order) -> bool:
        """Fills a copy for its preload, or cancels the preload if it never fits. Returns False if it must wait."""
        state = self._state
        if self._grant([copy], order, at_once=False):
            return True
        error = self._never_fits([copy])
        if error is None:
            return False
        state.registry.set_preload(copy, None)
        state.reclassify([copy])
        state.report(copy, error=error)
        return True

    def _never_fits(self, copies: list[AdapterCopy]) -> str | None:
        return device_limits.never_fits(copies, self._state.registry.pinned.values(), self._state.capacity)

    def _fill_opportunistically(self) -> None:
        """Starts fills of copies that no request waits for, into free pages only."""
        state = self._state
        for copy_id in state.opportunistic_fills:
            copy = state.registry.copies.get(copy_id)
            if copy is not None and copy.can_fill and copy.error is None and not copy.is_unloading:
                self._start([copy], at_once=False)
        state.opportunistic_fills.clear()

    def _grant(self, copies: list[AdapterCopy], order: Order, at_once: bool, request: Request | None = None) -> bool:
        """Starts the fills of these copies, after evicting others if needed. Returns False if there are too few pages.

        The bytes are charged to the request (by the fair policy).
        """
        state = self._state
        if self._failed_grant == (copies, order, at_once, state.device_cache.version):
            return False
        evicted = state.device_cache.evict_for(copies, order)
        state.counters.adapter_evictions += len(evicted)
        self._admission.changed(evicted, report=True)
        size = state.device_cache.fill_bytes([copy for copy in copies if not copy.on_device])
        if self._start(copies, at_once):
            if request is not None and not request.done:
                state.ordering.on_transfer(request, size)
            return True
        self._failed_grant = copies, order, at_once, state.device_cache.version
        return False

    def _start(self, copies: list[AdapterCopy], at_once: bool) -> bool:
        state = self._state
        fills = state.device_cache.grant(copies, self._step, at_once)
        if fills is None:
            return False
        state.counters.adapter_fills += len(fills)
        self._fills += fills
        for copy in copies:
            state.registry.set_preload(copy, None)
        self._admission.changed(copies)
        return True
