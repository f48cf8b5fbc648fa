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
from scheduler.state import SchedulerState
from scheduler.types import BASE, LaneKey, Order
from scheduler.unloader import Unloader

MAX_SCALE = 1e38  # float32 holds any sum of them


class Admission:
    """The doors of the queue and of the running set, over the books."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self.unloader = Unloader(state)

    # ---------------------------------------------------------------------------------------------------- requests

    def arrive(self, message: Generate) -> None:
        """Queues a new request, or ends it at once where it can never be served."""
        state = self._state
        problem = self._selection_error(message.lora)
        key = state.registry.key(message.lora) if problem is None else BASE
        request = from_message(message, key, state.order_on_arrival(message))
        problem = problem or self._unservable_reason(request.key) or fit_to_capacity(request, state.capacity)
        if problem is not None:
            state.updates.append(Update(request_id=request.id, index=request.generated, error=problem))
            state.ordering.on_end(request)
            return
        self._locate_invocation(request)
        for adapter_id in request.adapter_ids:
            state.registry.adapters[adapter_id].requests += 1
        for copy in state.copies(request.key):
            copy.requests += 1
            state.counters.adapter_hits += copy.device is Device.RESIDENT
        state.requests[request.id] = request
        self._enqueue(request)
        if not request.done and (finish := finish_of(request)) is not None:  # a replay that had its last token
            self.end(request, finish=finish[0], stop_reason=finish[1])

    def admit(self, request: Request) -> bool:
        """Gives a waiting request whose turn it is a row, a lane and pages for all its tokens; true if the lane is new.

        There must be a row and pages, and a lane unless its key holds one; its copies must be resident.
        """
        state = self._state
        key = request.key
        request.lane, new = state.lanes.acquire(key, state.now)
        state.waiting.remove(request)
        if new:
            state.device_cache.use(state.copies(key))
            if key in state.waiting:
                state.waiting.set_state(key, WaitState.ACTIVE, state.now)
        state.running.add(request)
        state.kv.allocate(request, state.owner(key))
        state.ordering.on_admitted(request)
        if not request.admitted:
            request.admitted = True
            request.cached = min(request.computed, request.prompt_length)
            state.counters.cached_tokens += request.cached
            state.counters.prompt_tokens += request.prompt_length
        return new

    def preempt(self, request: Request, order: Order | None = None) -> None:
        """Takes a running request back to the queue, in its old order or a new one; it keeps its tokens."""
        self._state.counters.preemptions += 1
        self._release_row(request)
        request.order = request.order if order is None else order
        request.reset_progress()
        self._enqueue(request)

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
        state = self._state
        request.done = True
        del state.requests[request.id]
        if update:
            index = request.generated
            state.updates.append(
                Update(
                    request_id=request.id, index=index, finish=finish, stop_reason=stop_reason, error=error, code=code
                )
            )
        state.blame.forget(request.id)
        if request.row >= 0:
            self._release_row(request)
        else:
            state.waiting.remove(request)
        state.ordering.on_end(request)
        for copy in state.copies(request.key):
            copy.requests -= 1
            copy.last_used = state.tick()
            state.reclassify(copy)
        for adapter in [state.registry.adapters[adapter_id] for adapter_id in request.adapter_ids]:
            adapter.requests -= 1
            self.unloader.unload_if_drained(adapter)

    def fail_copy(self, copy: Copy, reason: str, final: bool = True) -> None:
        """The copy cannot be served, for good or (not `final`) until the next request: nor can who names it now."""
        state = self._state
        copy.preload_order = None
        if final:
            copy.error = reason
            state.drop_revision(copy)
        state.reclassify(copy)
        for request in [r for r in state.running.ordered if any(c == copy.id for c, _ in r.key)]:
            self.end(request, error=reason)
        for key in state.waiting.keys_of(copy.id):
            self.fail_waiting(key, reason)
        if copy.is_unloading or not copy.names:
            return  # the last of them let it go
        if final:
            state.device_cache.free(copy)
            if copy.host is Host.HELD:  # we refuse it: the runner has it still
                state.host_cache.evict(copy)
                state.outbox.append(EvictAdapter(copy.runner_id))
        state.report(copy, error=reason)
        self.unloader.unload_drained(copy)

    def fail_waiting(self, key: LaneKey, problem: str) -> None:
        """Ends the waiting requests of a key."""
        for request in self._state.waiting.requests(key):
            self.end(request, error=problem)

    # ------------------------------------------------------------------------------------------------------ places

    def update_wait_state(self, key: LaneKey) -> None:
        """Finds out what a waiting key waits for; ends its requests where that will never come."""
        state = self._state
        if key == BASE or key in state.lanes:
            state.waiting.set_state(key, WaitState.DRAINING if key in state.draining else WaitState.ACTIVE, state.now)
            return
        copies = state.copies(key)
        problem = self._unservable_reason(key)
        if problem is not None:
            self.fail_waiting(key, problem)
        elif any(copy.to_load for copy in copies):
            state.waiting.set_state(key, WaitState.DISK, state.now)
            state.loads_due = True
        elif any(copy.device is Device.NONE and copy.host is not Host.HELD for copy in copies):
            state.waiting.set_state(key, WaitState.BLOCKED, state.now)
        elif any(copy.device is Device.NONE for copy in copies):
            state.waiting.set_state(key, WaitState.COLD, state.now)
        else:
            filling = any(copy.device is Device.FILLING for copy in copies)
            state.waiting.set_state(key, WaitState.BLOCKED if filling else WaitState.READY, state.now)

    def update_wait_states(self, copy: Copy) -> None:
        """The same for every waiting key that names the copy."""
        for key in self._state.waiting.keys_of(copy.id):
            if key in self._state.waiting:
                self.update_wait_state(key)

    def withdraw(self, copy: Copy) -> list[Request]:
        """Takes everyone who waits for the copy out of the queue, for `rekey`."""
        state = self._state
        requests = [request for key in state.waiting.keys_of(copy.id) for request in state.waiting.requests(key)]
        for request in requests:
            state.waiting.remove(request)
            for each in state.copies(request.key):
                each.requests -= 1
                state.reclassify(each)
        return requests

    def rekey(self, requests: list[Request]) -> None:
        """More is known of their adapters: these requests, taken from the queue, go where they wait from now on."""
        registry = self._state.registry
        for request in requests:
            request.key = registry.key(request.lora)
            self._locate_invocation(request)
            for copy in registry.of(request.key):
                copy.requests += 1
            self._state.waiting.push(request)
            for copy in registry.of(request.key):
                self._state.reclassify(copy)
        for key in {request.key: None for request in requests}:
            if key in self._state.waiting:
                self.update_wait_state(key)

    def set_draining(self, key: LaneKey, draining: bool) -> None:
        """A lane takes nobody any more until it is free, or takes requests again."""
        state = self._state
        if draining:
            state.draining[key] = None
        else:
            state.draining.pop(key, None)
        if key in state.waiting:
            self.update_wait_state(key)

    def restart(self) -> None:
        """A new runner: every waiting request is measured against it, and every key finds its place again."""
        state = self._state
        for request in list(state.waiting):
            problem = fit_to_capacity(request, state.capacity)
            if problem is not None:
                self.end(request, error=problem)
            elif (finish := finish_of(request)) is not None:
                self.end(request, finish=finish[0], stop_reason=finish[1])
        for key in state.waiting.lane_keys():
            self.update_wait_state(key)

    # ----------------------------------------------------------------------------------------------------- private

    def _enqueue(self, request: Request) -> None:
        request.queued_at = self._state.now
        self._state.waiting.push(request)
        for copy in self._state.copies(request.key):
            self._state.reclassify(copy)
        self.update_wait_state(request.key)

    def _locate_invocation(self, request: Request) -> None:
        """Finds where its activated adapter begins to act, if that is known. One that never does is not needed."""
        copies = self._state.copies(request.key)
        if len(copies) == 1 and (invocation := copies[0].info.invocation):
            request.invocation_start = find_invocation(request.tokens[: request.prompt_length], invocation)
            if request.invocation_start is None:
                request.key = BASE

    def _selection_error(self, lora: list[tuple[int, float]]) -> str | None:
        """Why a selection cannot be looked up."""
        state = self._state
        if not sum(abs(scale) for _, scale in lora) <= MAX_SCALE:  # also what is not a number
            return f"the scales of the adapters must be finite, and add up to at most {MAX_SCALE:g}"
        for adapter_id, _ in lora:
            adapter = state.registry.adapters.get(adapter_id)
            if adapter_id and not state.lanes.count:
                return "LoRA is not enabled; start with --enable-lora"
            if adapter_id and adapter is None:
                return f"adapter {adapter_id} is not loaded; load it first"
            if adapter is not None and adapter.draining:
                return f"adapter {adapter_id} is being unloaded"
        return None

    def _unservable_reason(self, key: LaneKey) -> str | None:
        """Why a key can never be served, judging by what is known now."""
        state = self._state
        if key == BASE:
            return None
        copies = state.copies(key)
        problem = state.device_cache.limit_error(copies)
        if len(copies) > 1 and any(copy.info.invocation for copy in copies):
            problem = (
                "an adapter that acts from its invocation on (alora_invocation_tokens) cannot be mixed with others"
            )
        if problem is None and not all(copy.on_device for copy in copies):
            problem = state.host_cache.limit_error(copies)
        return problem

    def _release_row(self, request: Request) -> None:
        state = self._state
        state.running.remove(request)
        state.kv.release(request)
        request.row = -1
        if state.lanes.release(request.key):
            state.draining.pop(request.key, None)
            state.device_cache.leave(state.copies(request.key))
            if request.key in state.waiting:
                self.update_wait_state(request.key)
