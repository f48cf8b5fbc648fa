"""Well-typed nonsense from the scheduler: the tokenizer process continues, and no client gets tokens of another one."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
from fixtures.adapters.mutations import Mutator
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine.errors import EngineError
from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    Footprint,
    Generate,
    Hello,
    LogprobIds,
    Progress,
    SamplingParams,
    Stats,
    Submit,
    ToTokenizer,
    Update,
)
from tokenizer_proc.frontend import Frontend

CASES, AT_ONCE = 10_000, 12
CAPACITY = Capacity(
    kv_pages=64, page_size=16, rows=8, max_length=512, max_batched_tokens=64, vocab_size=258, max_loras=4,
    max_lane_pages=8,
)  # fmt: skip


class SilentScheduler(ScriptedScheduler):
    """A scheduler that sends nothing unless the test asks for a message. All tokens of request n are n % 200."""

    def __init__(self, *adapters: str) -> None:
        super().__init__("", *adapters)
        self.open: dict[int, int] = {}  # the number of tokens sent to each request, by its id
        self.sent: dict[int, set[int]] = {}  # the tokens that each request may receive, by its id

    def send(self, message: msgspec.Struct) -> None:
        match message:
            case Generate():
                self.open[message.request_id] = 0
                self.sent[message.request_id] = set()
            case Abort():
                self.open.pop(message.request_id, None)
            case _:
                super().send(message)

    def next_message(self, mutator: Mutator) -> ToTokenizer:
        """Draws a valid message."""
        draw = mutator.draw
        waiting = sorted(self.open.keys() & self.front.router._requests.keys())
        if waiting and draw.random() < 0.75:
            asked = draw.sample(waiting, min(len(waiting), draw.choice([1, 1, 3])))
            return Progress(0, [self._update(mutator, request_id) for request_id in asked])
        return draw.choice([
            Stats(resident=[1], running_adapters={1: 2}, waiting_adapters={2: 1}, step_seconds=[0.5], running=3),
            AdapterState(adapter_id=1, state="resident", revision="r", footprint=Footprint({"qkv": 1})),
            AdapterState(adapter_id=draw.choice([1, 2]), state="disk", error="no"),
            CAPACITY, Hello("scheduler", 0, "ipc://x"),
        ])  # fmt: skip

    def _update(self, mutator: Mutator, request_id: int) -> Update:
        index, count = self.open[request_id], mutator.draw.choice([1, 1, 2])
        self.open[request_id] = index + count
        ends = index + count > 6
        token, finish = request_id % 200, "length" if ends else None
        return Update(
            request_id=request_id, index=index, tokens=[token] * count, cached_tokens=1, finish=finish,  # type: ignore[arg-type]
            logprobs=[LogprobIds(token, -1.0, [(token, -1.0)])] * count if mutator.draw.random() < 0.5 else None,
            prompt_logprobs=[LogprobIds(3, -1.0, [])] if mutator.draw.random() < 0.2 else None,
        )  # fmt: skip

    def record(self, message: ToTokenizer) -> None:
        """Records the tokens that a message sends to each request."""
        for update in message.updates if isinstance(message, Progress) else ():
            self.sent.setdefault(update.request_id, set()).update(update.tokens)


class Clients:
    """Clients of the front end, each with one request; AT_ONCE of them are open."""

    def __init__(self, scheduler: SilentScheduler, frontend: Frontend, mutator: Mutator) -> None:
        self.scheduler, self.frontend, self.mutator = scheduler, frontend, mutator
        self.ends: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    async def refill(self) -> None:
        """Raises the failures of clients that ended, and opens new clients in their place."""
        for done in [task for task in self._tasks if task.done()]:
            self._tasks.discard(done)
            done.result()
        while len(self._tasks) < AT_ONCE:
            self._count += 1
            self._tasks.add(asyncio.ensure_future(self._run(self._count)))
            await asyncio.sleep(0)

    async def end(self) -> None:
        """Fails all open requests, and waits for their clients."""
        self.frontend.router.fail_all(EngineError("the end"))
        async with asyncio.timeout(10):
            await asyncio.gather(*self._tasks)

    async def _run(self, number: int) -> None:
        params = SamplingParams(max_tokens=50, logprobs=1 if number % 2 else None, ignore_eos=True)
        submit = Submit(id=number, prompt=[1, 2, 3], params=params, lora=[None, "sql", "poet"][number % 3])
        got: list[int] = []
        stream: Any = self.frontend.open(submit)
        try:
            async with stream:
                own = stream._running[0].request_id
                async for delta in stream:
                    got += delta.token_ids
                    assert set(got) <= self.scheduler.sent[own], f"request {own} received {got}"
                    if delta.finish_reason is None and self.mutator.draw.random() < 0.02:
                        break
            self.ends["answered"] += 1
        except EngineError:
            self.ends["failed"] += 1


def test_clients_receive_only_their_own_tokens() -> None:
    scheduler = SilentScheduler("sql", "poet")
    frontend = scheduler.frontend(enable_lora=True, max_loras=4)
    mutator = Mutator(51)
    clients = Clients(scheduler, frontend, mutator)

    async def main() -> None:
        for case in range(CASES):
            await clients.refill()
            message = scheduler.next_message(mutator)
            if mutator.draw.random() < 0.5:
                message = mutator.message(message)
            scheduler.record(message)
            frontend.handle(message)
            await asyncio.sleep(0)
            if case % 100 == 0:
                frontend.handle(CAPACITY)
                frontend.metrics.render()
                msgspec.json.encode(frontend.info())
                frontend.adapters.cards()
        await clients.end()
        assert frontend.router.open == 0

    asyncio.run(main())
    assert min(clients.ends.values()) > 100, clients.ends
