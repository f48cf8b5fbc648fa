"""The scheduler's core: messages in, messages out, one step at a time. Knows nothing of sockets, clocks or tensors.

    handle(message)    a request, an abort, an adapter, the runner's word
    plan(now)          the next Step, if a step may be in flight and there is something to do
    apply(StepDone)    its tokens, and what ends by them
    take()             what is to be told to others since the last call
    check()            the books are proved

Rows, KV pages and lanes are free as soon as their request ends or gives way, though steps in flight may still name
them: the runner executes steps strictly in order, so whatever a later step does with them comes after.

    step n    writes KV page 7, row 3 (the overshoot of a request that ended at step n-1: its token is dropped)
    step n+1  NewRow 3 (next generation), page 7 appended to another row, written from its first position on, then read

Rank pages are different, see adapters/rank_pages. Epochs: what the tokenizer process sends carries its epoch and is
answered with it; steps carry the runner's. Words of an older epoch are dropped, a newer one replaces what was.
"""

from __future__ import annotations

import logging
from collections import Counter

from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    EvictAdapter,
    Generate,
    Hello,
    LoadAdapter,
    LogprobIds,
    PinAdapter,
    Progress,
    RunnerReady,
    Stats,
    Step,
    StepDone,
    ToScheduler,
    UnloadAdapter,
    Update,
    WaitReason,
)
from scheduler import wait_reasons
from scheduler.adapters.copies import Device
from scheduler.admission import Admission
from scheduler.batching.admission_order import AdmissionOrder
from scheduler.batching.isolation import Isolation
from scheduler.batching.planner import Planner
from scheduler.loading.device_loader import DeviceLoader
from scheduler.loading.disk_loader import DiskLoader
from scheduler.loading.lifecycle import AdapterLifecycle
from scheduler.progress import messages, pieces
from scheduler.requests.request import Request
from scheduler.requests.stopping import finish_of
from scheduler.state import Bounds, SchedulerState

log = logging.getLogger(__name__)

MOST_TOKENS = 1 << 31  # larger than any vocabulary, with what adapters add to it

Upstream = Progress | AdapterState | Capacity
Downstream = LoadAdapter | UnloadAdapter | EvictAdapter


def _is_possible(capacity: Capacity) -> bool:
    """Whether tables of these sizes can be made at all."""
    c, most = capacity, 1 << 31
    counts = (c.kv_pages << 3, c.page_size, c.max_length, c.max_batched_tokens, c.vocab_size)
    tables = (c.max_loras, *c.rank_pages.values())
    return 0 < c.rows <= 1 << 16 and all(0 < each < most for each in counts) and all(0 <= n <= 1 << 24 for n in tables)


