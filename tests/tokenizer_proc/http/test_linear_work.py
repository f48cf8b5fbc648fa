"""The work for a call of many choices grows linearly with their number, however they are requested and ended."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.scripted_scheduler import ScriptedScheduler

import tokenizer_proc
from engine.errors import EngineDead

PACKAGE = str(Path(tokenizer_proc.__file__).parent)
FEW = 40
ECHO: dict[str, Any] = {"echo": True, "logprobs": 1}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}

Call = Callable[[TestClient, ScriptedScheduler, int], Awaitable[None]]


class Operations:
    """Counts the bytecode operations of the package while the context `counted` is entered."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.count += event == "opcode"
        return self._trace


def operations(choices: int, call: Call, scheduler: ScriptedScheduler) -> int:
    """Returns how many operations `call` takes for `choices` choices."""
    found, frontend = Operations(), scheduler.frontend()

    async def scenario(client: TestClient) -> None:
        with found.counted():
            await call(client, scheduler, choices)

    serve(frontend, scenario)
    return found.count


def opened(scheduler: ScriptedScheduler) -> list[Any]:
    """Returns the open requests, read without a call of the package, which would add operations."""
    return [*scheduler.front.router._requests.values()]


def assert_linear(call: Call, hold_after: int | None = None) -> None:
    """Checks that four times the choices take at most four times the operations, plus five percent."""
    counts = []
    for choices in (FEW, 4 * FEW):
        scheduler = ScriptedScheduler("hi")
        scheduler.hold_after = hold_after
        counts.append(operations(choices, call, scheduler))
    assert counts[1] < 1.05 * 4 * counts[0]


BODIES: list[tuple[str, Callable[[int], dict[str, Any]]]] = [
    ("/v1/completions", lambda choices: {"prompt": ["a"] * choices}),
    ("/v1/completions", lambda choices: {"prompt": ["a"] * 4, "n": choices // 4}),
    ("/v1/completions", lambda choices: ECHO | {"prompt": ["a"] * choices}),
    ("/v1/completions", lambda choices: ECHO | {"prompt": ["a"] * 4, "n": choices // 4}),
    ("/generate", lambda choices: {"text": ["a"] * choices, "rid": "r"}),
    ("/generate", lambda choices: {"text": ["a"] * 4, "sampling_params": {"n": choices // 4}}),
    ("/v1/chat/completions", lambda choices: CHAT | {"n": choices // 4}),
]
NAMES = ["completions", "completions-n", "echo", "echo-n", "generate", "generate-n", "chat-n"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES, ids=NAMES)
def test_an_answer_takes_linear_work(path: str, body: Callable[[int], dict[str, Any]], stream: bool) -> None:
    async def call(client: TestClient, scheduler: ScriptedScheduler, choices: int) -> None:
        async with client.post(path, json=body(choices) | {"stream": stream}) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()

    assert_linear(call)


@pytest.mark.parametrize("end", ["abort", "fail", "hang up"])
@pytest.mark.parametrize(("path", "body"), BODIES, ids=NAMES)
def test_an_end_takes_linear_work(path: str, body: Callable[[int], dict[str, Any]], end: str) -> None:
    async def call(client: TestClient, scheduler: ScriptedScheduler, choices: int) -> None:
        asked = asyncio.ensure_future(client.post(path, json=body(choices) | {"stream": False}))
        # this polls the scheduler, because polling the front end would add operations
        expected = choices // (4 if "chat" in path else 1)
        while len(scheduler.generates) < expected or not all(one.tokens for one in opened(scheduler)):
            await asyncio.sleep(0.001)
        if end == "abort":
            async with client.post("/abort_request", json={"abort_all": True}) as answer:
                assert await answer.json() == {"aborted": 1}
        elif end == "fail":
            scheduler.front.router.fail_all(EngineDead("the scheduler is gone"))
        else:
            asked.cancel()
        await asyncio.wait([asked])
        assert await scheduler.front.router.wait_idle(10)

    assert_linear(call, hold_after=1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", lambda ids: {"input_ids": ids}),
        ("/generate", lambda ids: {"input_ids": [ids] * 3}),
        ("/v1/completions", lambda ids: {"prompt": ids}),
        ("/detokenize", lambda ids: {"tokens": ids}),
    ],
    ids=["generate", "generate-lists", "completions", "detokenize"],
)
def test_token_ids_are_never_looped_over(path: str, body: Callable[[list[int]], dict[str, Any]]) -> None:
    counts = []
    for length in (4_000, 32_000):
        found, frontend = Operations(), ScriptedScheduler("hi").frontend()

        async def scenario(client: TestClient, found: Operations = found, length: int = length) -> None:
            with found.counted():
                async with client.post(path, json=body([5] * length)) as answer:
                    assert answer.status in (200, 400)
                    await answer.read()

        serve(frontend, scenario)
        counts.append(found.count)
    assert counts[1] < counts[0] + 28_000, "an operation for each of 28,000 more ids"
