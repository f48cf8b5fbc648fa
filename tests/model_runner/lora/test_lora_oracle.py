"""Whole models with adapters against transformers + PEFT: base and adapters, one by one and in one batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.resident import attach_adapters
from fixtures.models.drive import Driver
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, make_adapter

from model_runner.config import read_model_config
from model_runner.model.load import load_model

N = 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

ADAPTERS: dict[str, dict[str, Any]] = {
    "everything": {"r": 8, "alpha": 16},
    "one": {"r": 1, "alpha": 2, "targets": ["q_proj", "v_proj"]},
    "uneven": {"r": 5, "alpha": 7, "targets": ATTENTION, "rslora": True},
    "two pages": {"r": 20, "alpha": 30, "targets": ["k_proj", "up_proj", "down_proj"]},
    "patterns": {"r": 4, "alpha": 8, "rank_pattern": {"o_proj": 17, "gate_proj": 2}, "alpha_pattern": {"o_proj": 20}},
    "regex": {"r": 16, "alpha": 32, "targets": r".*\.(gate_proj|o_proj)"},
    "last layer": {"r": 6, "alpha": 12, "targets": ATTENTION, "layers_to_transform": [2]},
}


FUSED_ADAPTERS: dict[str, dict[str, Any]] = {
    "everything": {"r": 8, "alpha": 16, "targets": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "all linear": {"r": 3, "alpha": 5, "targets": "all-linear"},
    "one": {"r": 1, "alpha": 2, "targets": ["qkv_proj"]},
    "two pages": {"r": 20, "alpha": 30, "targets": ["gate_up_proj", "down_proj"]},
    "patterns": {"r": 4, "alpha": 8, "targets": ["qkv_proj", "o_proj"], "rank_pattern": {"qkv_proj": 17}},
    "last layer": {"r": 6, "alpha": 12, "targets": ["qkv_proj"], "layers_to_transform": [2]},
}
"""Adapters for a model whose checkpoint is fused: q, k and v share one A."""

ATTENTION_ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "alpha": 16, "targets": ATTENTION},
    "one": {"r": 1, "alpha": 2, "targets": ["q_proj", "v_proj"]},
    "two pages": {"r": 20, "alpha": 30, "targets": ["k_proj", "o_proj"]},
    "last layer": {"r": 6, "alpha": 12, "targets": ATTENTION, "layers_to_transform": [2]},
}
"""Adapters for a model with experts: they change the attention only."""

SETS = {"phi3": FUSED_ADAPTERS, "mixtral": ATTENTION_ADAPTERS, "qwen3-moe": ATTENTION_ADAPTERS}
MODELS = (
    "llama2",
    "llama3",
    "llama-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "granite",
    "smollm3",
    "olmo2",
)


@pytest.mark.parametrize("family", [*MODELS, *SETS])
def test_mixed_batch_equals_peft(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model(family)
    adapters = {
        name: make_adapter(path, tmp_path / name, seed=seed, **options)
        for seed, (name, options) in enumerate(SETS.get(family, ADAPTERS).items())
    }
    oracle = Oracle(path, adapters)
    draw, names = random.Random(11), [None, *adapters]
    asks: list[tuple[list[int], int]] = []
    while len(asks) < 24:
        lane = len(asks) % len(names)
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 40))]
        if oracle.is_unambiguous(prompt, N, names[lane]):
            asks.append((prompt, lane))
    expected = [oracle.greedy(prompt, N, names[lane]) for prompt, lane in asks]
    for prompt, lane in asks[1 : len(names)]:
        moved = oracle.logits(prompt, names[lane]) - oracle.logits(prompt)
        assert moved.abs().max() > 0.1, "an adapter without effect"

    decoder = load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32)
    lora = attach_adapters(decoder, adapters)
    prompts, lanes = [prompt for prompt, _ in asks], [lane for _, lane in asks]
    assert Driver(decoder, lora=lora, pages=600).greedy(prompts, N, lanes=lanes) == expected
    assert Driver(decoder, lora=lora, pages=600).greedy(prompts, N, lanes=lanes, chunk=9, late=1) == expected
    for (prompt, lane), tokens in list(zip(asks, expected, strict=True))[:8]:
        assert Driver(decoder, lora=lora).greedy([prompt], N, lanes=[lane]) == [tokens]
