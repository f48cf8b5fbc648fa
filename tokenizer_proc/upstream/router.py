"""Request ids and their receivers: Generate and Abort go out, Progress comes in and is handed to its receiver.

    stream --start--> id --Generate--> scheduler
    stream <--Update-- id <--Progress-- scheduler       an update for an id that is no longer open is dropped

Counts open requests and prompt tokens, and refuses more than the bounds; the refusal says what the open requests wait
for. When another scheduler takes over, `resubmit` tells it of every open request and the tokens it has, and messages of
the former scheduler are dropped. Knows nothing of text.
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

_IDS_BY_EPOCH = 1 << 40  # an id is never reused, not even after a restart

Receiver = Callable[[Update | EngineError], None]


class _OpenRequest(NamedTuple):
    """A request that may bring more updates: its Generate, the receiver of its updates, and the tokens it has."""

    message: Generate
    receiver: Receiver
    tokens: list[int]


class Router:
    """The open requests of this incarnation (`epoch`)."""

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
        """When the first request was sent since none was open (monotonic seconds)."""
        self._max_tokens = max_tokens
        self._reserved = self._tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """The number of requests that were sent and have not ended: they may still receive updates."""
        return len(self._requests)

    @contextlib.contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Holds room for `count` requests while entered. Raises Overloaded when there is none."""
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
        """Holds room for so many prompt tokens while entered; the first prompt always fits. Raises Overloaded."""
        if self._max_tokens is not None and self._tokens and self._tokens + tokens > self._max_tokens:
            bound = f"{self._max_tokens} is the bound (--max-queued-tokens)"
            raise self._full(f"{self._tokens} prompt tokens are open already and {bound}")
        self._tokens += tokens
        try:
            yield
        finally:
            self._tokens -= tokens

    async def wait_idle(self, seconds: float) -> bool:
        """Waits up to `seconds` until no request is reserved. Returns whether none is."""
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
    ) -> int:
        """Sends a Generate; returns its id. `receiver` gets updates until `stop`, and adds their tokens to `tokens`."""
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
        )
        self._send(message)
        if not self._requests:
            self.began = time.monotonic()
        self._requests[request_id] = _OpenRequest(message, receiver, tokens)
        return request_id

    def resubmit(self, scheduler: int) -> None:
        """Tells the scheduler of this incarnation, which knows nothing, of every open request."""
        self._scheduler = scheduler
        self.wait_reasons.forget()
        for request_id in list(self._requests):
            request = self._requests.get(request_id)
            if request is None:
                continue  # it ended with another choice of its call
            try:
                self._send(replace(request.message, generated=list(request.tokens)))
            except EngineError as error:  # with its tokens it is larger than a frame: its call alone fails
                self.stop(request_id, abort=False)
                request.receiver(error)

    def stop(self, request_id: int, abort: bool) -> None:
        """Forgets a request, and with `abort` tells the scheduler to; a second call does nothing."""
        if self._requests.pop(request_id, None) is not None and abort:
            self._send(Abort(self._epoch, request_id))

    def handle(self, progress: Progress) -> None:
        """Hands every update to its receiver; a fault in one ends that request alone. Older epochs are dropped."""
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
        """Takes over what waiting requests wait for."""
        listed = [self._requests.get(waiting.request_id) for waiting in stats.oldest_waiting]
        loras = {request.message.request_id: request.message.lora for request in listed if request is not None}
        self.wait_reasons.update(stats, self._newest, loras)

    def wait_of(self, request_id: int) -> RequestWait | None:
        """What a request waits for; None: it runs, is not open, or its reason is not known."""
        request = self._requests.get(request_id)
        return (
            None if request is None else self.wait_reasons.find(request_id, len(request.tokens), request.message.lora)
        )

    def lora(self, request_id: int) -> list[tuple[int, float]] | None:
        """The adapters of an open request; None: it is not open."""
        request = self._requests.get(request_id)
        return None if request is None else request.message.lora

    def _full(self, bound: str) -> Overloaded:
        waits = self.wait_reasons.summary()
        return Overloaded(f"{bound}: {waits}. Try again soon" if waits else f"{bound}: try again soon")

    def fail_all(self, error: EngineError) -> None:
        """Ends every open request with an error, without telling the scheduler."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.receiver(error)
