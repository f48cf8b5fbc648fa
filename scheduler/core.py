"""The scheduler's core: handles messages, plans steps and applies their results. Has no sockets and reads no clock.

    handle(message)    handles a request, an abort, a load or unload of an adapter, or a report of the runner
    plan(now)          returns the next Step, if the window has room and there is something to do
    apply(StepDone)    appends the step's tokens to the requests, and ends the requests that they finish
    drain_outbox()     returns the messages to be sent since the last call
    check()            the audit: asserts that all tables agree

Rows, KV pages and lanes are free as soon as their request ends or is preempted, though steps in flight may still name
them. This is safe because the runner executes steps strictly in order: a later step comes after the steps in flight.

    step n    writes KV page 7, row 3 (for a request that ended at step n-1: its token is dropped)
    step n+1  NewRow 3 (next generation), page 7 appended to another row, written from its first position on, then read

Rank pages are different, see adapters/rank_pages. Epochs: messages from the tokenizer process and the replies to it
carry its epoch; steps and their results carry the runner's. Messages of an older epoch are dropped. A newer epoch means
that the process was restarted.
"""

from __future__ import annotations

import logging

from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    EvictAdapter,
    Generate,
    Hello,
    LoadAdapter,
    PinAdapter,
    Progress,
    RunnerReady,
    Stats,
    Step,
    StepDone,
    ToScheduler,
    UnloadAdapter,
    WaitReason,
)
from scheduler import audit
from scheduler.admission import wait_reasons
from scheduler.admission.admission import Admission
from scheduler.batching.admission_order import AdmissionOrder
from scheduler.batching.isolation import Isolation
from scheduler.batching.planner import Planner
from scheduler.loading.device_loader import DeviceLoader
from scheduler.loading.disk_loader import DiskLoader
from scheduler.loading.lifecycle import AdapterLifecycle
from scheduler.progress import messages
from scheduler.results import StepResults
from scheduler.snapshot import take_stats
from scheduler.state import Bounds, SchedulerState

log = logging.getLogger(__name__)

Upstream = Progress | AdapterState | Capacity
Downstream = LoadAdapter | UnloadAdapter | EvictAdapter


def _is_possible(capacity: Capacity) -> bool:
    """Returns whether the capacity's numbers are in their ranges, so that tables of these sizes can be made."""
    c, most = capacity, 1 << 31
    counts = (c.kv_pages << 3, c.page_size, c.max_length, c.max_batched_tokens, c.vocab_size)
    tables = (c.max_loras, *c.rank_pages.values())
    return 0 < c.rows <= 1 << 16 and all(0 < each < most for each in counts) and all(0 <= n <= 1 << 24 for n in tables)


