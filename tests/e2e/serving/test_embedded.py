"""The embedded engine, started or connected to: streams, lists, choices, cancels and errors; it imports no torch."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.models.tiny_models import make_adapter
from fixtures.serving.running import RunningServer

from engine import ConfigError, Engine, InvalidRequest, LoRARequest, NotFound, SamplingParams

pytestmark = pytest.mark.e2e

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def test_started_engine_streams_lists_cancels_and_refuses(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    paths = {name: make_adapter(model, tmp_path / name, r=rank, seed=rank) for name, rank in (("a", 4), ("b", 20))}

    async def main() -> None:
        flags = {"lora_paths": [f"{name}={path}" for name, path in paths.items()], "dtype": "float32"}
        async with Engine(str(model), **flags) as engine:
            deltas = [delta async for delta in engine.generate("sing to me", GREEDY, lora="a")]
            assert sum(len(delta.token_ids) for delta in deltas) == 8
            assert [delta.finish_reason for delta in deltas][-1] == "length"

            prompts = ["sing to me", [40, 41, 42], [{"role": "user", "content": "hello"}], "sing to me"]
            request = LoRARequest("a", 5, str(paths["a"]))
            answers = await engine.generate_all(prompts, GREEDY, lora=[request, "b", None, None])
            assert answers[0].text == "".join(delta.text for delta in deltas)
            assert answers[0].text != answers[3].text
            assert all(answer.usage.completion_tokens == 8 for answer in answers)

            choices = [
                delta.index
                async for delta in engine.generate("x", SamplingParams(n=3, max_tokens=4))
                if delta.finish_reason
            ]
            assert sorted(choices) == [0, 1, 2]

            stream = engine.generate("x", SamplingParams(max_tokens=400, ignore_eos=True))
            await anext(stream)
            await stream.aclose()

            with pytest.raises(NotFound, match="nobody"):
                await engine.generate_all(["x"], lora="nobody")
            with pytest.raises(InvalidRequest, match="temperature"):
                await engine.generate_all(["x"], SamplingParams(temperature=-1.0))
            with pytest.raises(InvalidRequest, match="loaded from"):
                await engine.generate_all(["x"], lora=LoRARequest("a", 1, str(paths["b"])))
            assert engine._process is not None
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # for this program, which goes on
                os.kill(engine._process.pid, number)
            assert [card.name for card in await engine.adapters()] == ["a", "b"]
            assert len(await engine.generate_all(["x"], GREEDY)) == 1
            assert "capacity" in await engine.info()

    asyncio.run(main())


def test_joined_engine_answers_as_over_http(tiny_model: Callable[[str], Path]) -> None:
    async def ask(address: str) -> str:
        async with Engine.connect(address) as engine:
            (answer,) = await engine.generate_all(["once"], GREEDY)
            return answer.text

    with RunningServer("--model-path", tiny_model("llama3")) as server:
        body = {"prompt": "once", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        status, answer = server.post("/v1/completions", body)
        assert status == 200
        assert asyncio.run(ask(server.connect_address)) == answer["choices"][0]["text"]


def test_failed_start_is_raised(tmp_path: Path) -> None:
    async def main() -> None:
        async with Engine(str(tmp_path / "nowhere")):
            raise AssertionError("it cannot serve")

    with pytest.raises(ConfigError, match="neither a directory nor a hub id"):
        asyncio.run(main())
    with pytest.raises(ConfigError, match="tensor parallelism"):
        Engine("m", tp_size=2)
    with pytest.raises(ConfigError, match="max_loras"):
        Engine("m", max_loras=2)


def test_embedding_program_imports_no_torch() -> None:
    probe = "import sys, engine, engine.testing; print(sorted({'torch', 'triton', 'aiohttp'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
