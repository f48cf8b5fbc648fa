"""Who gets in, who waits for what, and who leaves. Knows nothing of steps or tokens.

    arrive --> waiting: DISK (an adapter is to be read) --> BLOCKED (it loads, or is filled) --> COLD (wants rank pages)
                                                           --> READY (wants a lane) --> ACTIVE (has one)
    admit  --> the first in order among ACTIVE heads and, while a lane is free, READY heads

So only requests blocked by a lane or an adapter are passed by others. When the first of those that could go lacks a row
or KV pages, nobody is admitted: a smaller request must not pass a larger one for ever.
"""

from __future__ import annotations

from msgspec.structs import replace

from engine.messages import EvictAdapter, Fill, FinishReason, Generate, UnloadAdapter, Update
from scheduler.adapter import Adapter, Copy, Device, Host
from scheduler.books import Books
from scheduler.request import BASE, LaneKey, Request, from_message
from scheduler.stopping import finish_of, fit
from scheduler.waiting import Place

MAX_SCALE = 1e38  # float32 holds any sum of them


class Admission:
    """The doors of the running set, over the books."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._unasked: list[int] = []  # copies that came while nobody waited for them: filled while there is room

    # ---------------------------------------------------------------------------------------------------- requests

    def arrive(self, message: Generate) -> None:
        """Queues a new request, or ends it at once where it can never be served."""
        books = self._books
        problem = self._problem(message.lora)
        request = from_message(
            message, books.directory.key(message.lora) if problem is None else BASE, books.next_order()[1]
        )
        problem = problem or self._never(request.key) or fit(request, books.capacity)
        if problem is not None:
            books.updates.append(Update(request_id=request.id, index=request.generated, error=problem))
            return
        for adapter_id in request.names:
            books.directory.adapters[adapter_id].requests += 1
        for copy in books.copies(request.key):
            copy.requests += 1
            books.counters.adapter_hits += copy.device is Device.RESIDENT
            books.rest(copy)
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
        for copy in books.copies(request.key):
            copy.requests -= 1
            copy.last_used = books.tick()
            books.rest(copy)
        for adapter in [books.directory.adapters[adapter_id] for adapter_id in request.names]:
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
        copies = books.copies(key)
        problem = self._never(key)
        if problem is not None:
            self.fail_waiting(key, problem)
        elif any(copy.to_load for copy in copies):
            books.waiting.put(key, Place.DISK)
            books.stirred = True
        elif any(copy.device is Device.NONE and copy.host is not Host.HELD for copy in copies):
            books.waiting.put(key, Place.BLOCKED)
        elif key not in books.promised and (not all(c.on_device for c in copies) or self._older_cold(key)):
            books.waiting.put(key, Place.COLD)
        else:
            self._promise(key)
            filling = any(copy.device is Device.FILLING for copy in copies)
            books.waiting.put(key, Place.BLOCKED if filling else Place.READY)

    def settle_copy(self, copy: Copy) -> None:
        """The same for every waiting key that names the copy."""
        for key in self._books.waiting.keys_of(copy.id):
            if key in self._books.waiting:
                self.settle(key)

    def rekey(self, requests: list[Request]) -> None:
        """Their adapters turned out to share a copy: these requests, taken from the queue, go where it waits."""
        directory = self._books.directory
        for request in requests:
            request.key = directory.key(request.lora)
            for copy in directory.of(request.key):
                copy.requests += 1
                self._books.rest(copy)
            self._books.waiting.push(request)
        for key in {request.key: None for request in requests}:
            if key in self._books.waiting:
                self.settle(key)

    def offer(self, copy: Copy) -> None:
        """The copy came to the host tier: fill it, though nobody waits for it, when there is room."""
        if copy.wish is not None:
            self._books.wishes[copy.id] = None
        else:
            self._unasked.append(copy.id)

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
        """Fills for step `step`: COLD keys and wishes in order up to the first that must wait, then the unasked."""
        books = self._books
        fills: list[Fill] = []
        while True:
            request, wish = books.waiting.first(Place.COLD), self._first_wish()
            if wish is not None and wish.wish is not None and (request is None or wish.wish < request.order):
                granted = self._grant_wish(wish, step)
            elif request is not None:
                granted = self._grant_key(request.key, step)
            else:
                break
            if granted is None:
                return fills
            fills += granted
        if self._unasked:
            fills += self._grant_unasked(step)
        return fills

    def fail(self, copy: Copy, reason: str, final: bool = True) -> None:
        """The copy cannot be served, for good or (not `final`) until the next request: nor can who names it now."""
        books = self._books
        copy.wish = None
        if final:
            copy.error = reason
            books.directory.disown(copy)
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
        for adapter in list(copy.names.values()):
            self.unload_if_drained(adapter)

    def fail_waiting(self, key: LaneKey, problem: str) -> None:
        """Ends the waiting requests of a key."""
        for request in self._books.waiting.requests(key):
            self.end(request, error=problem)

    def unload_if_drained(self, adapter: Adapter) -> None:
        """Lets a draining name go after its last request, and with the last name its copy, if nobody reads it."""
        books, copy = self._books, adapter.copy
        if not adapter.draining or adapter.requests or copy.leaving:
            return
        if len(copy.names) > 1:
            self._let_go(adapter)
            books.rest(copy)
            return
        if copy.host is Host.LOADING or copy.device is Device.FILLING:
            return
        there = copy.on_host or copy.on_device
        books.residency.free(copy)
        books.directory.disown(copy)
        copy.leaving, copy.wish = True, None
        books.rest(copy)
        if copy.sent:
            books.news.append(UnloadAdapter(copy.holder))
        if not there:
            self.forget(copy)  # nothing to wait for

    def forget(self, copy: Copy) -> None:
        """The copy is gone with all its names, and that is told."""
        books = self._books
        books.residency.free(copy)
        books.host.lose(copy)
        for adapter in list(copy.names.values()):
            self._let_go(adapter)
        books.directory.drop(copy)
        books.stirred = True

    # ----------------------------------------------------------------------------------------------------- private

    def _let_go(self, adapter: Adapter) -> None:
        self._books.directory.detach(adapter)
        self._books.news.append(
            replace(adapter.copy.card, adapter_id=adapter.id, state="gone", error=None, seconds=0.0)
        )

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
        if problem is None and not all(copy.on_device for copy in copies):
            problem = books.host.too_large(copies)
        return problem

    def _older_cold(self, key: LaneKey) -> bool:
        order = self._books.waiting.head(key).order
        cold, wish = self._books.waiting.first(Place.COLD), self._first_wish()
        if wish is not None and wish.wish is not None and wish.wish < order:
            return True
        return cold is not None and cold.key != key and cold.order < order

    def _leave(self, request: Request) -> None:
        books = self._books
        books.running.remove(request)
        books.pages.release(request.pages)
        request.row, request.pages = -1, []
        if books.lanes.release(request.key):
            del books.promised[request.key]
            books.residency.release(books.copies(request.key))
            if request.key in books.waiting:
                self.settle(request.key)

    def _promise(self, key: LaneKey) -> None:
        if key not in self._books.promised:
            self._books.promised[key] = None
            self._books.residency.promise(self._books.copies(key))

    def _drop_promise(self, key: LaneKey) -> None:
        books = self._books
        if key in books.promised and key not in books.lanes and key not in books.waiting:
            del books.promised[key]
            books.residency.release(books.copies(key))

    def _grant_key(self, key: LaneKey, step: int) -> list[Fill] | None:
        books = self._books
        copies = books.copies(key)
        fills = self._grant_copies(copies, step)
        if fills is None:
            problem = books.residency.hopeless(copies, books.directory.pinned.values())
            if problem is None:
                return None
            self.fail_waiting(key, problem)
            return []
        self._promise(key)
        self.settle(key)
        return fills

    def _grant_wish(self, copy: Copy, step: int) -> list[Fill] | None:
        books = self._books
        fills = self._grant_copies([copy], step)
        if fills is None:
            problem = books.residency.hopeless([copy], books.directory.pinned.values())
            if problem is None:
                return None
            copy.wish = None
            books.rest(copy)
            books.tell(copy, error=problem)
            return []
        return fills

    def _grant_copies(self, copies: list[Copy], step: int) -> list[Fill] | None:
        """Pages for these, if evicting idle ones gives enough. Who lost its pages and is not on the host is on disk."""
        books = self._books
        for victim in books.residency.make_room(copies):
            books.counters.adapter_evictions += 1
            books.rest(victim)
            books.tell(victim)
            self.settle_copy(victim)
        fills = books.residency.grant(copies, step)
        if fills is not None:
            books.counters.adapter_fills += len(fills)
            self._filling(copies)
        return fills

    def _first_wish(self) -> Copy | None:
        books = self._books
        while books.wishes:
            copy = books.directory.copies.get(next(iter(books.wishes)))
            if copy is not None and copy.wish is not None and copy.can_fill:
                return copy
            del books.wishes[next(iter(books.wishes))]
        return None

    def _grant_unasked(self, step: int) -> list[Fill]:
        books = self._books
        fills: list[Fill] = []
        for copy_id in self._unasked:
            copy = books.directory.copies.get(copy_id)
            if copy is not None and copy.can_fill and copy.error is None and not copy.leaving:
                fills += books.residency.grant([copy], step) or []
                self._filling([copy])
        self._unasked.clear()
        books.counters.adapter_fills += len(fills)
        return fills

    def _filling(self, copies: list[Copy]) -> None:
        for copy in copies:
            self._books.rest(copy)
