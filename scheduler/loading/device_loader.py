"""Which copies get rank pages now, and whether they are filled at once or beside the steps. Knows nothing of lanes.

    at once      before the forward of the very step that carries the fill: that step may name its lane already. For
                 those whose request goes in that step; all of a step's take at most half of a step's time
    background   in slices after the steps; a lane may name the pages when the runner has reported. For large ones,
                 for the next in the queue (look-ahead), and for copies that came unasked

Nobody's pages go for somebody behind him: first the spare copies in the order of the policy, then those that only
later ones wait for, the latest first.
"""

from __future__ import annotations

from enum import Enum

from engine.messages import Fill
from scheduler.adapters.copies import Copy, Device
from scheduler.admission import Admission
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import SchedulerState
from scheduler.types import LaneKey, Order

MAX_FILL_SHARE = 0.5  # of a step's time may be spent on fills at once while somebody decodes
MAX_BACKGROUND_FILLS = 4  # fills under way for requests that cannot go yet
DEFAULT_STEP_SECONDS = 0.02
DEFAULT_BYTES_PER_SECOND = 2e9
NEWEST_WEIGHT = 0.2  # of the newest measurement


class Outcome(Enum):
    """What became of a wish for rank pages."""

    RESIDENT = "resident"
    FILLING = "filling"
    LATER = "later"
    NO_PAGES = "no pages"