class Scheduler:
    """The whole state. `window` is how many steps may be in flight, `bounds` what the flags allow.

    `epoch` is the runner's at the start, `incarnation` this scheduler's own.
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
        self._window = window
        self._runner_epoch = epoch
        self._client_epoch = 0
        self._last_step = 0
        self._state.outbox.append(capacity)

    # -------------------------------------------------------------------------------------------------- three verbs

    def handle(self, message: ToScheduler, now: float) -> list[Upstream | Downstream]:
        """Takes one message in. Returns what is to be sent; the types say where to."""
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
                if message.epoch >= self._runner_epoch:  # else a late word of a dead runner
                    self._lifecycle.on_runner_report(message)
            case RunnerReady():
                self._runner_ready(message)
            case Hello():
                if message.process == "tokenizer":
                    self._meet_client(message.epoch)
        self._disk_loader.start_loads()
        return self.drain_outbox()

    def plan(self, now: float) -> Step | None:
        """The next step, if the window has room and there is something to do. Call take() after it."""
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
        """Takes in what a step brought: at most one token for each request that it sampled."""
        state = self._state
        if done.epoch != self._runner_epoch or not state.in_flight or done.id < state.in_flight[0].id:
            log.warning("step %d of epoch %d is not awaited", done.id, done.epoch)
            return self.drain_outbox()
        in_flight = state.in_flight.pop(0)
        assert in_flight.id == done.id, f"step {done.id} is answered before step {in_flight.id}"
        assert len(done.tokens) == sum(samples for _, samples, _ in in_flight.parts), f"step {done.id} has other tokens"
        assert all(0 <= token < MOST_TOKENS for token in done.tokens), f"step {done.id} brings what is no token"
        tokens = iter(done.tokens)
        for index, (request, samples, scored) in enumerate(in_flight.parts):
            request.steps_in_flight -= 1
            if scored:
                self._score(request, done.prompt_logprobs.get(index, []), scored)
            if samples:
                request.pending -= 1
                self._append(request, next(tokens), done.logprobs.get(index))
        self._isolation.step_answered(in_flight)
        state.device_cache.step_done(done.id)
        self._device_loader.record_step_seconds(done.seconds)
        state.counters.steps += 1
        state.counters.step_seconds.append(done.seconds)
        self._disk_loader.start_loads()
        return self.drain_outbox()

    # --------------------------------------------------------------------------------------------- what others see

    def drain_outbox(self) -> list[Upstream | Downstream]:
        """Everything to be sent since the last call, the requests' Progress first: one, unless that would be large."""
        state = self._state
        progress = [Progress(self._client_epoch, part, self._incarnation) for part in messages(state.updates)]
        out: list[Upstream | Downstream] = [*progress, *state.outbox]
        state.updates, state.outbox = [], []
        return out

    def check(self, kv_pages: int | None = None) -> None:
        """Proves the books; AssertionError names what is unaccounted for. See SchedulerState.audit."""
        self._state.counters.audits += 1
        self._state.audit(kv_pages)

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
        """A picture, and the sums."""
        state, counters = self._state, self._state.counters
        adapters = state.registry.adapters.values()
        running = Counter(adapter_id for request in state.running.ordered for adapter_id in request.adapter_ids)
        waiting = {a.id: a.requests - running[a.id] for a in adapters if a.requests > running[a.id]}
        report = wait_reasons.report(state)
        return Stats(
            running=len(state.running),
            waiting=len(state.waiting),
            kv_pages_used=state.kv.used,
            kv_pages=state.kv.block_pool.count,
            rank_pages_used=state.device_cache.rank_pages.used(),
            resident=[a.id for a in adapters if a.copy.device is Device.RESIDENT],
            running_adapters=dict(running),
            waiting_adapters=waiting,
            steps=counters.steps,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            adapter_hits=counters.adapter_hits,
            adapter_fills=counters.adapter_fills,
            adapter_evictions=counters.adapter_evictions,
            adapter_loads=counters.adapter_loads,
            host_adapters=len(state.host_cache.held),
            host_bytes=state.host_cache.bytes,
            host_evictions=counters.host_evictions,
            audits=counters.audits,
            step_seconds=counters.pop_step_seconds(),
            cached_tokens=counters.cached_tokens,
            kv_pages_cached=len(state.kv.radix_cache),
            kv_evictions=state.kv.evictions,
            waiting_reasons=report.counts,
            oldest_waiting=report.oldest,
            lane_preemptions=counters.lane_preemptions,
        )

    # ---------------------------------------------------------------------------------------------------- requests

    def _generate(self, message: Generate) -> None:
        if message.epoch < self._client_epoch:
            return
        self._meet_client(message.epoch)
        if message.request_id in self._state.requests:
            log.warning("request %d came twice; the first one goes on", message.request_id)
            return
        self._admission.arrive(message)

    def _abort(self, message: Abort) -> None:
        request = self._state.requests.get(message.request_id)
        if request is not None and message.epoch >= self._client_epoch:
            self._admission.end(request, finish="abort")

    def _append(self, request: Request, token: int, logprobs: LogprobIds | None) -> None:
        if request.done:
            return  # overshoot: it ended while this step was in flight
        state = self._state
        index = request.generated
        request.tokens.append(token)
        if request.row >= 0:
            state.kv.token_known(request)
        state.counters.generation_tokens += 1
        ending = finish_of(request)
        state.updates.append(
            Update(
                request_id=request.id,
                index=index,
                tokens=[token],
                cached_tokens=request.pop_cached(),
                finish=ending[0] if ending else None,
                stop_reason=ending[1] if ending else None,
                logprobs=[logprobs] if logprobs is not None else None,
            )
        )
        if ending is not None:
            self._admission.end(request, update=False)

    def _score(self, request: Request, scores: list[LogprobIds], count: int) -> None:
        assert len(scores) == count, f"request {request.id} has {len(scores)} prompt logprobs of {count}"
        if not request.done:
            self._state.updates += pieces(request.id, request.generated, request.scores_known, scores)
        request.scores_known += count

    def _meet_client(self, epoch: int) -> None:
        """A tokenizer process of a newer epoch knows nothing of the older one's requests, and nothing of us."""
        if epoch <= self._client_epoch:
            return
        self._client_epoch = epoch
        for request in list(self._state.requests.values()):
            self._admission.end(request, update=False)
        self._state.outbox.append(self._state.capacity)
        self._state.outbox += [adapter.to_message() for adapter in self._state.registry.adapters.values()]

    # ------------------------------------------------------------------------------------------------------ runner

    def _runner_ready(self, message: RunnerReady) -> None:
        """A runner that holds nothing of ours: its rows go back to the queue with their tokens, adapters load again.

        Tokens of steps in flight are lost and will be sampled again; nothing of them was told to anyone. Who was in
        flight may have ended the one before: see scheduler.batching.isolation.
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
        state.open(message.capacity)
        for request in running:
            state.waiting.push(request)
        self._isolation.move_suspects_first()
        state.outbox.append(message.capacity)
        self._lifecycle.reset()
        self._admission.restart()
        self._isolation.end_blamed()
        self._disk_loader.start_loads()
        for copy in state.registry.copies.values():
            if copy.stage in ("disk", "loading") and not copy.on_host:
                state.report(copy)
