"""A mixture of experts through the whole server, with adapters on experts, router and attention.

Some adapters are loaded at the start, one at run time.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fixtures.adapters.expert_adapters import make_expert_adapter
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, build, make_adapter
from fixtures.serving.running import RunningServer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings(  # PEFT warns about patterns for parameters, but applies them
        "ignore:The following (rank|alpha)_pattern keys did not match any targeted module:RuntimeWarning"
    ),
]

NEW_TOKENS = 8
LINEARS = ("w1", "w2", "w3")


async def _post(session: aiohttp.ClientSession, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with session.post(route, json=body) as response:
        return response.status, await response.json()


def test_expert_adapters_equal_the_oracle_in_a_mixed_batch(tmp_path: Path) -> None:
    model = build("mixtral", tmp_path / "model", seed=7)
    start = {
        "experts": make_expert_adapter(model, tmp_path / "experts", [*LINEARS, "gate"], r=20, seed=1),
        "attention": make_adapter(model, tmp_path / "attention", targets=["q_proj", "v_proj"]),
    }
    stacked = ["experts.gate_up_proj", "experts.down_proj"]
    late = make_adapter(model, tmp_path / "late", targets=["k_proj"], target_parameters=stacked, r=3, seed=9)
    oracles = {name: Oracle(model, {name: path}) for name, path in {**start, "late": late}.items()}
    draw, names = random.Random(3), [None, *oracles]
    jobs: list[tuple[list[int], str | None]] = []
    while len(jobs) < 12:
        name = names[len(jobs) % len(names)]
        prompt = [draw.randrange(6, VOCAB) for _ in range(draw.choice([1, 5, 12]))]
        if oracles[name or "late"].is_unambiguous(prompt, NEW_TOKENS, name):
            jobs.append((prompt, name))

    async def generate(session: aiohttp.ClientSession, prompt: list[int], name: str | None) -> list[int]:
        params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "lora_path": name, "sampling_params": params}
        status, answer = await _post(session, "/generate", body)
        assert status == 200, answer
        return list(answer["output_ids"])

    async def ask(url: str) -> None:
        async with aiohttp.ClientSession(url) as session:
            status, answer = await _post(session, "/load_lora_adapter", {"lora_name": "late", "lora_path": str(late)})
            assert status == 200, answer
            together = await asyncio.gather(*(generate(session, *job) for job in jobs))
        for (prompt, name), tokens in zip(jobs, together, strict=True):
            assert tokens == oracles[name or "late"].greedy(prompt, NEW_TOKENS, name), f"adapter {name}"

    paths = [f"{name}={path}" for name, path in start.items()]
    with RunningServer("--model-path", model, "--dtype", "float32", "--lora-paths", *paths) as server:
        asyncio.run(ask(server.url))
        server.wait_idle()


def test_expert_pages_exist_only_with_expert_targets(tmp_path: Path) -> None:
    model = build("mixtral", tmp_path / "model", seed=7)
    adapter = make_expert_adapter(model, tmp_path / "experts", LINEARS)

    async def load(url: str) -> str:
        async with aiohttp.ClientSession(url) as session:
            body = {"lora_name": "experts", "lora_path": str(adapter)}
            status, answer = await _post(session, "/load_lora_adapter", body)
            assert status == 400
            return str(answer["error_message"])

    with RunningServer("--model-path", model, "--dtype", "float32", "--enable-lora") as server:
        assert asyncio.run(load(server.url)).endswith(": launch with --lora-target-modules all w1 w2 w3")
