"""More concurrent requests than the limits allow: some are served, the others refused at once; memory stays bounded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from fixtures.processes.resources import private_bytes
from fixtures.serving.running import RunningServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONNECTIONS, LIMIT, TOKENS = 2000, 100, 48


async def _flood(url: str) -> list[tuple[int, float, int]]:
    """Returns (status, seconds, tokens) of each request; all clients are ready before the first request is sent."""
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": TOKENS, "ignore_eos": True}}
    go = asyncio.Event()
    connected = asyncio.Semaphore(0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:

        async def one() -> tuple[int, float, int]:
            connected.release()
            await go.wait()
            began = time.monotonic()
            async with session.post("/generate", json=body) as response:
                answer = await response.json()
                if response.status == 503:
                    assert int(response.headers["Retry-After"]) >= 1
                    assert answer["error"]["code"] == "overloaded"
                return response.status, time.monotonic() - began, len(answer.get("output_ids", ()))

        tasks = [asyncio.ensure_future(one()) for _ in range(CONNECTIONS)]
        for _ in tasks:
            await connected.acquire()
        go.set()
        return list(await asyncio.gather(*tasks))


def _memory(server: RunningServer) -> int:
    return sum(map(private_bytes, server.children()))


def test_2000_requests_against_a_limit_of_100(tiny_model: Callable[[str], Path]) -> None:
    with RunningServer("--model-path", tiny_model("llama3"), "--max-open-requests", LIMIT) as server:
        asyncio.run(_flood(server.url))  # the first flood makes the allocations that connections need once
        server.wait_idle()
        before = _memory(server)
        answers = asyncio.run(_flood(server.url))
        server.wait_idle()
        assert _memory(server) < before * 1.2
        statuses = Counter(status for status, _, _ in answers)
        assert set(statuses) == {200, 503}
        assert LIMIT <= statuses[200] < CONNECTIONS
        assert {tokens for status, _, tokens in answers if status == 200} == {TOKENS}
        assert "Traceback" not in server.log()
