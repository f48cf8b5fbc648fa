"""A tensor that is unused, missing or holds a bad value is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.adapters.adapter_zoo import BIASED, ZOO
from fixtures.adapters.refusals import load, refusal
from safetensors.torch import load_file, save_file

from engine.errors import AdapterError
from model_runner.lora.formats import registry
from model_runner.lora.peft.names import WRAPPERS, markers
from model_runner.lora.store import AdapterStore
from model_runner.model.decoders.decoder import Decoder

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # AdaLoRA's are module names
]


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.layers.0.input_layernorm"
SAVED = ("whole head", "whole embedding", "both whole", "all norms", "some norms")
"""Kinds with modules_to_save."""

STRAY = [f"{MODULE}.{marker}" for marker in sorted(markers())] + [
    f"{MODULE}.{marker}.default.{own}" for marker in sorted(markers() | WRAPPERS) for own in ("weight", "bias")
]
STRAY += [f"{MODULE}.{piece}.default" for piece in registry.refused_parts()]
STRAY += [
    f"{MODULE}.weight",
    f"{MODULE}.token_adapter.trainable_tokens_delta",
    "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
    "base_model.model.lm_head.modules_to_save.weight",
    "base_model.model.lm_head.original_module.weight",
    f"{MODULE}.bias",
    f"{MODULE}.lora_A.a.b.weight",
    f"{MODULE}.rotary",
    f"{NORM}.weight",
    f"{NORM}.bias",
    f"{NORM}.modules_to_save.weight",
    f"{NORM}.base_layer.weight",
    f"{NORM}.lora_A.weight",
    f"{NORM}.ia3_l",
    "base_model.model.model.norm.weight",
    "base_model.model.lm_head.weight",
    "base_model.model.model.embed_tokens.weight",
    "prompt_embeddings",
    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
]


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "loha", "lokr", "lora_bias"])
def test_stray_tensor_is_refused_by_name(name: str, decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy(name)
    tensors = load_file(root / WEIGHTS)
    tensors = {key: value for key, value in tensors.items() if ".layers.0.self_attn.o_proj." not in key}
    config = json.loads((root / CONFIG).read_text())
    (root / CONFIG).write_text(json.dumps(config | {"exclude_modules": r"model\.layers\.0\.self_attn\.o_proj"}))
    save_file(tensors, root / WEIGHTS)
    load(decoder.sites, root)
    for stray in STRAY:
        if stray not in tensors:
            save_file(tensors | {stray: torch.zeros(4, 64)}, root / WEIGHTS)
            said = refusal(decoder.sites, root)
            assert repr(stray) in said or (name == "lokr" and stray.rpartition(".")[2] in said), stray


@pytest.mark.parametrize("name", [name for name in ZOO if name not in (*BIASED, *SAVED)])
def test_missing_tensor_is_named(name: str, decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy(name)
    tensors = load_file(root / WEIGHTS)
    prefix = next(key for key in tensors if "base_layer" not in key)
    module = next(key for key in prefix.split(".") if key.endswith(("_proj", "_tokens", "_head", "norm")))
    for missing in [key for key in tensors if f".{module}." in key and "base_layer" not in key][:4]:
        left = {key: value for key, value in tensors.items() if key != missing}
        save_file(left, root / WEIGHTS)
        said = refusal(decoder.sites, root)
        assert module in said, missing
        assert " has no " in said, missing


@pytest.mark.parametrize("name", SAVED)
def test_saved_module_without_its_tensor_is_noted(
    name: str, decoder: Decoder, copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = copy(name)
    tensors = load_file(root / WEIGHTS)
    saved = json.loads((root / CONFIG).read_text())["modules_to_save"]
    left = {key: value for key, value in tensors.items() if not key.endswith(f"{saved[0]}.weight")}
    save_file(left, root / WEIGHTS)
    load(decoder.sites, root)
    assert f"modules_to_save names what has no tensors ({saved[0]!r})" in caplog.text


STRAY_BESIDE_NORMS = {  # stray tensors if "post_attention_layernorm" is in modules_to_save
    f"{NORM}.weight": "replaces a whole module",
    "base_model.model.model.norm.weight": "replaces a whole module",
    "base_model.model.model.layers.9.post_attention_layernorm.weight": "the model has no module",
    "base_model.model.model.layers.0.post_attention_layernorm.bias": "of the model has no bias",
    "base_model.model.model.layers.0.post_attention_layernorm.lokr_w1": "does not target",
    "base_model.model.model.layers.0.post_attention_layernorm.modules_to_save.weight": "has no use beside",
    "base_model.model.model.layers.0.post_attention_layernorm.scale": "belongs to no format",
    "base_model.model.model.layers.0.self_attn.q_norm.weight": "the model has no module",
}


def test_stray_tensor_beside_norms_is_refused_by_name(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("some norms")
    tensors = load_file(root / WEIGHTS)
    for stray, reason in STRAY_BESIDE_NORMS.items():
        save_file(tensors | {stray: torch.ones(64)}, root / WEIGHTS)
        said = refusal(decoder.sites, root)
        assert repr(stray) in said, stray
        assert reason in said, stray
    weight = "base_model.model.model.layers.2.post_attention_layernorm.weight"
    for shape in ((63,), (64, 1), (1, 64), ()):
        save_file(tensors | {weight: torch.ones(shape)}, root / WEIGHTS)
        assert f"{weight!r} has shape {list(shape)}, expected [64]" in refusal(decoder.sites, root)


def test_modules_to_save_means_norms_by_the_end_of_their_name(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("all norms")
    assert sum("norm.weight" in name for name in load_file(root / WEIGHTS)) == 7  # PEFT matches the end of the name
    held = load(decoder.sites, root)
    assert held.footprint.pages == {"down": 1, "norms.full": 1}
    assert set(held.targets) == {"down_proj", "input_layernorm", "norm", "post_attention_layernorm"}
    store = AdapterStore(decoder.sites, torch.float32, max_rank=None, targets=["down_proj"])
    with pytest.raises(AdapterError, match=r"targets input_layernorm, norm, .*--lora-target-modules down_proj"):
        store.load(1, "fox", root)
    config = json.loads((root / CONFIG).read_text())
    (root / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["norm", "rotary_emb"]}))
    load(decoder.sites, root)
    (root / CONFIG).write_text(json.dumps(config | {"target_modules": ["norm"]}))
    assert "the model has no module 'norm'" in refusal(decoder.sites, root)


@pytest.mark.parametrize("name", ["dora", "adalora", "loha", "lokr", "lora_bias", "bias all", "all norms"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tensor_with_a_value_that_is_not_finite_is_named(
    name: str, bad: float, decoder: Decoder, copy: Callable[[str], Path]
) -> None:
    root = copy(name)
    tensors = load_file(root / WEIGHTS)
    spoiled = max(tensors, key=lambda key: (key.endswith(("vector", "lora_E", "bias", "w2_b", "norm.weight")), key))
    tensors[spoiled].view(-1)[-1] = bad
    save_file(tensors, root / WEIGHTS)
    assert f"tensor {spoiled!r} holds NaN or infinity" in refusal(decoder.sites, root)


def test_biases_can_be_forbidden(zoo: dict[str, Path], decoder: Decoder) -> None:
    for name in ("lora_bias", *BIASED):
        assert "--no-enable-lora-bias" in refusal(decoder.sites, zoo[name], biases=False)
    load(decoder.sites, zoo["dora"], biases=False)
