"""A request that waits for a lane reports this over HTTP: the routes and the front end on the scheduler's real core."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import error, serve
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine.messages import AdapterState, Capacity, Footprint, LoadAdapter, StepDone
from scheduler.core import Scheduler
from scheduler.state import Bounds
from tokenizer_proc.frontend import Frontend

CAPACITY = Capacity(
    kv_pages=64,
    page_size=16,
    rows=8,
    max_length=512,
    max_batched_tokens=64,
    vocab_size=258,
    max_loras=1,
    rank_pages={"qkv": 4},
    max_lane_pages=4,
)


class Stalled(ScriptedScheduler):
    """The scheduler's core with one lane, and a runner that fills adapters and runs no request.

    `late` seconds are added to the clock.
    """

    def __init__(self) -> None:
        super().__init__("", "a", "b")
        self.core = Scheduler(CAPACITY, Bounds(1, lora_max_wait=1e6))
        self.late = 0.0

    def frontend(self, **fields: Any) -> Frontend:
        front = super().frontend(**fields)
        self._tell_all(self.core.drain_outbox())
        return front

    def send(self, message: msgspec.Struct) -> None:
        self._tell_all(self.core.handle(message, self.now))  # type: ignore[arg-type]
        while (step := self.core.plan(self.now)) is not None:
            if not step.chunks:
                self._tell_all(self.core.handle(StepDone(epoch=0, id=step.id), self.now))
            for fill in step.fills:
                state = AdapterState(adapter_id=fill.adapter_id, state="resident")
                self._tell_all(self.core.handle(state, self.now))

    @property
    def now(self) -> float:
        return time.monotonic() + self.late

    def send_stats(self, late: float) -> None:
        """Sends the front end the Stats of `late` seconds later."""
        self.late = late
        self.core.plan(self.now)
        self.front.handle(self.core.stats())

    def _tell_all(self, messages: list[Any]) -> None:
        for message in messages:
            if not isinstance(message, LoadAdapter):
                self.front.handle(message)
                continue
            number = message.adapter_id
            card = AdapterState(adapter_id=number, state="host", revision=f"r{number}", footprint=Footprint({"qkv": 1}))
            self._tell_all(self.core.handle(card, self.now))


def test_a_request_that_waits_for_a_lane_says_so() -> None:
    scheduler = Stalled()
    front = scheduler.frontend(request_timeout=0.5)

    async def scenario(client: TestClient) -> tuple[list[Any], list[tuple[int, Any]]]:
        async def ask(lora: str) -> tuple[int, Any]:
            body = {"text": "hi", "lora_path": lora, "rid": f"mine-{lora}"}
            async with client.post("/generate", json=body) as answer:
                return answer.status, await answer.json()

        calls = []
        for count, lora in enumerate("ab", 1):
            calls.append(asyncio.ensure_future(ask(lora)))
            while front.router.open < count:
                await asyncio.sleep(0.001)
        scheduler.send_stats(late=30)
        async with client.get("/server_info") as answer:
            facts = await answer.json()
        return facts["long_waiting"], await asyncio.gather(*calls)

    long_waiting, (first, second) = serve(front, scenario)
    (waiting,) = long_waiting
    assert (waiting["ids"], waiting["adapters"], waiting["reason"]) == (["mine-b"], ["b"], "lanes")
    assert waiting["seconds"] >= 30
    assert error(first, 504)["message"].endswith("is ended. No token had been generated")
    told = error(second, 504)["message"]
    assert "It still waited, after 30." in told
    assert told.endswith("in the queue, for a lane: no more adapters run at a time (--max-loras-per-batch: 1)")
