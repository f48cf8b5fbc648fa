"""Queues, admits, preempts and ends requests. Does not decide which request is admitted or preempted.

arrive --> waiting: DISK (its adapter must be loaded) --> BLOCKED (adapter loads) --> COLD (needs rank pages)
                                          --> BLOCKED (adapter is filled) --> READY (needs a lane) --> ACTIVE (has one)
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.messages import EvictAdapter, FinishReason, Generate, Update
from scheduler.adapters.copies import AdapterCopy, DeviceState, HostState
from scheduler.admission import wait_states
from scheduler.admission.unloader import Unloader
from scheduler.requests.alora import find_invocation
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request, from_message
from scheduler.requests.stopping import finish_of, fit_to_capacity
from scheduler.state import SchedulerState
from scheduler.types import BASE, LaneKey, Order


class Admission:
    """Moves requests between the queue, the running rows and their end, and keeps their wait states current."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self.unloader = Unloader(state)

    # ---------------------------------------------------------------------------------------------------- requests

    def arrive(self, message: Generate) -> None:
        """Queues a new request, or ends it at once with an error if it can never be served."""
        state = self._state
        error = wait_states.selection_error(state, message.lora)
        key = state.registry.key(message.lora) if error is None else BASE
        request = from_message(message, key, state.order_on_arrival(message))
        error = error or wait_states.unservable_reason(state, request.key) or fit_to_capacity(request, state.capacity)
        if error is not None:
            state.updates.append(Update(request_id=request.id, index=request.generated, error=error))
            state.ordering.on_end(request)
            return
        self._locate_invocation(request)
        state.registry.acquire_names(request.adapter_ids)
        for copy in state.registry.acquire(request.key):
            state.counters.adapter_hits += copy.device.state is DeviceState.RESIDENT
        state.requests[request.id] = request
        self._enqueue(request)
        if not request.done and (finish := finish_of(request)) is not None:  # sent again with all its tokens
            self.end(request, finish=finish[0], stop_reason=finish[1])

    def admit(self, request: Request) -> bool:
        """Gives a waiting request a row, a lane, and KV pages for all its tokens. Returns whether the lane is new.

        A row and the pages must be free, and a lane unless the request's key holds one. Its copies must be resident.
        """
        state = self._state
        key = request.key
        request.lane, is_new = state.lanes.acquire(key, state.now)
        state.waiting.remove(request)
        if is_new:
            for copy in state.device_cache.acquire(state.copies(key)):
                state.device_cache.reclassify(copy)
            if key in state.waiting:
                state.waiting.set_state(key, WaitState.ACTIVE, state.now)
        state.running.add(request)
        state.kv.allocate(request, state.owner(key))
        state.ordering.on_admitted(request)
        if not request.admitted:
            request.admitted = True
            request.queued = max(0.0, state.now - request.queued_at)
            request.cached = min(request.computed, request.prompt_length)
            state.counters.cached_tokens += request.cached
            state.counters.prompt_tokens += request.prompt_length
        return is_new

    def preempt(self, request: Request, order: Order | None = None) -> None:
        """Puts a running request back into the queue at `order` (None: its old order). It keeps its tokens."""
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
        """Ends a running or waiting request and frees all it held.

        `update`: sends an Update with `finish`, `stop_reason`, `error` and `code` to the tokenizer process.
        """
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
        state.reclassify(state.registry.release(request.key, ended=True))
        for adapter in state.registry.release_names(request.adapter_ids):
            self.unloader.unload_if_drained(adapter)

    def fail_copy(self, copy: AdapterCopy, reason: str, final: bool = True) -> None:
        """Ends all requests that need a copy, with the error `reason`, and reports the copy's state.

        `final`: the copy can never be served, and is evicted. Otherwise the next request for it loads it again.
        """
        state = self._state
        state.registry.set_preload(copy, None)
        if final:
            state.registry.set_error(copy, reason)
            state.drop_revision(copy)
        state.reclassify([copy])
        for request in [r for r in state.running.ordered if any(copy_id == copy.id for copy_id, _ in r.key)]:
            self.end(request, error=reason)
        for key in state.waiting.keys_of(copy.id):
            self.fail_waiting(key, reason)
        if copy.is_unloading or not copy.names:
            return  # the end of the last of these requests unloaded the copy
        if final:
            self._evict_failed(copy)
        state.report(copy, error=reason)
        self.unloader.unload_drained(copy)

    def fail_waiting(self, key: LaneKey, error: str) -> None:
        """Ends the waiting requests of a key with this error."""
        for request in self._state.waiting.requests(key):
            self.end(request, error=error)

    # ----------------------------------------------------------------------------------------------- wait states

    def changed(self, copies: Iterable[AdapterCopy], *, report: bool = False, seconds: float = 0.0) -> None:
        """Updates what depends on the host or device state of these copies, after it has changed.

        Updates their places in both caches and the wait states of their keys. `report`: also reports the copies' states
        to the tokenizer process, with `seconds`. The code that changes a copy calls this once.
        """
        for copy in copies:
            self._state.reclassify([copy])
            if report:
                self._state.report(copy, seconds)
            for key in self._state.waiting.keys_of(copy.id):
                if key in self._state.waiting:
                    self.update_wait_state(key)

    def update_wait_state(self, key: LaneKey) -> None:
        """Sets the wait state of a waiting key, or ends the key's waiting requests if they can never be served."""
        state = self._state
        active = key == BASE or key in state.lanes
        error = None if active else wait_states.unservable_reason(state, key)
        if error is not None:
            self.fail_waiting(key, error)
            return
        wait_state = wait_states.wait_state(state, key)
        state.waiting.set_state(key, wait_state, state.now)
        if wait_state is WaitState.DISK:
            state.loads_due = True

    def withdraw(self, copy: AdapterCopy) -> list[Request]:
        """Takes all waiting requests that need the copy out of the queue and returns them, to be passed to `rekey`."""
        state = self._state
        requests = [request for key in state.waiting.keys_of(copy.id) for request in state.waiting.requests(key)]
        for request in requests:
            state.waiting.remove(request)
            state.reclassify(state.registry.release(request.key, ended=False))
        return requests

    def rekey(self, requests: list[Request]) -> None:
        """Queues withdrawn requests again, each under the lane key that its adapters have now."""
        state = self._state
        for request in requests:
            request.key = state.registry.key(request.lora)
            self._locate_invocation(request)
            copies = state.registry.acquire(request.key)
            state.waiting.push(request)
            state.reclassify(copies)
        for key in {request.key: None for request in requests}:
            if key in state.waiting:
                self.update_wait_state(key)

    def set_draining(self, key: LaneKey, draining: bool) -> None:
        """Makes a lane admit no more requests until it is free (`draining` True), or makes it admit requests again."""
        state = self._state
        if draining:
            state.draining[key] = None
        else:
            state.draining.pop(key, None)
        if key in state.waiting:
            self.update_wait_state(key)

    def runner_replaced(self) -> None:
        """Fits every waiting request to the new runner's capacity, and updates all wait states."""
        state = self._state
        for request in list(state.waiting):
            error = fit_to_capacity(request, state.capacity)
            if error is not None:
                self.end(request, error=error)
            elif (finish := finish_of(request)) is not None:
                self.end(request, finish=finish[0], stop_reason=finish[1])
        for key in state.waiting.lane_keys():
            self.update_wait_state(key)

    # ----------------------------------------------------------------------------------------------------- private

    def _enqueue(self, request: Request) -> None:
        request.queued_at = self._state.now
        self._state.waiting.push(request)
        self._state.reclassify(self._state.copies(request.key))
        self.update_wait_state(request.key)

    def _locate_invocation(self, request: Request) -> None:
        """Finds the position from which the request's activated adapter (aLoRA) acts, if it has one that was loaded.

        If the adapter's invocation is not in the prompt, the request runs on the base model.
        """
        copies = self._state.copies(request.key)
        if len(copies) == 1 and (invocation := copies[0].info.invocation):
            request.invocation_start = find_invocation(request.tokens[: request.prompt_length], invocation)
            if request.invocation_start is None:
                request.key = BASE

    def _release_row(self, request: Request) -> None:
        """Frees the request's row, KV pages and place in its lane. The caller reclassifies the copies of its key."""
        state = self._state
        state.running.remove(request)
        state.kv.release(request)
        request.row = -1
        if state.lanes.release(request.key):
            state.draining.pop(request.key, None)
            state.device_cache.release(state.copies(request.key))
            if request.key in state.waiting:
                self.update_wait_state(request.key)

    def _evict_failed(self, copy: AdapterCopy) -> None:
        """Frees the rank pages of a failed copy, and evicts it from host memory if it is held there."""
        state = self._state
        changed = state.device_cache.free([copy])
        if copy.host.state is HostState.HELD:
            state.host_cache.evict([copy])
            state.outbox.append(EvictAdapter(copy.runner_id))
            changed = [copy]
        state.reclassify(changed)
