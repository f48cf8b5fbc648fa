"""The router of requests: sends Generate and Abort to the scheduler, and passes each update to its request's receiver.

    stream --start--> id --Generate--> scheduler
    stream <--Update-- id <--Progress-- scheduler       an update for an id that is no longer open is dropped

The router bounds the number of open requests and of their prompt tokens; the error beyond a bound says what the open
requests wait for. When another scheduler takes over, `resubmit` sends it every open request with the tokens generated
so far, and messages of the former scheduler are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from engine.errors import EngineError, InternalError, Overloaded
from engine.messages import Abort, Generate, Progress, Sampling, Stats, Stopping, Update
from tokenizer_proc.upstream.wait_reasons import RequestWait, WaitReasons

log = logging.getLogger(__name__)

_IDS_BY_EPOCH = 1 << 40  # ids of each epoch (restart of the process), so that an id is never reused after a restart

Receiver = Callable[[Update | EngineError], None]


class _OpenRequest(NamedTuple):
    """A request that may still receive updates: its Generate, its receiver, and the tokens generated so far."""

    message: Generate
    receiver: Receiver
    tokens: list[int]


class Router:
    """The open requests of this process. `epoch` grows with each restart of the process."""

    def __init__(
        self,
        send: Callable[[msgspec.Struct], None],
        epoch: int = 0,
        max_open: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        self._send = send
        self._epoch = epoch
        self._max_open = max_open
        self._ids = itertools.count(epoch * _IDS_BY_EPOCH + 1)
        self._newest = 0
        self.wait_reasons = WaitReasons()
        self._requests: dict[int, _OpenRequest] = {}
        self._scheduler = 0
        self.began = 0.0
        """The time at which the number of open requests last rose from 0 (monotonic seconds)."""
        self._max_tokens = max_tokens
        self._reserved = self._tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """The number of open requests: they were sent and have not ended, so they may still receive updates."""
        return len(self._requests)

    @contextlib.contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Reserves room for `count` requests while entered. Raises Overloaded if there is not enough room."""
        if self._reserved + count > self._max_open:
            raise self._full(f"{self._max_open} requests are open already, which is the bound (--max-open-requests)")
        self._reserved += count
        self._idle.clear()
        try:
            yield
        finally:
            self._reserved -= count
            if not self._reserved:
                self._idle.set()

    @contextlib.contextmanager
    def queued(self, tokens: int) -> Iterator[None]:
        """Reserves room for `tokens` prompt tokens while entered. Raises Overloaded if there is not enough room.

        While no other prompt is held, any prompt fits.
        """
        if self._max_tokens is not None and self._tokens and self._tokens + tokens > self._max_tokens:
            bound = f"{self._max_tokens} is the bound (--max-queued-tokens)"
            raise self._full(f"{self._tokens} prompt tokens are open already and {bound}")
        self._tokens += tokens
        try:
            yield
        finally:
            self._tokens -= tokens

    async def wait_idle(self, seconds: float) -> bool:
        """Waits up to `seconds` until no room is reserved for requests. Returns whether that was reached."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    def start(
        self,
        receiver: Receiver,
        tokens: list[int],
        *,
        prompt: list[int],
        lora: list[tuple[int, float]],
        sampling: Sampling,
        stopping: Stopping,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
    ) -> int:
        """Sends a Generate. Returns its request id.

        `receiver` is called with every update until `stop`; it must add the update's tokens to `tokens`.
        """
        request_id = self._newest = next(self._ids)
        message = Generate(
            epoch=self._epoch,
            request_id=request_id,
            prompt=prompt,
            lora=lora,
            sampling=sampling,
            stopping=stopping,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
        )
        self._send(message)
        if not self._requests:
            self.began = time.monotonic()
        self._requests[request_id] = _OpenRequest(message, receiver, tokens)
        return request_id

    def resubmit(self, scheduler: int) -> None:
        """Sends every open request, with the tokens generated so far, to the new scheduler of epoch `scheduler`."""
        self._scheduler = scheduler
        self.wait_reasons.forget()
        for request_id in list(self._requests):
            request = self._requests.get(request_id)
            if request is None:
                continue  # the request ended meanwhile, with a failed choice of the same submit
            try:
                self._send(replace(request.message, generated=list(request.tokens)))
            except EngineError as error:  # with its tokens the request exceeds a frame: only its submit fails
                self.stop(request_id, abort=False)
                request.receiver(error)

    def stop(self, request_id: int, abort: bool) -> None:
        """Removes a request, and with `abort` sends an Abort for it. Does nothing if the request is not open."""
        if self._requests.pop(request_id, None) is not None and abort:
            self._send(Abort(self._epoch, request_id))

    def handle(self, progress: Progress) -> None:
        """Passes every update to its request's receiver. An exception in a receiver ends only that request.

        Messages of another epoch of this process, or of a former scheduler, are dropped.
        """
        if progress.epoch != self._epoch or progress.scheduler < self._scheduler:
            return
        for update in progress.updates:
            request = self._requests.get(update.request_id)
            if request is None:
                continue
            try:
                request.receiver(update)
            except Exception as error:
                log.exception("request %d: its update could not be handled", update.request_id)
                self.stop(update.request_id, abort=True)
                request.receiver(InternalError(f"the answer could not be made: {type(error).__name__}: {error}"))

    def update_stats(self, stats: Stats) -> None:
        """Stores the reasons why requests wait, from new Stats."""
        listed = [self._requests.get(waiting.request_id) for waiting in stats.oldest_waiting]
        loras = {request.message.request_id: request.message.lora for request in listed if request is not None}
        self.wait_reasons.update(stats, self._newest, loras)

    def wait_of(self, request_id: int) -> RequestWait | None:
        """Returns what a request waits for, or None if it runs, is not open, or waits for an unknown reason."""
        request = self._requests.get(request_id)
        return (
            None if request is None else self.wait_reasons.find(request_id, len(request.tokens), request.message.lora)
        )

    def lora(self, request_id: int) -> list[tuple[int, float]] | None:
        """Returns the adapters of an open request, or None if the request is not open."""
        request = self._requests.get(request_id)
        return None if request is None else request.message.lora

    def _full(self, bound: str) -> Overloaded:
        waits = self.wait_reasons.summary()
        return Overloaded(f"{bound}: {waits}. Try again soon" if waits else f"{bound}: try again soon")

    def fail_all(self, error: EngineError) -> None:
        """Ends every open request with `error`, without sending Aborts to the scheduler."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.receiver(error)