class Scheduler:
    """The scheduler without sockets or clock.

    `window`: the most steps in flight. `bounds`: the limits and policies that the flags set. `epoch`: the epoch of the
    first runner. `incarnation`: the epoch of this scheduler process.
    """

    def __init__(
        self, capacity: Capacity, bounds: Bounds, window: int = 1, epoch: int = 0, incarnation: int = 0
    ) -> None:
        assert window >= 1
        self._incarnation = incarnation
        self._state = SchedulerState(capacity, bounds)
        self._admission = Admission(self._state)
        self._device_loader = DeviceLoader(self._state, self._admission)
        self._admission_order = AdmissionOrder(self._state, self._admission, self._device_loader)
        self._disk_loader = DiskLoader(self._state, self._admission)
        self._lifecycle = AdapterLifecycle(self._state, self._admission, self._disk_loader, self._device_loader)
        self._isolation = Isolation(self._state, self._admission, self._device_loader)
        self._planner = Planner(
            self._state, self._admission, self._device_loader, self._admission_order, self._isolation
        )
        self._results = StepResults(self._state, self._admission, self._device_loader, self._isolation)
        self._window = window
        self._runner_epoch = epoch
        self._client_epoch = 0
        self._last_step = 0
        self._state.outbox.append(capacity)

    # --------------------------------------------------------------------------------------------------- the loop

    def handle(self, message: ToScheduler, now: float) -> list[Upstream | Downstream]:
        """Handles one message. Returns the messages to be sent; the type of each determines the receiving process."""
        self._state.now = now
        match message:
            case StepDone():
                return self.apply(message, now)
            case Generate():
                self._generate(message)
            case Abort():
                self._abort(message)
            case LoadAdapter():
                self._lifecycle.load(message)
            case UnloadAdapter():
                self._lifecycle.unload(message)
            case PinAdapter():
                self._lifecycle.pin(message)
            case AdapterState():
                if message.epoch >= self._runner_epoch:  # else it is from a dead runner
                    self._lifecycle.on_runner_report(message)
            case RunnerReady():
                self._runner_ready(message)
            case Hello():
                if message.process == "tokenizer":
                    self._meet_client(message.epoch)
        self._disk_loader.start_loads()
        return self.drain_outbox()

    def plan(self, now: float) -> Step | None:
        """Plans and returns the next step; None if the window is full or there is nothing to do.

        Call `drain_outbox` afterwards.
        """
        state = self._state
        state.now = now
        if len(state.in_flight) >= self._window:
            return None
        step = self._planner.plan(self._runner_epoch, self._last_step + 1)
        if step is not None:
            self._last_step = step.id
        self._disk_loader.start_loads()
        return step

    def apply(self, done: StepDone, now: float) -> list[Upstream | Downstream]:
        """Applies the results of a step: one token for each request that the step sampled. Returns messages to be sent.

        Ignores results of another epoch, and of a step that is done already.
        """
        state = self._state
        if done.epoch != self._runner_epoch or not state.in_flight or done.id < state.in_flight[0].id:
            log.warning("step %d of epoch %d is not expected", done.id, done.epoch)
            return self.drain_outbox()
        self._results.apply(done)
        self._disk_loader.start_loads()
        return self.drain_outbox()

    # ---------------------------------------------------------------------------------------------------- readings

    def drain_outbox(self) -> list[Upstream | Downstream]:
        """Returns the messages to be sent since the last call, Progress first (in one message, unless it is large)."""
        state = self._state
        progress = [Progress(self._client_epoch, part, self._incarnation) for part in messages(state.updates)]
        out: list[Upstream | Downstream] = [*progress, *state.outbox]
        state.updates, state.outbox = [], []
        return out

    def check(self, kv_pages: int | None = None) -> None:
        """Asserts that all tables agree, see scheduler.audit."""
        self._state.counters.audits += 1
        audit.audit(self._state, kv_pages)

    @property
    def idle(self) -> bool:
        """Whether no step is in flight."""
        return not self._state.in_flight

    @property
    def has_requests(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self._state.requests)

    def wait_reason(self, request_id: int) -> WaitReason | None:
        """Returns why a request waits, or None if it does not wait."""
        request = self._state.requests.get(request_id)
        return None if request is None else wait_reasons.wait_reason(self._state, request)

    def stats(self) -> Stats:
        """Returns what runs and waits now, and the counters since the start."""
        return take_stats(self._state)

    # ---------------------------------------------------------------------------------------------------- requests

    def _generate(self, message: Generate) -> None:
        if message.epoch < self._client_epoch:
            return
        self._meet_client(message.epoch)
        if message.request_id in self._state.requests:
            log.warning("request %d arrived twice; the first one continues", message.request_id)
            return
        self._admission.arrive(message)

    def _abort(self, message: Abort) -> None:
        request = self._state.requests.get(message.request_id)
        if request is not None and message.epoch >= self._client_epoch:
            self._admission.end(request, finish="abort")

    def _meet_client(self, epoch: int) -> None:
        """If `epoch` is newer, a new tokenizer process has started: ends the requests of the old process.

        Sends the new process the runner's capacity and the states of all adapters.
        """
        if epoch <= self._client_epoch:
            return
        self._client_epoch = epoch
        for request in list(self._state.requests.values()):
            self._admission.end(request, update=False)
        self._state.outbox.append(self._state.capacity)
        self._state.outbox += [adapter.to_message() for adapter in self._state.registry.adapters.values()]

    # ------------------------------------------------------------------------------------------------------ runner

    def _runner_ready(self, message: RunnerReady) -> None:
        """Replaces the runner by a new one, which holds nothing: requests are requeued, and adapters are loaded again.

        Requests keep the tokens they have. Tokens of steps in flight are lost; they were never sent to a client, and
        are sampled again. A request in flight may have crashed the old runner: see scheduler.batching.isolation.
        """
        if message.epoch < self._runner_epoch:
            return
        assert _is_possible(message.capacity), f"a runner cannot hold {message.capacity}"
        state = self._state
        self._runner_epoch = message.epoch
        self._isolation.runner_died(message.after_fault)
        running = list(state.running.ordered)
        for request in running:
            state.running.remove(request)
            request.pages = []
            request.reset_progress()
        for request in state.requests.values():
            request.lose_steps_in_flight()
        held = state.replace_runner(message.capacity)
        for request in running:
            state.waiting.push(request)
        self._isolation.move_suspects_first()
        state.outbox.append(message.capacity)
        self._lifecycle.runner_replaced(held)
        self._admission.runner_replaced()
        self._isolation.end_blamed()
        self._disk_loader.start_loads()
        for copy in state.registry.copies.values():
            if copy.stage in ("disk", "loading") and not copy.on_host:
                state.report(copy)
