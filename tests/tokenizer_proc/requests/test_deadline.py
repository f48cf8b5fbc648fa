"""--request-timeout runs from the arrival of a call, whatever the call waits for."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import error, serve
from fixtures.serving.loading_front import LoadingFront, adapter_dir
from fixtures.serving.scripted_scheduler import ScriptedScheduler
from fixtures.serving.tokenizer_front import Fake

from engine.errors import TimedOut
from engine.messages import Submit
from tokenizer_proc.requests.text_work import TextWork
from tokenizer_proc.text.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TOO_LATE = "the request was not done after 0.05 seconds (--request-timeout), and is ended."


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 10)

    asyncio.run(main())


@pytest.fixture
def world(tmp_path: Path) -> LoadingFront:
    """A front end whose adapter `one` is not loaded until the test sends the loaded state."""
    adapter_dir(tmp_path / "root" / "one")
    found = LoadingFront(lora_resolve_root=str(tmp_path / "root"), request_timeout=0.05)
    found.held = True
    return found


def test_a_request_in_preparation_is_ended_in_time(world: LoadingFront) -> None:
    async def work() -> None:
        asyncio.get_running_loop().call_later(0.5, world.finish)
        with pytest.raises(TimedOut) as raised:
            await world.front.open(Submit(id=1, prompt="hi", lora="one")).__aenter__()
        assert raised.value.message == f"{TOO_LATE} It had not reached the scheduler"
        assert await world.front.router.wait_idle(0.01)
        while not world.loads():  # waits until the load has begun
            await asyncio.sleep(0.005)

    run(work)
    assert 'request_failures_total{kind="timeout_error",model_name="base"} 1.0' in world.front.metrics.render().decode()


@pytest.mark.parametrize("field", ["model", "lora_path"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_waits_for_a_load_is_ended_in_time(world: LoadingFront, field: str, stream: bool) -> None:
    async def scenario(client: TestClient) -> tuple[int, Any]:
        asyncio.get_running_loop().call_later(0.5, world.finish)
        async with client.post("/v1/chat/completions", json=CHAT | {field: "one", "stream": stream}) as answer:
            return answer.status, await answer.json()

    assert error(serve(world.front, scenario), 504)["message"].startswith(TOO_LATE)
    assert not world.front.router.open


def test_the_time_of_receiving_a_body_counts() -> None:
    frontend = ScriptedScheduler("hi").frontend(request_timeout=0.05)

    async def body() -> AsyncIterator[bytes]:
        yield b" "
        await asyncio.sleep(0.2)
        yield json.dumps(CHAT).encode()

    async def scenario(client: TestClient) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        async with client.post("/v1/chat/completions", data=body(), headers=headers) as answer:
            return answer.status, await answer.json()

    assert error(serve(frontend, scenario), 504)["message"].startswith(TOO_LATE)


def test_the_prompts_of_a_call_share_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = ScriptedScheduler("hi").frontend(request_timeout=0.05)
    encoded = 0

    async def slow(texts: TextWork, tenant: str, tokenizer: Tokenizer, text: str, *_: Any) -> list[int]:
        nonlocal encoded
        await asyncio.sleep(0.02)
        encoded += 1
        return tokenizer.encode(text)

    monkeypatch.setattr(TextWork, "encode", slow)

    async def scenario(client: TestClient) -> tuple[int, Any]:
        async with client.post("/v1/completions", json={"prompt": ["a"] * 20}) as answer:
            return answer.status, await answer.json()

    error(serve(frontend, scenario), 504)
    assert encoded < 10


def test_a_request_past_its_deadline_is_not_begun() -> None:
    fake = Fake(request_timeout=5.0)

    async def work() -> None:
        late = fake.front.deadline(time.monotonic() - 6.0)
        with pytest.raises(TimedOut):
            await fake.front.open(Submit(id=1, prompt="hi"), late).__aenter__()
        assert fake.sent == []

    run(work)


def test_the_first_token_is_timed_from_the_arrival() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(Submit(id=1, prompt="hi"), fake.front.deadline(time.monotonic() - 6.0)) as stream:
            fake.say_text(fake.generates[0].request_id, "abc", finish="length")
            await anext(stream)

    run(work)
    text = fake.front.metrics.render().decode()
    assert 'vllm:time_to_first_token_seconds_bucket{le="5.0",model_name="base"} 0.0' in text
    assert 'vllm:e2e_request_latency_seconds_bucket{le="10.0",model_name="base"} 1.0' in text
