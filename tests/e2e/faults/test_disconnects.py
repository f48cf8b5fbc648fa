"""64 concurrent streams, most of them disconnected at random points: all pages, rows and references are freed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fixtures.models.tiny_models import make_adapter
from fixtures.serving.running import RunningServer

from engine import Engine, SamplingParams

pytestmark = pytest.mark.e2e


async def _stream(session: aiohttp.ClientSession, number: int, draw: random.Random) -> str:
    body: dict[str, Any] = {
        "model": ["base", "a", "b"][number % 3],
        "prompt": f"stream number {number} " * draw.randrange(1, 8),
        "max_tokens": 200,
        "stream": True,
        "temperature": 1.0,
        "ignore_eos": True,
    }
    cut_after = draw.choice([None, 0, 1, 5, 50])
    async with session.post("/v1/completions", json=body) as response:
        assert response.status == 200
        seen = 0
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                return "finished"
            seen += line.startswith(b"data: ")
            if cut_after is not None and seen > cut_after:
                response.close()  # the client disconnects
                return "cut"
    raise AssertionError("the stream ended without [DONE]")


def test_random_disconnects_of_64_streams_leak_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama3")
    a = make_adapter(model, tmp_path / "a", r=4, targets=["q_proj"])
    b = make_adapter(model, tmp_path / "b", r=32, targets="all-linear")
    flags = ["--model-path", model, "--served-model-name", "base", "--lora-paths", f"a={a}", f"b={b}"]
    draw = random.Random(3)

    async def run_streams(url: str) -> list[str]:
        async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(_stream(session, number, draw) for number in range(64)))

    async def leave_embedded(address: str) -> None:
        async with Engine.connect(address) as engine:  # the client leaves without cancelling
            streams = [engine.generate("host", SamplingParams(max_tokens=300, ignore_eos=True)) for _ in range(4)]
            for stream in streams:
                await anext(stream)
            for stream in streams:
                await stream.aclose()

    with RunningServer(*flags, "--max-running-requests", 16) as server:
        outcomes = asyncio.run(run_streams(server.url))
        assert {"finished", "cut"} == set(outcomes)
        asyncio.run(leave_embedded(server.connect_address))
        stats = server.wait_idle()
        assert stats["audits"] > 0
        cards = {card["id"]: card for card in server.get("/v1/models")["data"]}
        assert cards["a"]["running"] == cards["b"]["running"] == 0
        status, _ = server.post("/v1/completions", {"model": "a", "prompt": "still here?", "max_tokens": 3})
        assert status == 200
    assert "Traceback" not in server.log()
