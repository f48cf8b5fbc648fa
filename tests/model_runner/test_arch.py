"""config.json to Arch: the families' defaults as transformers has them, and refusals that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES

from engine.errors import ConfigError
from model_runner.arch import read_arch

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 4096,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write(directory: Path, model_type: str = "llama", **fields: Any) -> Path:
    config = {"architectures": [TYPES.get(model_type, model_type)], "model_type": model_type, **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("model_type", TYPES)
def test_absent_fields_mean_what_transformers_means(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    arch = read_arch(write(tmp_path, model_type))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert arch.family == model_type
    assert arch.num_kv_heads == theirs.num_key_value_heads
    assert arch.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert arch.max_length == theirs.max_position_embeddings
    assert arch.norm_eps == theirs.rms_norm_eps
    assert arch.tie_embeddings == theirs.tie_word_embeddings
    assert arch.rope.theta == theirs.rope_parameters["rope_theta"]
    sliding = theirs.sliding_window if model_type == "mistral" else None
    assert arch.windows == (sliding,) * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_are_those_in_the_checkpoint(family: str, tiny_model: Callable[[str], Path]) -> None:
    from safetensors import safe_open

    arch = read_arch(tiny_model(family))
    with safe_open(str(tiny_model(family) / "model.safetensors"), framework="pt") as file:
        names = set(file.keys())
    layer = "model.layers.0"
    assert arch.qkv_bias == (f"{layer}.self_attn.q_proj.bias" in names)
    assert arch.o_bias == (f"{layer}.self_attn.o_proj.bias" in names)
    assert arch.mlp_bias == (f"{layer}.mlp.up_proj.bias" in names)
    assert arch.qk_norm == (f"{layer}.self_attn.q_norm.weight" in names)
    assert arch.tie_embeddings == ("lm_head.weight" not in names)
    assert arch.dtype == torch.float32


@pytest.mark.parametrize(
    ("model_type", "fields", "windows"),
    [
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mistral", {"sliding_window": 7}, (7,) * 4),
        ("qwen2", {"sliding_window": 7}, (None,) * 4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}, (None, None, None, 7)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, (None,) * 4),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 4),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (5, None, 5, None),
        ),
        ("llama", {"sliding_window": 7}, (None,) * 4),
    ],
)
def test_windows(model_type: str, fields: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path) -> None:
    assert read_arch(write(tmp_path, model_type, **fields)).windows == windows


def test_dtype_by_its_old_and_new_name(tmp_path: Path) -> None:
    assert read_arch(write(tmp_path, torch_dtype="bfloat16")).dtype == torch.bfloat16
    assert read_arch(write(tmp_path, dtype="float16", torch_dtype="bfloat16")).dtype == torch.float16
    assert read_arch(write(tmp_path)).dtype == torch.float32


def test_model_type_serves_where_architectures_is_absent(tmp_path: Path) -> None:
    assert read_arch(write(tmp_path, "qwen3", architectures=None)).family == "qwen3"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, "bert"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 31}, "head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        read_arch(write(tmp_path, **fields))


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("qwen2", ["sliding_attention"] * 4),
        ("qwen2", ["full_attention"] * 3),
        ("qwen2", ["linear_attention"] * 4),
        ("mistral", ["full_attention"] * 4),
    ],
)
def test_layer_types_that_cannot_be(model_type: str, kinds: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        read_arch(write(tmp_path, model_type, layer_types=kinds))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_arch(tmp_path)


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is .* a model directory"):
        read_arch(tmp_path)
