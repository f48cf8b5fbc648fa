"""Who comes in, what each waits for, and who goes back or leaves. Knows nothing of steps, tokens or whose turn it is.

arrive --> waiting: DISK (an adapter is to be read) --> BLOCKED (it loads) --> COLD (wants rank pages)
                                             --> BLOCKED (it is filled) --> READY (wants a lane) --> ACTIVE (has one)
"""

from __future__ import annotations

from engine.messages import EvictAdapter, FinishReason, Generate, Update
from scheduler.adapters.copies import Copy, Device, Host
from scheduler.requests.alora import find_invocation
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request, from_message
from scheduler.requests.stopping import finish_of, fit_to_capacity
from scheduler.state import Books
from scheduler.types import BASE, LaneKey, Order
from scheduler.unloading import Unloading

MAX_SCALE = 1e38  # float32 holds any sum of them


class Admission:
    """The doors of the queue and of the running set, over the books."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self.unloading = Unloading(books)

    # ---------------------------------------------------------------------------------------------------- requests

    def arrive(self, message: Generate) -> None:
        """Queues a new request, or ends it at once where it can never be served."""
        books = self._books
        problem = self._problem(message.lora)
        key = books.directory.key(message.lora) if problem is None else BASE
        request = from_message(message, key, books.order_on_arrival(message))
        problem = problem or self._never(request.key) or fit_to_capacity(request, books.capacity)
        if problem is not None:
            books.updates.append(Update(request_id=request.id, index=request.generated, error=problem))
            books.ordering.on_end(request)
            return
        self._invoke(request)
        for adapter_id in request.adapter_ids:
            books.directory.adapters[adapter_id].requests += 1
        for copy in books.copies(request.key):
            copy.requests += 1
            books.counters.adapter_hits += copy.device is Device.RESIDENT
        books.requests[request.id] = request
        self._queue(request)
        if not request.done and (finish := finish_of(request)) is not None:  # a replay that had its last token
            self.end(request, finish=finish[0], stop_reason=finish[1])

    def admit(self, request: Request) -> bool:
        """Gives a waiting request whose turn it is a row, a lane and pages for all its tokens; true if the lane is new.

        There must be a row and pages, and a lane unless its key holds one; its copies must be resident.
        """
        books = self._books
        key = request.key
        request.lane, new = books.lanes.acquire(key, books.now)
        books.waiting.remove(request)
        if new:
            books.residency.use(books.copies(key))
            if key in books.waiting:
                books.waiting.set_state(key, WaitState.ACTIVE, books.now)
        books.running.add(request)
        books.kv.allocate(request, books.owner(key))
        books.ordering.on_admitted(request)
        if not request.admitted:
            request.admitted = True
            request.cached = min(request.computed, request.prompt_length)
            books.counters.cached_tokens += request.cached
            books.counters.prompt_tokens += request.prompt_length
        return new

    def preempt(self, request: Request, order: Order | None = None) -> None:
        """Takes a running request back to the queue, in its old order or a new one; it keeps its tokens."""
        self._books.counters.preemptions += 1
        self._leave(request)
        request.order = request.order if order is None else order
        request.reset_progress()
        self._queue(request)

    def end(
        self,
        request: Request,
        *,
        finish: FinishReason | None = None,
        stop_reason: int | None = None,
        error: str | None = None,
        code: str | None = None,
        update: bool = True,
    ) -> None:
        """The request is over, running or waiting, and everything it held is free. `update`: its client is told."""
        books = self._books
        request.done = True
        del books.requests[request.id]
        if update:
            index = request.generated
            books.updates.append(
                Update(
                    request_id=request.id, index=index, finish=finish, stop_reason=stop_reason, error=error, code=code
                )
            )
        books.blame.forget(request.id)
        if request.row >= 0:
            self._leave(request)
        else:
            books.waiting.remove(request)
        books.ordering.on_end(request)
        for copy in books.copies(request.key):
            copy.requests -= 1
            copy.last_used = books.tick()
            books.rest(copy)
        for adapter in [books.directory.adapters[adapter_id] for adapter_id in request.adapter_ids]:
            adapter.requests -= 1
            self.unloading.unload_if_drained(adapter)

    def fail(self, copy: Copy, reason: str, final: bool = True) -> None:
        """The copy cannot be served, for good or (not `final`) until the next request: nor can who names it now."""
        books = self._books
        copy.wish = None
        if final:
            copy.error = reason
            books.disown(copy)
        books.rest(copy)
        for request in [r for r in books.running.ordered if any(c == copy.id for c, _ in r.key)]:
            self.end(request, error=reason)
        for key in books.waiting.keys_of(copy.id):
            self.fail_waiting(key, reason)
        if copy.leaving or not copy.names:
            return  # the last of them let it go
        if final:
            books.residency.free(copy)
            if copy.host is Host.HELD:  # we refuse it: the runner has it still
                books.host.evict(copy)
                books.news.append(EvictAdapter(copy.holder))
        books.tell(copy, error=reason)
        self.unloading.unload_drained(copy)

    def fail_waiting(self, key: LaneKey, problem: str) -> None:
        """Ends the waiting requests of a key."""
        for request in self._books.waiting.requests(key):
            self.end(request, error=problem)

    # ------------------------------------------------------------------------------------------------------ places

    def settle(self, key: LaneKey) -> None:
        """Finds out what a waiting key waits for; ends its requests where that will never come."""
        books = self._books
        if key == BASE or key in books.lanes:
            books.waiting.set_state(key, WaitState.DRAINING if key in books.draining else WaitState.ACTIVE, books.now)
            return
        copies = books.copies(key)
        problem = self._never(key)
        if problem is not None:
            self.fail_waiting(key, problem)
        elif any(copy.to_load for copy in copies):
            books.waiting.set_state(key, WaitState.DISK, books.now)
            books.stirred = True
        elif any(copy.device is Device.NONE and copy.host is not Host.HELD for copy in copies):
            books.waiting.set_state(key, WaitState.BLOCKED, books.now)
        elif any(copy.device is Device.NONE for copy in copies):
            books.waiting.set_state(key, WaitState.COLD, books.now)
        else:
            filling = any(copy.device is Device.FILLING for copy in copies)
            books.waiting.set_state(key, WaitState.BLOCKED if filling else WaitState.READY, books.now)

    def settle_copy(self, copy: Copy) -> None:
        """The same for every waiting key that names the copy."""
        for key in self._books.waiting.keys_of(copy.id):
            if key in self._books.waiting:
                self.settle(key)

    def withdraw(self, copy: Copy) -> list[Request]:
        """Takes everyone who waits for the copy out of the queue, for `rekey`."""
        books = self._books
        requests = [request for key in books.waiting.keys_of(copy.id) for request in books.waiting.requests(key)]
        for request in requests:
            books.waiting.remove(request)
            for each in books.copies(request.key):
                each.requests -= 1
                books.rest(each)
        return requests

    def rekey(self, requests: list[Request]) -> None:
        """More is known of their adapters: these requests, taken from the queue, go where they wait from now on."""
        directory = self._books.directory
        for request in requests:
            request.key = directory.key(request.lora)
            self._invoke(request)
            for copy in directory.of(request.key):
                copy.requests += 1
            self._books.waiting.push(request)
            for copy in directory.of(request.key):
                self._books.rest(copy)
        for key in {request.key: None for request in requests}:
            if key in self._books.waiting:
                self.settle(key)

    def drain(self, key: LaneKey, draining: bool) -> None:
        """A lane takes nobody any more until it is free, or takes requests again."""
        books = self._books
        if draining:
            books.draining[key] = None
        else:
            books.draining.pop(key, None)
        if key in books.waiting:
            self.settle(key)

    def reopen(self) -> None:
        """A new runner: every waiting request is measured against it, and every key finds its place again."""
        books = self._books
        for request in list(books.waiting):
            problem = fit_to_capacity(request, books.capacity)
            if problem is not None:
                self.end(request, error=problem)
            elif (finish := finish_of(request)) is not None:
                self.end(request, finish=finish[0], stop_reason=finish[1])
        for key in books.waiting.lane_keys():
            self.settle(key)

    # ----------------------------------------------------------------------------------------------------- private

    def _queue(self, request: Request) -> None:
        request.queued_at = self._books.now
        self._books.waiting.push(request)
        for copy in self._books.copies(request.key):
            self._books.rest(copy)
        self.settle(request.key)

    def _invoke(self, request: Request) -> None:
        """Finds where its activated adapter begins to act, if that is known. One that never does is not needed."""
        copies = self._books.copies(request.key)
        if len(copies) == 1 and (invocation := copies[0].card.invocation):
            request.invocation_start = find_invocation(request.tokens[: request.prompt_length], invocation)
            if request.invocation_start is None:
                request.key = BASE

    def _problem(self, lora: list[tuple[int, float]]) -> str | None:
        """Why a selection cannot be looked up."""
        books = self._books
        if not sum(abs(scale) for _, scale in lora) <= MAX_SCALE:  # also what is not a number
            return f"the scales of the adapters must be finite, and add up to at most {MAX_SCALE:g}"
        for adapter_id, _ in lora:
            adapter = books.directory.adapters.get(adapter_id)
            if adapter_id and not books.lanes.count:
                return "LoRA is not enabled; start with --enable-lora"
            if adapter_id and adapter is None:
                return f"adapter {adapter_id} is not loaded; load it first"
            if adapter is not None and adapter.draining:
                return f"adapter {adapter_id} is being unloaded"
        return None

    def _never(self, key: LaneKey) -> str | None:
        """Why a key can never be served, judging by what is known now."""
        books = self._books
        if key == BASE:
            return None
        copies = books.copies(key)
        problem = books.residency.problem(copies)
        if len(copies) > 1 and any(copy.card.invocation for copy in copies):
            problem = (
                "an adapter that acts from its invocation on (alora_invocation_tokens) cannot be mixed with others"
            )
        if problem is None and not all(copy.on_device for copy in copies):
            problem = books.host.too_large(copies)
        return problem

    def _leave(self, request: Request) -> None:
        books = self._books
        books.running.remove(request)
        books.kv.release(request)
        request.row = -1
        if books.lanes.release(request.key):
            books.draining.pop(request.key, None)
            books.residency.leave(books.copies(request.key))
            if request.key in books.waiting:
                self.settle(request.key)
