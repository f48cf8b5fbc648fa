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
    Ping,
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
from scheduler.loading.device_loader import Filling
from scheduler.loading.disk_loader import Loading
from scheduler.loading.lifecycle import Custody
from scheduler.progress import messages, pieces
from scheduler.requests.request import Request
from scheduler.requests.stopping import finish_of
from scheduler.state import Books, Bounds

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
        self._books = Books(capacity, bounds)
        self._admission = Admission(self._books)
        self._filling = Filling(self._books, self._admission)
        self._admission_order = AdmissionOrder(self._books, self._admission, self._filling)
        self._loading = Loading(self._books, self._admission)
        self._custody = Custody(self._books, self._admission, self._loading, self._filling)
        self._isolation = Isolation(self._books, self._admission, self._filling)
        self._planner = Planner(self._books, self._admission, self._filling, self._admission_order, self._isolation)
        self._window = window
        self._runner_epoch = epoch
        self._client_epoch = 0
        self._last_step = 0
        self._books.news.append(capacity)

    # -------------------------------------------------------------------------------------------------- three verbs

    def handle(self, message: ToScheduler, now: float) -> list[Upstream | Downstream]:
        """Takes one message in. Returns what is to be sent; the types say where to."""
        self._books.now = now
        match message:
            case StepDone():
                return self.apply(message, now)
            case Generate():
                self._generate(message)
            case Abort():
                self._abort(message)
            case LoadAdapter():
                self._custody.load(message)
            case UnloadAdapter():
                self._custody.unload(message)
            case PinAdapter():
                self._custody.pin(message)
            case AdapterState():
                if message.epoch >= self._runner_epoch:  # else a late word of a dead runner
                    self._custody.hear(message)
            case RunnerReady():
                self._runner_ready(message)
            case Hello():
                if message.process == "tokenizer":
                    self._meet_client(message.epoch)
            case Ping():
                pass
        self._loading.fetch()
        return self.take()

    def plan(self, now: float) -> Step | None:
        """The next step, if the window has room and there is something to do. Call take() after it."""
        books = self._books
        books.now = now
        if len(books.flights) >= self._window:
            return None
        step = self._planner.plan(self._runner_epoch, self._last_step + 1)
        if step is not None:
            self._last_step = step.id
        self._loading.fetch()
        return step

    def apply(self, done: StepDone, now: float) -> list[Upstream | Downstream]:
        """Takes in what a step brought: at most one token for each request that it sampled."""
        books = self._books
        if done.epoch != self._runner_epoch or not books.flights or done.id < books.flights[0].id:
            log.warning("step %d of epoch %d is not awaited", done.id, done.epoch)
            return self.take()
        flight = books.flights.pop(0)
        assert flight.id == done.id, f"step {done.id} is answered before step {flight.id}"
        assert len(done.tokens) == sum(samples for _, samples, _ in flight.parts), f"step {done.id} has other tokens"
        assert all(0 <= token < MOST_TOKENS for token in done.tokens), f"step {done.id} brings what is no token"
        tokens = iter(done.tokens)
        for index, (request, samples, scored) in enumerate(flight.parts):
            request.steps_in_flight -= 1
            if scored:
                self._score(request, done.prompt_logprobs.get(index, []), scored)
            if samples:
                request.pending -= 1
                self._append(request, next(tokens), done.logprobs.get(index))
        self._isolation.step_answered(flight)
        books.residency.step_done(done.id)
        self._filling.step_took(done.seconds)
        books.counters.steps += 1
        books.counters.step_seconds.append(done.seconds)
        self._loading.fetch()
        return self.take()

    # --------------------------------------------------------------------------------------------- what others see

    def take(self) -> list[Upstream | Downstream]:
        """Everything to be sent since the last call, the requests' Progress first: one, unless that would be large."""
        books = self._books
        progress = [Progress(self._client_epoch, part, self._incarnation) for part in messages(books.updates)]
        out: list[Upstream | Downstream] = [*progress, *books.news]
        books.updates, books.news = [], []
        return out

    def check(self, kv_pages: int | None = None) -> None:
        """Proves the books; AssertionError names what is unaccounted for. See Books.audit."""
        self._books.counters.audits += 1
        self._books.audit(kv_pages)

    @property
    def idle(self) -> bool:
        """Whether no step is in flight."""
        return not self._books.flights

    @property
    def has_requests(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self._books.requests)

    def why(self, request_id: int) -> WaitReason | None:
        """Why a request waits; None if it does not."""
        request = self._books.requests.get(request_id)
        return None if request is None else wait_reasons.why(self._books, request)

    def stats(self) -> Stats:
        """A picture, and the sums."""
        books, counters = self._books, self._books.counters
        adapters = books.directory.adapters.values()
        running = Counter(adapter_id for request in books.running.ordered for adapter_id in request.adapter_ids)
        waiting = {a.id: a.requests - running[a.id] for a in adapters if a.requests > running[a.id]}
        survey = wait_reasons.survey(books)
        return Stats(
            running=len(books.running),
            waiting=len(books.waiting),
            kv_pages_used=books.kv.used,
            kv_pages=books.kv.block_pool.count,
            rank_pages_used=books.residency.rank_pages.used(),
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
            host_adapters=len(books.host.held),
            host_bytes=books.host.bytes,
            host_evictions=counters.host_evictions,
            audits=counters.audits,
            step_seconds=counters.pop_step_seconds(),
            cached_tokens=counters.cached_tokens,
            kv_pages_cached=len(books.kv.radix_cache),
            kv_evictions=books.kv.evictions,
            waiting_reasons=survey.counts,
            oldest_waiting=survey.oldest,
            lane_preemptions=counters.lane_preemptions,
        )

    # ---------------------------------------------------------------------------------------------------- requests

    def _generate(self, message: Generate) -> None:
        if message.epoch < self._client_epoch:
            return
        self._meet_client(message.epoch)
        if message.request_id in self._books.requests:
            log.warning("request %d came twice; the first one goes on", message.request_id)
            return
        self._admission.arrive(message)

    def _abort(self, message: Abort) -> None:
        request = self._books.requests.get(message.request_id)
        if request is not None and message.epoch >= self._client_epoch:
            self._admission.end(request, finish="abort")

    def _append(self, request: Request, token: int, logprobs: LogprobIds | None) -> None:
        if request.done:
            return  # overshoot: it ended while this step was in flight
        books = self._books
        index = request.generated
        request.tokens.append(token)
        if request.row >= 0:
            books.kv.token_known(request)
        books.counters.generation_tokens += 1
        ending = finish_of(request)
        books.updates.append(
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
            self._books.updates += pieces(request.id, request.generated, request.scores_known, scores)
        request.scores_known += count

    def _meet_client(self, epoch: int) -> None:
        """A tokenizer process of a newer epoch knows nothing of the older one's requests, and nothing of us."""
        if epoch <= self._client_epoch:
            return
        self._client_epoch = epoch
        for request in list(self._books.requests.values()):
            self._admission.end(request, update=False)
        self._books.news.append(self._books.capacity)
        self._books.news += [adapter.report() for adapter in self._books.directory.adapters.values()]

    # ------------------------------------------------------------------------------------------------------ runner

    def _runner_ready(self, message: RunnerReady) -> None:
        """A runner that holds nothing of ours: its rows go back to the queue with their tokens, adapters load again.

        Tokens of steps in flight are lost and will be sampled again; nothing of them was told to anyone. Who was in
        flight may have ended the one before: see scheduler.batching.isolation.
        """
        if message.epoch < self._runner_epoch:
            return
        assert _is_possible(message.capacity), f"a runner cannot hold {message.capacity}"
        books = self._books
        self._runner_epoch = message.epoch
        self._isolation.runner_died(message.after_fault)
        running = list(books.running.ordered)
        for request in running:
            books.running.remove(request)
            request.pages = []
            request.reset_progress()
        for request in books.requests.values():
            request.lose_steps_in_flight()
        books.open(message.capacity)
        for request in running:
            books.waiting.push(request)
        self._isolation.move_suspects_first()
        books.news.append(message.capacity)
        self._custody.reset()
        self._admission.reopen()
        self._isolation.end_blamed()
        self._loading.fetch()
        for copy in books.directory.copies.values():
            if copy.stage in ("disk", "loading") and not copy.on_host:
                books.tell(copy)
