"""Adapters of every format through the whole server: loaded at run time by a loader process, requested concurrently."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import aiohttp
import pytest
from fixtures.adapters.adapter_zoo import BIASED, ZOO, save
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, build
from fixtures.serving.running import RunningServer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]

NEW_TOKENS = 8


async def _tokens(session: aiohttp.ClientSession, prompt: list[int], lora: str | None) -> list[int]:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "lora_path": lora, "sampling_params": params}
    async with session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    return list(answer["output_ids"])


def test_all_formats_at_once_with_fewer_lanes_than_adapters(tmp_path: Path) -> None:
    model = build("llama3", tmp_path / "model", seed=7)
    names = [name for name in ZOO if name not in BIASED]
    roots = {name: save(model, tmp_path / name, ZOO[name](), seed) for seed, name in enumerate(names)}
    draw, jobs = random.Random(2), []
    for name in [None, *names]:
        oracle = Oracle(model, {name: roots[name]} if name else None)
        prompt: list[int] = []
        while not prompt or not oracle.is_unambiguous(prompt, NEW_TOKENS, name):
            prompt = [draw.randrange(6, VOCAB) for _ in range(draw.choice([1, 5, 20]))]
        jobs.append((prompt, name, oracle.greedy(prompt, NEW_TOKENS, name)))

    async def ask(url: str) -> None:
        async with aiohttp.ClientSession(url) as session:
            answers = await asyncio.gather(*(_tokens(session, prompt, name) for prompt, name, _ in jobs * 2))
        for (_, name, expected), tokens in zip(jobs * 2, answers, strict=True):
            assert tokens == expected, f"adapter {name}"

    flags = ["--model-path", model, "--dtype", "float32", "--enable-lora", "--max-loras-per-batch", 3]
    wide = ["--max-lora-rank", 64, "--lora-target-modules", "all", "embed_tokens", "lm_head"]
    given = ("dora", "both whole")  # `both whole` sizes the slots for full weights
    wide += ["--lora-paths", *(f"{name}={roots[name]}" for name in given)]
    with RunningServer(*flags, *wide) as server:
        for name in names:
            if name not in given:
                status, answer = server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(roots[name])})
                assert status == 200, answer
        asyncio.run(ask(server.url))
        server.wait_idle()
    with RunningServer(*flags, "--no-enable-lora-bias") as server:
        for name, flag in (("embedding", "--lora-target-modules"), ("lora_bias", "--no-enable-lora-bias")):
            status, answer = server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(roots[name])})
            assert status == 400
            assert flag in str(answer)
