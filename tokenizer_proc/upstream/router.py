"""Request ids: which one is whose. Generate and Abort go out, Progress comes in and is handed to its receiver.

    stream --start--> id --Generate--> scheduler
    stream <--Update-- id <--Progress-- scheduler       an id that is not open any more is nobody's: dropped

Counts what is open and refuses more than the bound. When another scheduler takes over, `resubmit` tells it of all that
is open, with the tokens each request has; what the one before said last is dropped. A refusal says what those wait for
who are open. Knows nothing of text.
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

_IDS_BY_EPOCH = 1 << 40  # so that an id means one request, also after a restart

Receiver = Callable[[Update | EngineError], None]


class _Open(NamedTuple):
    """A request that may bring news: what was sent for it, who hears of it, and the tokens it has."""

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
        self._requests: dict[int, _Open] = {}
        self._scheduler = 0
        self.began = 0.0
        """When the first of the requests that are open began (monotonic seconds)."""
        self._max_tokens = max_tokens
        self._reserved = self._tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """How many requests may still bring news."""
        return len(self._requests)

    @contextlib.contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Room for `count` requests while entered. Raises Overloaded when there is none."""
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
        """Room for a prompt of so many tokens while entered. Raises Overloaded when there is none beside the others."""
        if self._max_tokens is not None and self._tokens and self._tokens + tokens > self._max_tokens:
            bound = f"{self._max_tokens} is the bound (--max-queued-tokens)"
            raise self._full(f"{self._tokens} prompt tokens are open already and {bound}")
        self._tokens += tokens
        try:
            yield
        finally:
            self._tokens -= tokens

    async def idle(self, seconds: float) -> bool:
        """Waits up to so many seconds until nothing is reserved; whether that came true."""
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
        """Sends a Generate; `receiver` hears of it until `stop`, and adds to `tokens` what comes. Returns its id."""
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
        self._requests[request_id] = _Open(message, receiver, tokens)
        return request_id

    def resubmit(self, scheduler: int) -> None:
        """The scheduler of this incarnation knows nothing: it is told of every open request."""
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
        """Forgets a request, and with `abort` tells the scheduler to forget it. Twice is harmless."""
        if self._requests.pop(request_id, None) is not None and abort:
            self._send(Abort(self._epoch, request_id))

    def handle(self, progress: Progress) -> None:
        """Hands every update to its receiver; a fault in one stays with it. An older incarnation's news are dropped."""
        if progress.epoch != self._epoch or progress.scheduler < self._scheduler:
            return
        for update in progress.updates:
            request = self._requests.get(update.request_id)
            if request is None:
                continue
            try:
                request.receiver(update)
            except Exception as error:
                log.exception("request %d: its news could not be taken", update.request_id)
                self.stop(update.request_id, abort=True)
                request.receiver(InternalError(f"the answer could not be made: {type(error).__name__}: {error}"))

    def look(self, stats: Stats) -> None:
        """A picture of who waits."""
        listed = [self._requests.get(waiting.request_id) for waiting in stats.oldest_waiting]
        loras = {request.message.request_id: request.message.lora for request in listed if request is not None}
        self.wait_reasons.take(stats, self._newest, loras)

    def wait(self, request_id: int) -> RequestWait | None:
        """What a request waits for; None: it runs, is not open, or nobody knows."""
        request = self._requests.get(request_id)
        return None if request is None else self.wait_reasons.of(request_id, len(request.tokens), request.message.lora)

    def lora(self, request_id: int) -> list[tuple[int, float]] | None:
        """What an open request runs through; None: it is not open."""
        request = self._requests.get(request_id)
        return None if request is None else request.message.lora

    def _full(self, bound: str) -> Overloaded:
        waits = self.wait_reasons.mostly()
        return Overloaded(f"{bound}: {waits}. Try again soon" if waits else f"{bound}: try again soon")

    def fail(self, error: EngineError) -> None:
        """Ends every open request with an error; the scheduler is not told."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.receiver(error)
