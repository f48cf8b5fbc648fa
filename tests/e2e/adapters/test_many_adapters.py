"""500 adapters, a host cache of 50, a pool of 16, power-law traffic: all outputs equal the oracle's, nothing leaks."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB
from fixtures.serving.running import RunningServer
from safetensors.torch import save_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ADAPTERS, REQUESTS, NEW_TOKENS = 500, 600, 6
RANKS = (4, 8, 12, 16, 24, 40, 64)


def _write_adapter(config: dict[str, Any], directory: Path, number: int) -> Path:
    """Writes a PEFT directory: even-numbered adapters act on q and v only, the others on all linears."""
    draw = torch.Generator().manual_seed(number)
    rank = RANKS[number % len(RANKS)]
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (hidden, q), "self_attn.v_proj": (hidden, kv)}
    if number % 2:
        sizes |= {"self_attn.k_proj": (hidden, kv), "self_attn.o_proj": (q, hidden)}
        sizes |= {"mlp.gate_proj": (hidden, ffn), "mlp.up_proj": (hidden, ffn), "mlp.down_proj": (ffn, hidden)}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inner, outer) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, inner, generator=draw) / inner**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(outer, rank, generator=draw) / (2 * rank**0.5)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    settings["target_modules"] = [name.split(".")[-1] for name in sizes]
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in _descendants(int(child)))]


def _resources(server: RunningServer) -> dict[str, int]:
    """Returns the number of processes and descriptors of the whole engine, and its shared and resident memory in kB."""
    pids = _descendants(server.process.pid)
    resident = shared = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            resident += int(line.split()[1]) if line.startswith("RssAnon:") else 0
            shared += int(line.split()[1]) if line.startswith("RssShmem:") else 0
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    return {"processes": len(pids), "descriptors": descriptors, "resident": resident, "shared": shared}


class Traffic:
    """The adapter of each request, and a prompt for each adapter where the oracle's margin is clear."""

    def __init__(self, model: Path, paths: dict[str, Path]) -> None:
        draw = random.Random(17)
        names = list(paths)
        weights = [1 / rank for rank in range(1, len(names) + 1)]
        self.order = draw.choices(names, weights, k=REQUESTS)
        self.prompts: dict[str, list[int]] = {}
        self.expected: dict[str, list[int]] = {}
        for name in dict.fromkeys(self.order):
            oracle = Oracle(model, {name: paths[name]})  # PEFT's calls take longer with each adapter that it holds
            while True:
                prompt = [draw.randrange(6, VOCAB) for _ in range(draw.choice([2, 5, 11]))]
                if oracle.is_unambiguous(prompt, NEW_TOKENS, name):
                    break
            self.prompts[name], self.expected[name] = prompt, oracle.greedy(prompt, NEW_TOKENS, name)


async def _drive(url: str, traffic: Traffic, order: list[str]) -> None:
    gate = asyncio.Semaphore(16)
    async with aiohttp.ClientSession(url) as session:

        async def one(name: str) -> None:
            params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
            body = {"input_ids": traffic.prompts[name], "lora_path": name, "sampling_params": params}
            async with gate, session.post("/generate", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
                assert answer["output_ids"] == traffic.expected[name], name

        await asyncio.gather(*map(one, order))


async def _each(url: str, path: str, bodies: list[dict[str, str]]) -> None:
    gate = asyncio.Semaphore(8)
    async with aiohttp.ClientSession(url) as session:

        async def one(body: dict[str, str]) -> None:
            async with gate, session.post(path, json=body) as response:
                assert response.status == 200, await response.text()

        await asyncio.gather(*map(one, bodies))


def test_500_adapters_equal_the_oracle_and_leak_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama3")
    config = json.loads((model / "config.json").read_text())
    paths = {f"v{number}": _write_adapter(config, tmp_path / f"v{number}", number) for number in range(ADAPTERS)}
    traffic = Traffic(model, paths)
    flags = ["--model-path", model, "--dtype", "float32", "--enable-lora", "--max-lora-rank", 64]
    flags += ["--max-loras-per-batch", 8, "--lora-pool-size", 16, "--max-loaded-loras", 50]
    with RunningServer(*flags) as server:
        loads = [{"lora_name": name, "lora_path": str(path)} for name, path in paths.items()]
        asyncio.run(_each(server.url, "/load_lora_adapter", loads))
        asyncio.run(_drive(server.url, traffic, traffic.order[: REQUESTS // 3]))
        server.wait_idle()
        before = _resources(server)
        asyncio.run(_drive(server.url, traffic, traffic.order[REQUESTS // 3 :]))
        stats = server.wait_idle()
        after = _resources(server)
        assert stats["adapter_evictions"] > 50
        assert stats["host_evictions"] > 500
        assert stats["host_adapters"] <= 50
        assert after["processes"] == before["processes"]
        assert after["descriptors"] <= before["descriptors"] + 8  # the number of open connections varies
        assert after["resident"] <= before["resident"] + 40_000
        assert after["shared"] <= before["shared"] + 40_000

        asyncio.run(_each(server.url, "/unload_lora_adapter", [{"lora_name": name} for name in paths]))
        stats = server.wait_stats(lambda stats: not (stats["host_adapters"] or stats["host_bytes"]))
        assert set(stats["rank_pages_used"].values()) <= {0}
        assert [card["id"] for card in server.get("/v1/models")["data"]] == [str(model)]
        assert stats["audits"] > 0
    assert "Traceback" not in server.log()
