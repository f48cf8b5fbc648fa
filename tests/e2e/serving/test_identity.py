"""Tokens from the whole server equal transformers + PEFT, alone and in mixed batches, with more adapters than lanes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, build, make_adapter
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "phi3"]
NEW_TOKENS = 16
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "targets": ["q_proj", "v_proj"]},
    {"r": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    {"r": 16, "targets": "all-linear"},
    {"r": 24, "targets": ["gate_proj", "up_proj", "down_proj"], "rslora": True},
    {"r": 3, "targets": ["k_proj", "down_proj"], "alpha": 7, "layers_to_transform": [0, 2]},
    {"r": 8, "targets": r".*\.(o_proj|gate_proj)", "rank_pattern": {"o_proj": 33}, "alpha_pattern": {"o_proj": 66}},
]
FUSED_ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "targets": ["qkv_proj"]},
    {"r": 16, "targets": "all-linear"},
    {"r": 24, "targets": ["gate_up_proj", "down_proj"], "rslora": True},
    {"r": 8, "targets": r".*\.(o_proj|qkv_proj)", "rank_pattern": {"o_proj": 33}},
]
"""Adapters for a model whose checkpoint has one tensor for q, k and v, and one for gate and up."""


class World:
    """The model of one family, its adapters, the oracle, and 24 (prompt, adapter) pairs with a clear margin."""

    def __init__(self, family: str, directory: Path) -> None:
        self.model = build(family, directory / "model", seed=7)
        self.adapters = {
            f"a{number}": make_adapter(self.model, directory / f"a{number}", seed=number, **options)
            for number, options in enumerate(FUSED_ADAPTERS if family == "phi3" else ADAPTERS)
        }
        self.oracle = Oracle(self.model, self.adapters)
        self.jobs = list(self._draw())

    def _draw(self) -> Iterator[tuple[list[int], str | None]]:
        draw = random.Random(11)
        names = [None, *self.adapters]
        for number in range(24):
            adapter = names[number % len(names)]
            while True:
                prompt = [draw.randrange(6, VOCAB) for _ in range(draw.choice([1, 3, 9, 17, 40]))]
                if self.oracle.is_unambiguous(prompt, NEW_TOKENS, adapter):
                    break
            yield prompt, adapter


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param))


async def _tokens(session: aiohttp.ClientSession, prompt: list[int], lora: str | None, **params: Any) -> list[int]:
    body = {
        "input_ids": prompt,
        "lora_path": lora,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, **params},
    }
    async with session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    return list(answer["output_ids"])


def test_tokens_equal_the_oracle_in_any_batch(world: World) -> None:
    async def ask(url: str) -> None:
        async with aiohttp.ClientSession(url) as session:
            together = await asyncio.gather(*(_tokens(session, prompt, lora) for prompt, lora in world.jobs))
            for (prompt, lora), tokens in zip(world.jobs, together, strict=True):
                assert tokens == world.oracle.greedy(prompt, NEW_TOKENS, lora), f"adapter {lora}, prompt {prompt}"
            for number in (0, 1, 5, 20):
                prompt, lora = world.jobs[number]
                assert await _tokens(session, prompt, lora) == together[number]
            seeded = {"temperature": 0.8, "top_p": 0.9, "top_k": 20}
            alone = [
                await _tokens(session, prompt, lora, **seeded, sampling_seed=number)
                for number, (prompt, lora) in enumerate(world.jobs[:6])
            ]
            crowd = await asyncio.gather(
                *(
                    _tokens(session, prompt, lora, **seeded, sampling_seed=number)
                    for number, (prompt, lora) in enumerate(world.jobs)
                )
            )
            assert crowd[:6] == alone
            assert len({tuple(tokens) for tokens in crowd}) > 12

    paths = [f"{name}={path}" for name, path in world.adapters.items()]
    flags = ["--model-path", world.model, "--dtype", "float32", "--lora-paths", *paths]
    flags += ["--max-loras-per-batch", 3, "--max-num-batched-tokens", 64]
    with RunningServer(*flags) as server:
        asyncio.run(ask(server.url))
        server.wait_idle()
