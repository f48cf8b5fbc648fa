"""Who gets in, who waits for what, and who leaves. Knows nothing of steps or tokens.

    arrive --> waiting: BLOCKED (adapter loads, or is filled) --> COLD (wants rank pages) --> READY (wants a lane)
                                                                                          \\-> ACTIVE (has one)
    admit  --> the first in order among ACTIVE heads and, while a lane is free, READY heads

So only requests blocked by a lane or an adapter are passed by others. When the first of those that could go lacks a row
or KV pages, nobody is admitted: a smaller request must not pass a larger one for ever.
"""

from __future__ import annotations

from msgspec.structs import replace

from engine.messages import Fill, FinishReason, Generate, UnloadAdapter, Update
from scheduler.books import Books
from scheduler.request import BASE, LaneKey, Request, from_message
from scheduler.residency import Adapter, Stage
from scheduler.stopping import finish_of, fit
from scheduler.waiting import Place


class Admission:
    """The doors of the running set, over the books."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._arrivals = 0
        self._unasked: list[int] = []  # adapters that came while nobody waited for them: filled while there is room

    # ---------------------------------------------------------------------------------------------------- requests

    def arrive(self, message: Generate) -> None:
        """Queues a new request, or ends it at once where it can never be served."""
        books = self._books
        request = from_message(message, self._arrivals)
        self._arrivals += 1
        problem = fit(request, books.capacity) or self._problem(request.key)
        if problem is not None:
            books.updates.append(Update(request_id=request.id, index=request.generated, error=problem))
            return
        adapters = books.residency.adapters(request.key)
        for adapter in adapters:
            adapter.requests += 1
            books.counters.adapter_hits += adapter.stage is Stage.RESIDENT
        books.requests[request.id] = request
        books.waiting.push(request)
        self.settle(request.key)
        if not request.done and (finish := finish_of(request)) is not None:  # a replay that had its last token
            self.end(request, finish=finish[0], matched=finish[1])

    def next(self) -> Request | None:
        """The request to be admitted now, if it is to be anyone."""
        books = self._books
        best = books.waiting.first(Place.ACTIVE)
        if books.lanes.free and (ready := books.waiting.first(Place.READY)) is not None:
            best = ready if best is None or ready.order < best.order else best
        if best is None or best.flights or not books.running.free:
            return None  # tokens in flight are applied before their request comes back
        need = -(-len(best.tokens) // books.capacity.page_size)
        return best if need + len(books.running) <= books.pages.free else None  # a page left for each running row

    def admit(self, request: Request) -> bool:
        """Gives what `next` chose a row, a lane and pages for all its tokens; true if the lane is new."""
        books = self._books
        key = request.key
        request.lane, new = books.lanes.acquire(key)
        books.waiting.remove(request)
        if new and key in books.waiting:
            books.waiting.put(key, Place.ACTIVE)
        books.running.add(request)
        request.pages = books.pages.grant(-(-len(request.tokens) // books.capacity.page_size))
        if not request.admitted:
            request.admitted = True
            books.counters.prompt_tokens += request.prompt_length
        return new

    def preempt(self, request: Request) -> None:
        """Takes a running request back to the queue, in its old order; it keeps its tokens."""
        self._leave(request)
        request.rewind()
        self._books.waiting.push(request)
        self.settle(request.key)

    def end(
        self,
        request: Request,
        *,
        finish: FinishReason | None = None,
        matched: int | None = None,
        error: str | None = None,
        update: bool = True,
    ) -> None:
        """The request is over, running or waiting, and everything it held is free. `update`: its client is told."""
        books = self._books
        request.done = True
        del books.requests[request.id]
        if update:
            index = request.generated
            books.updates.append(
                Update(request_id=request.id, index=index, finish=finish, matched=matched, error=error)
            )
        if request.row >= 0:
            self._leave(request)
        else:
            books.waiting.remove(request)
            self._drop_promise(request.key)
        for adapter in books.residency.adapters(request.key):
            adapter.requests -= 1
            self.unload_if_drained(adapter)

    # ---------------------------------------------------------------------------------------------------- adapters

    def settle(self, key: LaneKey) -> None:
        """Finds out what a waiting key waits for; ends its requests where that will never come.

        A key that could have its adapters at once waits behind an older one that cannot: else small adapters that come
        and go would keep a large one out for ever.
        """
        books = self._books
        if key == BASE or key in books.lanes:
            books.waiting.put(key, Place.ACTIVE)
            return
        problem = books.residency.problem(key)
        if problem is not None:
            self._fail_waiting(key, problem)
            return
        stages = {adapter.stage for adapter in books.residency.adapters(key)}
        if Stage.LOADING in stages:
            books.waiting.put(key, Place.BLOCKED)
        elif key not in books.promised and (Stage.HOST in stages or self._older_cold(key)):
            books.waiting.put(key, Place.COLD)
        else:
            self._promise(key)
            books.waiting.put(key, Place.BLOCKED if Stage.FILLING in stages else Place.READY)

    def settle_adapter(self, adapter: Adapter) -> None:
        """The same for every waiting key that names the adapter."""
        for key in self._books.waiting.keys_of(adapter.id):
            if key in self._books.waiting:
                self.settle(key)

    def offer(self, adapter: Adapter) -> None:
        """The adapter came to the host tier: fill it, though nobody asked, if there is room."""
        self._unasked.append(adapter.id)

    def reopen(self) -> None:
        """A new runner: every waiting request is measured against it, and every key finds its place again."""
        books = self._books
        for request in list(books.waiting):
            problem = fit(request, books.capacity)
            if problem is not None:
                self.end(request, error=problem)
            elif (finish := finish_of(request)) is not None:
                self.end(request, finish=finish[0], matched=finish[1])
        for key in books.waiting.all_keys():
            self.settle(key)

    def grant(self, step: int) -> list[Fill]:
        """Fills for step `step`: COLD keys in order up to the first that must wait, then adapters nobody asked for."""
        fills: list[Fill] = []
        while (request := self._books.waiting.first(Place.COLD)) is not None:
            granted = self._grant_key(request.key, step)
            if granted is None:
                return fills
            fills += granted
        if self._unasked:
            fills += self._grant_unasked(step)
        return fills

    def fail(self, adapter: Adapter, reason: str) -> None:
        """The adapter cannot be served: nor can any request that names it."""
        books = self._books
        for request in [r for r in books.running.ordered if any(a == adapter.id for a, _ in r.key)]:
            self.end(request, error=reason)
        for key in books.waiting.keys_of(adapter.id):
            self._fail_waiting(key, reason)
        if adapter.stage is Stage.UNLOADING:
            return  # the last of them let it go
        books.residency.failed(adapter, reason)
        books.news.append(adapter.report())
        self.unload_if_drained(adapter)

    def unload_if_drained(self, adapter: Adapter) -> None:
        """Frees a draining adapter once its last request is over and the runner is not busy with it."""
        if adapter.draining and not adapter.requests and adapter.stage in (Stage.HOST, Stage.RESIDENT, Stage.FAILED):
            failed = adapter.stage is Stage.FAILED
            self._books.residency.unload(adapter)
            self._books.news.append(UnloadAdapter(adapter.id))
            if failed:
                self.forget(adapter)  # the runner has nothing to free

    def forget(self, adapter: Adapter) -> None:
        """The adapter is gone, and that is told."""
        self._books.residency.forget(adapter)
        self._books.news.append(replace(adapter.card, state="gone"))

    # ----------------------------------------------------------------------------------------------------- private

    def _problem(self, key: LaneKey) -> str | None:
        books = self._books
        if key and not books.lanes.count:
            return "LoRA is not enabled; start with --enable-lora"
        problem = books.residency.problem(key)
        if problem is None:
            leaving = [adapter.id for adapter in books.residency.adapters(key) if adapter.draining]
            problem = f"adapter {leaving[0]} is being unloaded" if leaving else None
        return problem

    def _older_cold(self, key: LaneKey) -> bool:
        cold = self._books.waiting.first(Place.COLD)
        return cold is not None and cold.key != key and cold.order < self._books.waiting.head(key).order

    def _leave(self, request: Request) -> None:
        books = self._books
        books.running.remove(request)
        books.pages.release(request.pages)
        request.row, request.pages = -1, []
        if books.lanes.release(request.key):
            del books.promised[request.key]
            books.residency.release(request.key)
            if request.key in books.waiting:
                self.settle(request.key)

    def _promise(self, key: LaneKey) -> None:
        if key not in self._books.promised:
            self._books.promised[key] = None
            self._books.residency.promise(key)

    def _drop_promise(self, key: LaneKey) -> None:
        books = self._books
        if key in books.promised and key not in books.lanes and key not in books.waiting:
            del books.promised[key]
            books.residency.release(key)

    def _fail_waiting(self, key: LaneKey, problem: str) -> None:
        for request in self._books.waiting.requests(key):
            self.end(request, error=problem)

    def _grant_key(self, key: LaneKey, step: int) -> list[Fill] | None:
        books = self._books
        adapters = books.residency.adapters(key)
        for adapter in books.residency.make_room(adapters):
            books.counters.adapter_evictions += 1
            books.news.append(adapter.report())
        fills = books.residency.grant(adapters, step)
        if fills is None:
            problem = books.residency.hopeless(adapters)
            if problem is None:
                return None
            self._fail_waiting(key, problem)
            return []
        books.counters.adapter_fills += len(fills)
        self._promise(key)
        self.settle(key)
        return fills

    def _grant_unasked(self, step: int) -> list[Fill]:
        books = self._books
        fills: list[Fill] = []
        for adapter_id in self._unasked:
            adapter = books.residency.get(adapter_id)
            if adapter is not None and adapter.stage is Stage.HOST:
                fills += books.residency.grant([adapter], step) or []
        self._unasked.clear()
        books.counters.adapter_fills += len(fills)
        return fills
