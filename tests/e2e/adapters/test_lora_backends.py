"""The kernel backends through the whole server: base and adapters in one batch, tokens equal transformers + PEFT.

Without a GPU the kernels run in Triton's interpreter, by an environment variable that every process inherits.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, build, make_adapter
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

NEW_TOKENS = 5
ADAPTERS: dict[str, dict[str, Any]] = {
    "some": {"r": 4, "targets": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    "every": {"r": 20, "targets": "all-linear"},
    "dora": {"r": 8, "targets": ["q_proj", "k_proj", "down_proj"], "use_dora": True},
}
DTYPE = "float32"


class World:
    """A tiny Llama, its adapters, and prompts where the oracle's margin is clear."""

    def __init__(self, directory: Path) -> None:
        self.model = build("llama3", directory / "model", seed=3)
        self.adapters = {
            name: make_adapter(self.model, directory / name, seed=number, **options)
            for number, (name, options) in enumerate(ADAPTERS.items())
        }
        self.oracle = Oracle(self.model, self.adapters)
        self.jobs = list(self._draw())

    def _draw(self) -> Iterator[tuple[list[int], str | None]]:
        draw = random.Random(2)
        for adapter in [None, *self.adapters, *self.adapters]:
            while True:
                prompt = [draw.randrange(6, VOCAB) for _ in range(draw.choice([1, 7, 20]))]
                if self.oracle.is_unambiguous(prompt, NEW_TOKENS, adapter):
                    break
            yield prompt, adapter


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


async def _tokens(session: aiohttp.ClientSession, prompt: list[int], lora: str | None) -> list[int]:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    async with session.post(
        "/generate", json={"input_ids": prompt, "lora_path": lora, "sampling_params": params}
    ) as answer:
        body = await answer.json()
        assert answer.status == 200, body
    return list(body["output_ids"])


@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_kernel_backend_equals_the_oracle_in_a_mixed_batch(world: World, backend: str) -> None:
    async def ask(url: str) -> list[list[int]]:
        async with aiohttp.ClientSession(url) as session:
            return await asyncio.gather(*(_tokens(session, prompt, lora) for prompt, lora in world.jobs))

    flags = ["--model-path", world.model, "--dtype", DTYPE, "--lora-backend", backend, "--max-lora-chunk-size", 32]
    flags += ["--lora-paths", *(f"{name}={path}" for name, path in world.adapters.items())]
    flags += ["--disable-cuda-graph"] if torch.cuda.is_available() else []
    with RunningServer(*flags) as server:
        told = server.get("/server_info")
        assert told["lora_backend"] == backend, told
        answers = asyncio.run(ask(server.url))
    expected = [world.oracle.greedy(prompt, NEW_TOKENS, lora) for prompt, lora in world.jobs]
    assert answers == expected
