"""Every format in one batch with the base, token by token against transformers + PEFT in float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from fixtures.adapters.adapter_zoo import BIASED, ZOO, merged, save
from fixtures.adapters.resident import attach_adapters
from fixtures.models.drive import Driver
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB
from safetensors.torch import load_file

from model_runner.compute.ops.triton_ops import TritonOps
from model_runner.config import read_model_config
from model_runner.model.load import load_model

N = 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),  # Llama's linears have no bias
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # AdaLoRA's are module names
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match"),  # patterns name fused modules
]


FAMILIES = (
    *("llama2", "llama3", "llama-bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite"),
    *("smollm3", "olmo2", "mixtral", "qwen3-moe"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_in_one_batch_equals_peft(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
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
            if oracle.is_unambiguous(prompt, N, name):
                break
        asks.append((prompt, lane))
        expected.append(oracle.greedy(prompt, N, name))
        if name and name not in BIASED:  # PEFT changes the base's own biases
            moved = oracle.logits(prompt, name) - oracle.logits(prompt)
            assert moved.abs().max() > 0.05, f"{name} has no effect"

    decoder = load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32)
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
    {"all norms": 0.5, "some norms": -0.75, "lokr": 0.5},
]


def test_mix_is_the_weighted_sum_of_its_changes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
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
            if oracle.is_unambiguous(prompt, N):
                asks.append((prompt, len(adapters) + 1 + number))
                expected.append(oracle.greedy(prompt, N))
    decoder = load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32)
    lora = attach_adapters(decoder, adapters, MIXES)
    prompts, lanes = [prompt for prompt, _ in asks], [lane for _, lane in asks]
    assert Driver(decoder, lora=lora, pages=900).greedy(prompts, N, lanes=lanes) == expected


KERNEL_N = 3


@pytest.fixture(scope="module")
def everything(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path], list[list[int]], list[list[int]]]:
    """A base with biases, an adapter of every format, a prompt for the base and for each, and the oracle's tokens."""
    path, root = tiny_model("llama-bias"), tmp_path_factory.mktemp("everything")
    adapters = {name: save(path, root / name, config(), seed) for seed, (name, config) in enumerate(ZOO.items())}
    draw, prompts, expected = random.Random(9), [], []
    for name in [None, *adapters]:
        oracle, prompt = Oracle(path, {name: adapters[name]} if name else None), list[int]()
        while not prompt or not oracle.is_unambiguous(prompt, KERNEL_N, name):
            prompt = [draw.randrange(VOCAB) for _ in range(draw.choice([1, 2, 5]))]
        prompts.append(prompt)
        expected.append(oracle.greedy(prompt, KERNEL_N, name))
    return path, adapters, prompts, expected


@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_kernels_give_pefts_tokens_for_every_format(
    backend: str,
    everything: tuple[Path, dict[str, Path], list[list[int]], list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, adapters, prompts, expected = everything
    monkeypatch.setattr("model_runner.compute.ops.base.create", lambda device: TritonOps())  # the norms are kernels too
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = load_model(path, read_model_config(path), device=device, dtype=torch.float32)
    lora = attach_adapters(decoder, adapters, backend=backend)
    driver = Driver(decoder, lora=lora, pages=300, device=device.type)
    found = driver.greedy(prompts, KERNEL_N, lanes=list(range(len(prompts))))
    wrong = {name for name, one, other in zip([None, *adapters], found, expected, strict=True) if one != other}
    assert not wrong
