"""The stream of one submit: its choices, the queue of their deltas, and the release of everything the submit holds.

async with stream:             prepares the submit (refusals are raised here), holds its adapters, sends it
    async for delta in stream: deltas of all choices, interleaved; the last one of each has a finish reason
                               on leaving, the choices that have not finished are aborted
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import time
from collections.abc import Awaitable, Callable

import msgspec
from msgspec.structs import replace

from engine.errors import AdapterError, EngineError, InternalError
from engine.messages import Delta, FinishReason, Submit, Update
from tokenizer_proc.adapters.selection import AdapterSelection
from tokenizer_proc.requests.deadline import Deadline
from tokenizer_proc.requests.output_processor import OutputProcessor
from tokenizer_proc.requests.preparation import PreparedRequest
from tokenizer_proc.telemetry.metrics import Metrics
from tokenizer_proc.upstream.router import Router

Reserve = Callable[[int, int, int, int], int]
"""Charges a prompt: (prompt tokens, answers, least and most tokens of an answer) -> tokens that an answer may have."""


def page_salt(submit: Submit) -> str:
    """Returns the salt of the request's prefix pages: its tenant's, so that a client's own salt only divides further.

    With a salt of the client's it is a hash of both, because no way of joining two texts is safe from a third one.
    """
    if not submit.cache_salt:
        return submit.tenant
    return hashlib.sha256(msgspec.json.encode([submit.tenant, submit.cache_salt])).hexdigest()


class _RunningChoice:
    """A choice that was sent to the scheduler: its output processor, its request id, the times of its tokens.

    `prefill` are the seconds from its row to its first token.
    """

    def __init__(self, processor: OutputProcessor) -> None:
        self.processor = processor
        self.request_id = 0
        self.sent = time.monotonic()
        self.first: float | None = None
        self.last: float | None = None
        self.prefill = 0.0


class Stream:
    """An async iterator over the deltas of one submit, made by Frontend.open. `prompt_ids` is set on entering."""

    def __init__(
        self,
        submit: Submit,
        prepare: Callable[[Submit], Awaitable[PreparedRequest]],
        router: Router,
        metrics: Metrics,
        deadline: Deadline | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        self.prompt_ids: list[int] = []
        self._submit = submit
        self._prepare = prepare
        self._router = router
        self._metrics = metrics
        self._selection = AdapterSelection()
        self._queue: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        self._running: list[_RunningChoice] = []
        self._unread = 0  # choices whose last delta has not been read yet
        self._unfinished = 0  # choices whose last delta has not been made yet
        self._cancelled = False
        self._failed = False
        self._deadline = deadline or Deadline()
        self._reserve = reserve
        self._release = contextlib.ExitStack()

    async def __aenter__(self) -> Stream:
        try:
            self._release.enter_context(self._router.reserved(1))
            async with self._deadline.kept():
                prepared = self._reserved(await self._prepare(self._submit))
            self._release.enter_context(self._router.reserved(prepared.params.n - 1))
            self._release.enter_context(self._router.queued(len(prepared.prompt_ids) * prepared.params.n))
            self._release.enter_context(prepared.selection.held(prepared.params.n))
            self._start(prepared)
            left = self._deadline.left
            if left is not None:
                late = asyncio.get_running_loop().call_later(left, self._expire)
                self._release.callback(late.cancel)
        except BaseException as error:
            self._close()
            if isinstance(error, EngineError):
                self._metrics.failed(error.kind)
            raise
        if self._cancelled:
            self.cancel()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._close()

    def __aiter__(self) -> Stream:
        return self

    @property
    def request_ids(self) -> list[int]:
        """The scheduler's request ids of the choices."""
        return [running.request_id for running in self._running]

    async def __anext__(self) -> Delta:
        if not self._unread:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, EngineError):
            self._unread = 0
            raise item
        if item.finish_reason is not None:
            self._unread -= 1
        return item

    def cancel(self) -> None:
        """Ends the unfinished choices with finish reason abort. May be called before the stream is entered."""
        self._cancelled = True
        for running in [] if self._failed else self._running:
            if running.processor.finish is None:
                self._router.stop(running.request_id, abort=True)
                self._tell(running, running.processor.abort())

    def _start(self, prepared: PreparedRequest) -> None:
        params, self.prompt_ids, self._selection = prepared.params, prepared.prompt_ids, prepared.selection
        for index in range(params.n):
            sampling = params.sampling_of(index)
            running = _RunningChoice(
                OutputProcessor(
                    self._submit.id,
                    index,
                    self.prompt_ids,
                    params.text,
                    prepared.tokenizer,
                    scores_prompt=sampling.prompt_logprobs >= 0,
                )
            )
            running.request_id = self._router.start(
                functools.partial(self._receive, running),
                running.processor.generated,
                prompt=self.prompt_ids,
                lora=self._selection.lora,
                sampling=sampling,
                stopping=params.stopping,
                priority=self._submit.priority,
                cache_salt=page_salt(self._submit),
                tenant=self._submit.tenant,
            )
            self._running.append(running)
            self._unread += 1
            self._unfinished += 1
        self._metrics.began(self._selection.names, len(self.prompt_ids) * params.n)

    def _reserved(self, prepared: PreparedRequest) -> PreparedRequest:
        """Returns the request after its tokens were reserved, with shorter answers if `reserve` allows only these."""
        if self._reserve is None:
            return prepared
        params = prepared.params
        most = params.stopping.max_tokens
        least = most if self._submit.params.max_tokens is not None else max(1, params.stopping.min_tokens)
        length = self._reserve(len(prepared.prompt_ids), params.n, least, most)
        return replace(prepared, params=replace(params, stopping=replace(params.stopping, max_tokens=length)))

    def _close(self) -> None:
        try:
            for running in self._running:
                self._router.stop(running.request_id, abort=running.processor.finish is None)
        finally:
            self._release.close()

    def _receive(self, running: _RunningChoice, update: Update | EngineError) -> None:
        """Handles an update of one choice, or the error that ends the choice. The router calls this."""
        if isinstance(update, EngineError):
            self._fail(update)
            return
        if update.error is not None:
            self._router.stop(running.request_id, abort=False)
            self._fail(self._refusal(update.error, update.code))
            return
        try:
            delta = running.processor.process(update)
        except InternalError as error:
            self._fail(error)
            return
        if delta is None:
            return
        self._measure(running, update, len(delta.token_ids))
        if delta.finish_reason is not None:
            self._router.stop(running.request_id, abort=update.finish is None)
        self._tell(running, delta)

    def _refusal(self, reason: str, code: str | None) -> EngineError:
        """Returns the error for a request that the scheduler gave up for `reason`.

        Without a `code` the reason is the request's adapters, if it has any; everything else is an InternalError.
        """
        if code is not None:
            return InternalError(reason, code=code)
        names = " + ".join(f"`{name}`" for name in self._selection.names)
        return AdapterError(f"adapter {names}: {reason}", param="lora_path") if names else InternalError(reason)

    def _measure(self, running: _RunningChoice, update: Update, tokens: int) -> None:
        """Records the times of new tokens. `tokens` is how many of them are part of the output."""
        if not update.tokens:
            return
        now = time.monotonic()
        if running.last is None:
            running.first, running.prefill = now, max(0.0, now - running.sent - update.queued)
            self._metrics.first_token(now - self._deadline.arrived, update.queued, running.prefill)
        elif tokens:
            self._metrics.next_token((now - running.last) / tokens)
        running.last = now
        self._metrics.generated(self._selection.names, tokens)

    def _tell(self, running: _RunningChoice, delta: Delta) -> None:
        if delta.finish_reason is not None:
            self._measure_end(running, delta.finish_reason)
        self._queue.put_nowait(delta)

    def _measure_end(self, running: _RunningChoice, reason: FinishReason) -> None:
        self._metrics.finished(reason, time.monotonic() - self._deadline.arrived)
        if running.first is not None and running.last is not None:
            decode = running.last - running.first
            self._metrics.choice_ended(len(running.processor.generated), running.prefill, decode)
        self._unfinished -= 1
        if not self._unfinished:
            longest = max(len(each.processor.generated) for each in self._running)
            self._metrics.request_ended(len(self.prompt_ids), longest)

    def _expire(self) -> None:
        """Ends the submit with TimedOut, unless all its choices have finished."""
        late = [running for running in self._running if running.processor.finish is None]
        if late:
            self._fail(self._deadline.missed(self._progress(late)))

    def _progress(self, late: list[_RunningChoice]) -> str:
        """Returns sentences that say how many tokens were generated and, if known, what the `late` choices wait for."""
        tokens = sum(len(running.processor.generated) for running in self._running)
        generated = f"{tokens or 'No'} {'tokens' if tokens > 1 else 'token'} had been generated"
        waits = [wait for running in late if (wait := self._router.wait_of(running.request_id)) is not None]
        if not waits:
            return generated
        wait = max(waits, key=lambda wait: wait.seconds or 0.0)
        since = "" if wait.seconds is None else f", after {wait.seconds:.1f} s in the queue,"
        return f"{generated}. It still waited{since} for {self._router.wait_reasons.describe(wait.reason)}"

    def _fail(self, error: EngineError) -> None:
        """Ends the whole submit with `error` and aborts its choices. Does nothing if the submit has failed before."""
        if self._failed:
            return
        self._failed = True
        for running in self._running:
            self._router.stop(running.request_id, abort=True)
        self._metrics.failed(error.kind)
        self._queue.put_nowait(error)
