"""The scheduler's core: messages in, messages out, one step at a time. Knows nothing of sockets, clocks or tensors.

    handle(message)    a request, an abort, an adapter, a report of the runner
    plan(now)          the next Step, if the window has room and there is something to do
    apply(StepDone)    appends its tokens, and ends the requests that they finish
    drain_outbox()     the messages to be sent since the last call
    check()            the audit: asserts that all tables agree

Rows, KV pages and lanes are free as soon as their request ends or is preempted, though steps in flight may still name
them: the runner executes steps strictly in order, so whatever a later step does with them comes after.

    step n    writes KV page 7, row 3 (for a request that ended at step n-1: its token is dropped)
    step n+1  NewRow 3 (next generation), page 7 appended to another row, written from its first position on, then read

Rank pages are different, see adapters/rank_pages. Epochs: messages of the tokenizer process carry its epoch, and so do
the answers; steps carry the runner's. Messages of an older epoch are dropped; a newer epoch replaces the old.
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
    """Whether tables of these sizes can be made."""
    c, most = capacity, 1 << 31
    counts = (c.kv_pages << 3, c.page_size, c.max_length, c.max_batched_tokens, c.vocab_size)
    tables = (c.max_loras, *c.rank_pages.values())
    return 0 < c.rows <= 1 << 16 and all(0 < each < most for each in counts) and all(0 <= n <= 1 << 24 for n in tables)


class Scheduler:
    """The scheduler without sockets or clock. `window`: the most steps in flight; `bounds`: what the flags allow.

    `epoch` is that of the first runner, `incarnation` that of this scheduler.
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
        """Handles one message. Returns the messages to be sent; their types say to which process."""
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
        """The next step, if the window has room and there is something to do. Call drain_outbox() after it."""
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
        """Applies the results of a step: at most one token for each request that it sampled."""
        state = self._state
        if done.epoch != self._runner_epoch or not state.in_flight or done.id < state.in_flight[0].id:
            log.warning("step %d of epoch %d is not expected", done.id, done.epoch)
            return self.drain_outbox()
        self._results.apply(done)
        self._disk_loader.start_loads()
        return self.drain_outbox()

    # ---------------------------------------------------------------------------------------------------- readings

    def drain_outbox(self) -> list[Upstream | Downstream]:
        """The messages to be sent since the last call. Progress comes first, in one message if it is not large."""
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
        """Why a request waits; None if it does not."""
        request = self._state.requests.get(request_id)
        return None if request is None else wait_reasons.wait_reason(self._state, request)

    def stats(self) -> Stats:
        """What runs and waits now, and the counters since the start."""
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
        """A new tokenizer process: ends the requests of the old one, and sends it the capacity and all adapters."""
        if epoch <= self._client_epoch:
            return
        self._client_epoch = epoch
        for request in list(self._state.requests.values()):
            self._admission.end(request, update=False)
        self._state.outbox.append(self._state.capacity)
        self._state.outbox += [adapter.to_message() for adapter in self._state.registry.adapters.values()]

    # ------------------------------------------------------------------------------------------------------ runner

    def _runner_ready(self, message: RunnerReady) -> None:
        """A new runner holds nothing: running requests are queued again with their tokens, adapters are loaded again.

        Tokens of steps in flight are lost, were never sent to a client, and are sampled again. A request in flight may
        have ended the runner before: see scheduler.batching.isolation.
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
