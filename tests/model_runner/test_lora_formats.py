"""Every format in one batch with the base, token by token against transformers + PEFT in float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from adapter_zoo import BIASED, ZOO, merged, save
from drive import Driver, Row
from oracle import Oracle
from resident import attach_adapters
from safetensors.torch import load_file
from tiny_models import VOCAB

from model_runner.arch import read_arch
from model_runner.models.load import load_model

N = 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),  # to a layer without a bias: all of Llama's
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # AdaLoRA's are no patterns
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match"),  # of modules that are fused
]


FAMILIES = (
    *("llama2", "llama3", "llama-bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite"),
    *("smollm3", "olmo2", "mixtral", "qwen3-moe"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_in_one_batch(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model(family)
    has_biases = any(name.endswith("bias") for name in load_file(path / "model.safetensors"))
    names = [name for name in ZOO if has_biases or name not in BIASED]
    adapters = {name: save(path, tmp_path / name, ZOO[name](), seed) for seed, name in enumerate(names)}
    draw = random.Random(5)
    asks, expected = [], []
    for lane, name in enumerate([None, *names]):
        oracle = Oracle(path, {name: adapters[name]} if name else None)
        while True:
            prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 30))]
            if oracle.clear(prompt, N, name):
                break
        asks.append((prompt, lane))
        expected.append(oracle.greedy(prompt, N, name))
        if name and name not in BIASED:  # with those, what PEFT calls the base is not the base
            moved = oracle.logits(prompt, name) - oracle.logits(prompt)
            assert moved.abs().max() > 0.05, f"{name} has no effect"

    decoder = load_model(path, read_arch(path), device=torch.device("cpu"), dtype=torch.float32)
    lora = attach_adapters(decoder, adapters)
    prompts, lanes = [prompt for prompt, _ in asks], [lane for _, lane in asks]
    together = Driver(decoder, lora=lora, pages=900).greedy(prompts, N, lanes=lanes)
    wrong = {([None, *names])[lane] for lane, one, other in zip(lanes, together, expected, strict=True) if one != other}
    assert not wrong
    assert Driver(decoder, lora=lora, pages=900).greedy(prompts, N, lanes=lanes, chunk=9, late=1) == expected


MIXES: list[dict[str, float]] = [
    {"dora": 0.5, "dora rslora": 0.75},
    {"dora": -0.25, "loha": 1.0, "adalora": 0.5},
    {"lokr": 2.0, "head": 0.5, "embedding dora": 0.5, "embedding": 0.25},
    {"both whole": 0.5, "whole embedding": 0.25, "head": 0.5},
]


def test_a_mix_is_the_weighted_sum_of_what_each_changes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama2")
    names = list(dict.fromkeys(name for mix in MIXES for name in mix))
    adapters = {name: save(path, tmp_path / name, ZOO[name](), seed) for seed, name in enumerate(names)}
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    own = {key: value.clone() for key, value in base.state_dict().items()}
    changed = {name: merged(path, root) for name, root in adapters.items()}
    draw, asks, expected = random.Random(3), [], []
    for number, mix in enumerate(MIXES):
        moved = {key: [s * (changed[name][key] - value) for name, s in mix.items()] for key, value in own.items()}
        base.load_state_dict({key: value + sum(moved[key]) for key, value in own.items()})
        base.save_pretrained(tmp_path / f"mix{number}")
        oracle = Oracle(tmp_path / f"mix{number}")
        while len(asks) < 3 * (number + 1):
            prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 30))]
            if oracle.clear(prompt, N):
                asks.append((prompt, len(adapters) + 1 + number))
                expected.append(oracle.greedy(prompt, N))
    decoder = load_model(path, read_arch(path), device=torch.device("cpu"), dtype=torch.float32)
    lora = attach_adapters(decoder, adapters, MIXES)
    prompts, lanes = [prompt for prompt, _ in asks], [lane for _, lane in asks]
    assert Driver(decoder, lora=lora, pages=900).greedy(prompts, N, lanes=lanes) == expected


@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_the_kernels_serve_every_format_too(backend: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama-bias")
    names = ["lora", "dora rslora", "lora_bias", "bias all", "adalora", "loha", "lokr", "head", "embedding dora"]
    names += ["both whole"]
    adapters = {name: save(path, tmp_path / name, ZOO[name](), seed) for seed, name in enumerate(names)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = load_model(path, read_arch(path), device=device, dtype=torch.float32)
    draw = random.Random(9)
    prompts = [[draw.randrange(VOCAB) for _ in range(draw.choice([1, 2, 5]))] for _ in range(len(names) + 1)]
    lanes = list(range(len(prompts)))
    slow = attach_adapters(decoder, adapters)
    rows = [Row(list(prompt), lane) for prompt, lane in zip(prompts, lanes, strict=True)]
    expected = Driver(decoder, lora=slow, device=device.type).step([(row, len(row.tokens)) for row in rows])
    fast = attach_adapters(decoder, adapters, backend=backend)
    rows = [Row(list(prompt), lane) for prompt, lane in zip(prompts, lanes, strict=True)]
    logits = Driver(decoder, lora=fast, device=device.type).step([(row, len(row.tokens)) for row in rows])
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)
