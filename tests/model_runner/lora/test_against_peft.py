"""Adapters saved by PEFT itself, read into the normal form: each module's A and B give PEFT's own delta weight."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.lora_sites import llama_sites
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.errors import AdapterError
from model_runner.lora.normal_form import pages_for
from model_runner.lora.store import AdapterStore

torch.set_num_threads(1)

CASES: dict[str, dict[str, Any]] = {
    "list": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "every module": {
        "r": 20,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "full names": {"r": 3, "target_modules": ["model.layers.1.mlp.down_proj", "0.self_attn.o_proj"]},
    "regex": {"r": 8, "lora_alpha": 16, "target_modules": r".*\.layers\.[02]\..*(q|up)_proj"},
    "regex for the whole name": {"r": 3, "target_modules": r"model.*\.1\..*k_proj|.*up_pro|layers.*"},
    "regex with flag": {"r": 2, "target_modules": r"(?i).*\.GATE_PROJ"},
    "all-linear": {"r": 5, "lora_alpha": 3, "target_modules": "all-linear"},
    "all-linear but": {"r": 5, "target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]},
    "exclude regex": {"r": 2, "target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.1\..*"},
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1},
    "two layers": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers pattern": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["blocks", "layers"],
    },
    "no layers is all layers": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": []},
    "rslora": {"r": 9, "lora_alpha": 7, "target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 17, r"layers\.[01]\.self_attn\.q_proj": 2},
        "alpha_pattern": {"q_proj": 3, "model.layers.2.mlp.down_proj": 64},
    },
    "patterns and rslora": {
        "r": 4,
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"o_proj": 33, "^model.layers.0.mlp.up_proj": 1},
        "alpha_pattern": {".*_proj": 5},
    },
    "gaussian": {"r": 4, "target_modules": ["o_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    "orthogonal": {"r": 4, "target_modules": ["o_proj"], "init_lora_weights": "orthogonal"},
    "high rank": {"r": 512, "target_modules": ["k_proj"]},
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def save(root: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Saves a PEFT model with random A and B to `root`, and returns the model."""
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) / 8).to(dtype)
    model.save_pretrained(root)
    return model


def store_for(model: Any, dtype: torch.dtype = torch.float32) -> AdapterStore:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    sites = llama_sites_of_wrapped(base)
    return AdapterStore(sites, dtype, max_rank=None, targets=None)


def llama_sites_of_wrapped(base: Any) -> list[Any]:
    """Returns the sites of a new model of the same shapes, because PEFT has replaced the linears in place."""
    return llama_sites(base.__class__(base.config))


def peft_deltas(model: Any) -> dict[str, torch.Tensor]:
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


@pytest.mark.parametrize("case", CASES)
def test_delta_weights_equal_pefts(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, CASES[case])
    adapter = store_for(model).load(1, case, tmp_path)
    expected = peft_deltas(model)
    seen = {}
    for site in llama_sites_of_wrapped(model.get_base_model()):
        for piece, delta in zip(site.slices, adapter.deltas.get(site.name, (None,) * len(site.slices)), strict=True):
            if delta is not None:
                seen[f"{site.path}.{piece.module}"] = (delta.a.t() @ delta.b).t()
    assert seen.keys() == expected.keys()
    for name, delta in seen.items():
        torch.testing.assert_close(delta, expected[name], atol=1e-6, rtol=1e-5)
    ranks = [layer.r["default"] for layer in model.get_base_model().modules() if hasattr(layer, "lora_A")]
    assert adapter.rank == max(ranks)
    assert max(adapter.footprint.pages.values()) == pages_for(max(ranks))
    assert adapter.cast_from == []


def test_layers_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    model = save(tmp_path, {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]})
    config = (tmp_path / "adapter_config.json").read_text()
    config = config.replace('"layers_pattern": null', '"layers_pattern": "blocks"')
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match="layers_to_transform"):
        store_for(model).load(1, "x", tmp_path)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_cast_and_reported(saved: torch.dtype, tmp_path: Path) -> None:
    model = save(tmp_path, CASES["list"], saved)
    adapter = store_for(model).load(1, "x", tmp_path)
    assert adapter.cast_from == [str(saved).removeprefix("torch.")]
    for slices in adapter.deltas.values():
        assert all(delta is None or (delta.a.dtype, delta.b.dtype) == (torch.float32,) * 2 for delta in slices)


def test_scaling_is_folded_in_float32_before_the_cast(tmp_path: Path) -> None:
    model = save(tmp_path, CASES["rslora"])
    adapter = store_for(model, torch.bfloat16).load(1, "x", tmp_path)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    delta = adapter.deltas["layers.0.qkv"][0]
    assert delta is not None
    assert torch.equal(delta.b, (layer.lora_B["default"].weight.t() * layer.scaling["default"]).bfloat16())


def test_tensor_names_may_hold_the_adapters_name(tmp_path: Path) -> None:
    model = save(tmp_path, CASES["list"])
    store = store_for(model)
    plain = store.load(1, "plain", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({re.sub(r"(lora_[AB])", r"\1.default", name): tensor for name, tensor in load_file(path).items()}, path)
    infixed = store.load(2, "infixed", tmp_path)
    assert infixed.revision != plain.revision
    for name, slices in plain.deltas.items():
        for ours, theirs in zip(slices, infixed.deltas[name], strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or (torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b))


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "replication": ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
    "olora": ({"init_lora_weights": "olora"}, 'init_lora_weights="olora"'),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_peft_options_are_refused_by_name(case: str, tmp_path: Path) -> None:
    extra, named = UNSUPPORTED[case]
    model = save(tmp_path, {"r": 4, "target_modules": ["q_proj"]} | extra)
    plain = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 3}))
    store = AdapterStore(llama_sites(plain), torch.float32, max_rank=None, targets=None)
    with pytest.raises(AdapterError) as caught:
        store.load(1, "strange", tmp_path)
    assert named in caught.value.message
    assert "'strange'" in caught.value.message
    assert "\n" not in caught.value.message
