"""The choices of one call: opens its submits together, merges their deltas, and collects the output so far.

    prompts   P0          P1            submits, in order
    choices   0   1   2   3   4   5     numbered prompt-major: submit 0 has n = 3, submit 1 too

Every dialect uses it, streaming or not. A submit's place in the call is its item number.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from types import TracebackType

from engine.messages import Delta, FinishReason, Submit, Usage
from tokenizer_proc.frontend import Frontend, Stream
from tokenizer_proc.requests.deadline import Deadline
from tokenizer_proc.requests.packed_logprobs import PackedLogprobs, entries
from tokenizer_proc.requests.stream import Reserve
from tokenizer_proc.work.queue import Abandoned

AT_ONCE = 64  # the streams that are begun or left at once
TOKEN_BYTES = 40  # bytes of memory for one token id in a list
ENTRY_BYTES = 300  # bytes of memory for one token with its log-probability, packed and then written
HOLD_STEP = 32 << 10  # bytes of output for which memory is asked at once
LARGE = 2048  # the number of tokens with log-probabilities above which an event or a body takes long to write


class Prompt:
    """One submit's prompt as token ids, with its log-probabilities, which arrive in pieces if they were requested."""

    def __init__(self, token_ids: list[int], check: Callable[[], None]) -> None:
        self.token_ids = token_ids
        self.scored = PackedLogprobs(check)
        self._ended = False

    @property
    def logprobs(self) -> PackedLogprobs | None:
        """The log-probabilities of every position, or None until all have arrived."""
        return self.scored if self.scored and len(self.scored) == len(self.token_ids) else None

    @property
    def awaits_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt may still arrive, provided that they were requested."""
        return self.logprobs is None and not self._ended

    def add(self, delta: Delta) -> None:
        """Adds a delta's log-probabilities of the prompt. Only deltas of the first choice have any."""
        if delta.prompt_logprobs:
            self.scored.add(delta.prompt_logprobs)
        self._ended = self._ended or (delta.index == 0 and delta.finish_reason is not None)