class DeviceLoader:
    """Fills of one step after another, over the books."""

    def __init__(self, state: SchedulerState, admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self._step_seconds = 0.0
        self._bytes_per_second = DEFAULT_BYTES_PER_SECOND
        self._fills: list[Fill] = []
        self._step = 0
        self._busy = self._later = False
        self._spent = 0.0
        self._failed_grant: tuple[list[Copy], Order, bool, int] | None = (
            None  # what found no pages, as of which version
        )

    # -------------------------------------------------------------------------------------------------- measurements

    @property
    def step_seconds(self) -> float:
        """How long a step takes of late."""
        return self._step_seconds or DEFAULT_STEP_SECONDS

    def record_step_seconds(self, seconds: float) -> None:
        """A step was done in so long."""
        if seconds > 0:
            last = self._step_seconds
            self._step_seconds = last + NEWEST_WEIGHT * (seconds - last) if last else seconds

    def record_fill_seconds(self, copy: Copy, seconds: float) -> None:
        """A fill at once was done in so long."""
        size = self._state.device_cache.bytes([copy])
        if seconds > 0 and size:
            self._bytes_per_second += NEWEST_WEIGHT * (size / seconds - self._bytes_per_second)

    def fill_seconds(self, key: LaneKey) -> float:
        """What filling those of a key's copies that have no pages is likely to take."""
        missing = [copy for copy in self._state.copies(key) if copy.device is Device.NONE]
        return self._state.device_cache.bytes(missing) / self._bytes_per_second

    # --------------------------------------------------------------------------------------------------------- fills

    def begin_step(self, step: int, busy: bool) -> None:
        """A step is being planned; `busy`: somebody decodes in it, and is not to wait long for others' fills."""
        self._step, self._busy, self._spent, self._fills, self._later = step, busy, 0.0, [], False

    @property
    def fills(self) -> list[Fill]:
        """The fills planned for the current step."""
        return self._fills

    def request_fill(self, request: Request, order: Order) -> Outcome:
        """Pages for a COLD request, as if it were at `order`; it goes in this step if its copies are resident then."""
        state = self._state
        copies = state.copies(request.key)
        while (
            (preload := state.first_preload()) is not None
            and preload.preload_order is not None
            and preload.preload_order < order
        ):
            if preload in copies or not self._fill_preload(preload):
                break
        if (
            preload is not None
            and preload.preload_order is not None
            and preload.preload_order < order
            and preload not in copies
        ):
            return Outcome.NO_PAGES
        seconds = self.fill_seconds(request.key)
        at_once = not self._busy or self._spent + seconds <= MAX_FILL_SHARE * self.step_seconds
        if not at_once and seconds <= MAX_FILL_SHARE * self.step_seconds:
            self._later = True
            return Outcome.LATER
        at_once = at_once and not any(copy.device is Device.FILLING for copy in copies)
        if not self._grant(copies, order, at_once, request):
            self._end_if_never_fits(request.key)
            return Outcome.NO_PAGES
        if not at_once:
            return Outcome.FILLING
        self._spent += seconds
        return Outcome.RESIDENT

    def look_ahead(self) -> None:
        """Background fills for who is next, in order up to the first that finds no pages; then for the unasked.

        Whoever will be filled at once in the next step is first, and is not begun on here. On a CPU nor is anyone who
        can be filled at once in his own: the same cores copy, and he would wait for the slices to come to an end.
        """
        state = self._state
        if self._later:
            return
        while state.device_cache.filling < MAX_BACKGROUND_FILLS:
            request, preload = state.waiting.first(WaitState.COLD), state.first_preload()
            if (
                preload is not None
                and preload.preload_order is not None
                and (request is None or preload.preload_order < request.order)
            ):
                found = self._fill_preload(preload)
            elif request is not None:
                found = self._fill_ahead(request)
            else:
                break
            if not found:
                return
        if state.opportunistic_fills and state.waiting.first(WaitState.COLD) is None:
            self._fill_opportunistically()

    def _fill_ahead(self, request: Request) -> bool:
        """Pages for a request, or its end where there will never be any; false if it must wait for them."""
        state = self._state
        if state.device_cache.device == "cpu" and self.fill_seconds(request.key) <= MAX_FILL_SHARE * self.step_seconds:
            return False
        copies = state.copies(request.key)
        return self._grant(copies, request.order, at_once=False, request=request) or self._end_if_never_fits(
            request.key
        )

    def _end_if_never_fits(self, key: LaneKey) -> bool:
        """Ends the waiting requests of a key that would find no pages even if all unpinned copies went."""
        state = self._state
        problem = state.device_cache.never_fits(state.copies(key), state.registry.pinned.values())
        if problem is not None:
            self._admission.fail_waiting(key, problem)
        return problem is not None

    def _fill_preload(self, copy: Copy) -> bool:
        state = self._state
        assert copy.preload_order is not None
        if self._grant([copy], copy.preload_order, at_once=False):
            return True
        problem = state.device_cache.never_fits([copy], state.registry.pinned.values())
        if problem is None:
            return False
        copy.preload_order = None
        state.reclassify(copy)
        state.report(copy, error=problem)
        return True

    def _fill_opportunistically(self) -> None:
        """Copies that came while nobody waited for them: while there is room."""
        state = self._state
        for copy_id in state.opportunistic_fills:
            copy = state.registry.copies.get(copy_id)
            if copy is not None and copy.can_fill and copy.error is None and not copy.is_unloading:
                self._start([copy], at_once=False)
        state.opportunistic_fills.clear()

    def _grant(self, copies: list[Copy], order: Order, at_once: bool, request: Request | None = None) -> bool:
        """Pages for these, if evicting who may go gives enough. `request`: who waits for them, and pays."""
        state = self._state
        if self._failed_grant == (copies, order, at_once, state.device_cache.version):
            return False
        for victim in state.device_cache.make_room(copies, order):
            state.counters.adapter_evictions += 1
            state.reclassify(victim)
            state.report(victim)
            self._admission.update_wait_states(victim)
        size = state.device_cache.bytes([copy for copy in copies if copy.device is Device.NONE])
        if self._start(copies, at_once):
            if request is not None and not request.done:
                state.ordering.on_transfer(request, size)
            return True
        self._failed_grant = copies, order, at_once, state.device_cache.version
        return False

    def _start(self, copies: list[Copy], at_once: bool) -> bool:
        state = self._state
        fills = state.device_cache.grant(copies, self._step, at_once)
        if fills is None:
            return False
        state.counters.adapter_fills += len(fills)
        self._fills += fills
        for copy in copies:
            state.reclassify(copy)
            self._admission.update_wait_states(copy)
        return True
