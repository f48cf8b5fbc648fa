"""Calls that cost much delay no other tenant, and one that ends the tokenizer process is refused from then on."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parents[2] / "fixtures" / "processes" / "poisoned_tokenizer"
HUGE = "The capital of France is Paris. " * 8_000  # nearly as long as a text may be in the demo's context
CALLS = 32
LONG = "The capital of France is Paris. " * 400
ALLOWED_GAP = 2.0  # seconds; without slices the largest gap was 4 seconds on an idle machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    keys.write_text("".join(json.dumps({"key": f"k-{name}", "tenant": name}) + "\n" for name in "ab"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
        with RunningServer("--api-key-file", keys) as running:
            yield running


@asynccontextmanager
async def client(server: RunningServer, tenant: str) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer k-{tenant}"}
    async with aiohttp.ClientSession(server.url, headers=headers) as session:
        yield session


async def tokenize(session: aiohttp.ClientSession, text: str) -> tuple[int, Any]:
    body = io.BytesIO(json.dumps({"prompt": text}).encode())
    async with session.post("/tokenize", data=body, headers={"Content-Type": "application/json"}) as answer:
        return answer.status, await answer.json()


def test_abandoned_texts_of_one_tenant_delay_no_other(server: RunningServer) -> None:
    async def scenario() -> None:
        async with client(server, "a") as one, client(server, "b") as other:
            calls = [asyncio.ensure_future(tokenize(one, HUGE)) for _ in range(CALLS)]
            first, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            assert all(call.result()[0] == 200 for call in first)
            for _ in range(3):
                assert (await tokenize(other, LONG))[0] == 200
            assert sum(call.done() for call in calls) <= CALLS // 2, "the short texts waited for the long ones"
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            assert (await tokenize(one, LONG))[0] == 200
            assert (await tokenize(other, LONG))[0] == 200

    asyncio.run(scenario())


def test_many_logprobs_leave_the_server_responsive(server: RunningServer) -> None:
    gaps: list[float] = []

    async def scenario() -> None:
        async with client(server, "a") as session:
            prompts = [[5 + place % 200 for place in range(600)] for _ in range(12)]
            body = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 20}
            asked = asyncio.ensure_future(session.post("/v1/completions", json=body))
            while not asked.done():
                began = time.monotonic()
                async with session.get("/health") as answer:
                    assert answer.status == 200
                gaps.append(time.monotonic() - began)
                await asyncio.sleep(0.01)
            async with asked.result() as answer:
                choices = (await answer.json())["choices"]
                assert [len(choice["logprobs"]["top_logprobs"]) for choice in choices] == [601] * 12

    asyncio.run(scenario())
    assert max(gaps) < ALLOWED_GAP


@pytest.mark.parametrize(("word", "deaths"), [("abort", 1), pytest.param("hold", 2, marks=pytest.mark.slow)])
def test_a_text_that_ends_the_process_is_refused(word: str, deaths: int, server: RunningServer) -> None:
    poison = f"poison {word} " + LONG

    async def scenario() -> None:
        for _ in range(deaths):
            async with client(server, "a") as session:
                with pytest.raises(aiohttp.ClientError):
                    await tokenize(session, poison)
            await serves_again(server)
        async with client(server, "a") as session:
            status, answer = await tokenize(session, poison)
            assert (status, answer["error"]["code"]) == (400, "poison_request")
            assert (await tokenize(session, "ever " + LONG))[0] == 200

    counted = server.log().count("this does not count")
    asyncio.run(scenario())
    assert server.log().count("this does not count") == counted + deaths
    assert server.process.poll() is None


async def serves_again(server: RunningServer) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession(server.url) as session:
        while True:
            try:
                async with session.get("/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