class Choice:
    """The output of one choice so far.

    `number` is the choice's place in the whole call, `index` its place in its submit, `item` the submit's number.
    """

    def __init__(self, number: int, index: int, item: int, prompt: Prompt, check: Callable[[], None]) -> None:
        self.number = number
        self.index = index
        self.item = item
        self.prompt = prompt
        self.deltas = 0
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs = PackedLogprobs(check)
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        """Appends the output of `delta` to this choice."""
        self.deltas += 1
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs:
            self.logprobs.add(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.stop_reason is not None else self.stop_reason
        self._usage = delta.usage or self._usage

    @property
    def usage(self) -> Usage:
        """The usage that the last delta reports; until that arrives, counted from the output so far."""
        return self._usage or Usage(len(self.prompt.token_ids), len(self.token_ids))


class Batch:
    """The streams of all submits of one call. Entering it opens the streams, leaving it releases everything.

    `hold` is called with the bytes by which the output grows, and may raise an EngineError that ends the call.

    Use: `async with Batch(...) as batch: async for choice, delta in batch.deltas(): ...`
    """

    def __init__(
        self,
        frontend: Frontend,
        submits: Sequence[Submit],
        deadline: Deadline | None = None,
        hold: Callable[[int], None] = lambda count: None,
        reserve: Reserve | None = None,
    ) -> None:
        self._frontend = frontend
        self._reserve = reserve
        self._hold = hold
        self._grown = 0  # bytes of output since the last call of `hold`
        self._deadline = deadline or frontend.deadline()
        self.submits = submits
        self._streams: list[Stream] = []
        self._stack = contextlib.AsyncExitStack()
        self.prompts: list[Prompt] = []
        self.choices: list[Choice] = []
        self._of_item: list[list[Choice]] = []
        self._unwritten = 0  # the number of tokens with log-probabilities that arrived since `mark_written`
        self._is_left = False

    async def __aenter__(self) -> Batch:
        async with self._stack:
            self._frontend.check_size(sum(submit.params.n for submit in self.submits))
            for item, submit in enumerate(self.submits):
                await asyncio.sleep(0)  # encoding many prompts must not stall the event loop's streams
                stream = await self._stack.enter_async_context(
                    self._frontend.open(submit, self._deadline, self._reserve)
                )
                self._streams.append(stream)
                self._hold(TOKEN_BYTES * len(stream.prompt_ids))
                self._add_prompt(item, Prompt(stream.prompt_ids, self.check), submit.params.n)
                if item % AT_ONCE == AT_ONCE - 1:
                    self._stack.push_async_callback(asyncio.sleep, 0)  # leaving many streams must not stall it either
            self._stack = self._stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left = True
        await self._stack.__aexit__(kind, error, trace)

    def check(self) -> None:
        """Raises Abandoned if the batch was left, so that a thread which still writes its output ends."""
        if self._is_left:
            raise Abandoned

    def cancel(self, items: Iterable[int]) -> None:
        """Ends the unfinished choices of the submits `items` with finish reason abort."""
        for item in items:
            self._streams[item].cancel()

    def request_ids(self, items: Iterable[int]) -> list[int]:
        """Returns the scheduler's request ids of all choices of the submits `items`."""
        return [request_id for item in items for request_id in self._streams[item].request_ids]

    async def finish(self) -> None:
        """Waits until every choice has received its last delta."""
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for _ in deltas:
                pass

    async def deltas(self) -> AsyncGenerator[tuple[Choice, Delta], None]:
        """Yields every delta with its choice, after adding the delta to the choice.

        Deltas that have only log-probabilities of the prompt are added to the prompt and not yielded. Raises the first
        error of any stream.
        """
        async with contextlib.aclosing(self._merged()) as merged:
            async for item, delta in merged:
                choice = self._of_item[item][delta.index]
                choice.prompt.add(delta)
                scored = entries(delta.prompt_logprobs or ()) + entries(delta.logprobs or ())
                self._unwritten += scored
                self._grow(ENTRY_BYTES * scored + TOKEN_BYTES * len(delta.token_ids) + 4 * len(delta.text))
                if delta.prompt_logprobs is None or delta.token_ids or delta.finish_reason is not None:
                    choice.add(delta)
                    yield choice, delta

    def _grow(self, count: int) -> None:
        self._grown += count
        if self._grown >= HOLD_STEP:
            self._hold(self._grown)
            self._grown = 0

    @property
    def is_large(self) -> bool:
        """Whether what arrived since `mark_written` may take long to write."""
        return self._unwritten > LARGE

    def mark_written(self) -> None:
        """Records that all output so far has been written."""
        self._unwritten = 0

    def usage(self) -> Usage:
        """Returns the usage of the whole call: the completion tokens of every choice, and each prompt's tokens once.

        Of a call that could not be entered, only the prompts that were sent count.
        """
        firsts = [choices[0].usage for choices in self._of_item]
        return Usage(
            sum(usage.prompt_tokens for usage in firsts),
            sum(choice.usage.completion_tokens for choice in self.choices),
            sum(usage.cached_tokens for usage in firsts),
        )

    def _add_prompt(self, item: int, prompt: Prompt, n: int) -> None:
        choices = [Choice(len(self.choices) + index, index, item, prompt, self.check) for index in range(n)]
        self.prompts.append(prompt)
        self._of_item.append(choices)
        self.choices += choices

    async def _merged(self) -> AsyncGenerator[tuple[int, Delta], None]:
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                yield 0, delta
            return
        inbox: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()
        pumps: list[asyncio.Task[None]] = []
        try:
            for item, stream in enumerate(self._streams):
                pumps.append(asyncio.create_task(_pump(item, stream, inbox)))
                if item % AT_ONCE == AT_ONCE - 1:
                    await asyncio.sleep(0)
            running = len(pumps)
            while running:
                item, received = await inbox.get()
                if received is None:
                    running -= 1
                elif isinstance(received, BaseException):
                    raise received
                else:
                    yield item, received
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(item: int, stream: Stream, inbox: asyncio.Queue[tuple[int, Delta | BaseException | None]]) -> None:
    """Puts one stream's deltas into `inbox`, and at the end None or the error that ended the stream."""
    try:
        async for delta in stream:
            inbox.put_nowait((item, delta))
    except Exception as error:
        inbox.put_nowait((item, error))
    else:
        inbox.put_nowait((item, None))
