"""config.json to ModelConfig: the families' defaults are those of transformers, and refusals name the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.models.tiny_models import FAMILIES

from engine.errors import ConfigError
from model_runner.config import FAMILIES as SERVED
from model_runner.config import read_model_config
from model_runner.model.layers.weights import Weights
from model_runner.model.load import build_decoder
from model_runner.platform.shard import Shard

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 4096,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
TYPES = {family.model_type: name for name, family in SERVED.items()}


def write(directory: Path, model_type: str = "llama", **fields: Any) -> Path:
    config = {"architectures": [TYPES.get(model_type, model_type)], "model_type": model_type, **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("model_type", TYPES)
def test_absent_fields_have_the_defaults_of_transformers(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model_config = read_model_config(write(tmp_path, model_type))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert model_config.family == model_type.removesuffix("_text")
    assert model_config.num_kv_heads == theirs.num_key_value_heads
    assert model_config.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert model_config.max_length == theirs.max_position_embeddings
    assert model_config.norm_eps == theirs.rms_norm_eps
    assert model_config.tie_embeddings == theirs.tie_word_embeddings
    kinds = getattr(theirs, "layer_types", None) or [""] * 4
    ropes = [theirs.rope_parameters.get(kind, theirs.rope_parameters) for kind in kinds]
    has_rope = getattr(theirs, "no_rope_layers", [1] * 4)
    assert [rope and rope.theta for rope in model_config.ropes] == [
        rope["rope_theta"] if has else None for rope, has in zip(ropes, has_rope, strict=True)
    ]
    if model_type in ("mistral", "phi3", "mixtral", "qwen3_moe"):
        assert model_config.windows == (theirs.sliding_window,) * 4
    else:
        assert model_config.windows == tuple(theirs.sliding_window if "sliding" in kind else None for kind in kinds)


@pytest.mark.parametrize("model_type", TYPES)
def test_absent_family_numbers_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model_config = read_model_config(write(tmp_path, model_type))
    theirs = AutoConfig.from_pretrained(tmp_path)
    query = getattr(theirs, "query_pre_attn_scalar", model_config.head_dim) ** -0.5
    assert model_config.scale == pytest.approx(getattr(theirs, "attention_multiplier", query))
    assert model_config.logit_cap == getattr(theirs, "final_logit_softcapping", None)
    assert model_config.attention_cap == getattr(theirs, "attn_logit_softcapping", None)
    assert model_config.residual_scale == getattr(theirs, "residual_multiplier", 1.0)
    assert model_config.logit_scale == 1 / getattr(theirs, "logits_scaling", 1.0)
    if model_config.experts is not None:
        assert model_config.experts.count == theirs.num_local_experts
        assert model_config.experts.per_token == theirs.num_experts_per_tok
        assert model_config.experts.width == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert model_config.experts.renormalize == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize("name", TYPES.values())
def test_every_family_has_a_decoder_and_a_title(name: str, tmp_path: Path) -> None:
    import transformers

    assert hasattr(transformers, name)
    assert SERVED[name].title
    small = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model_config = read_model_config(write(tmp_path, SERVED[name].model_type, **small))
    assert build_decoder(model_config, Weights(torch.device("meta"), torch.float32, Shard())).sites


def test_tiny_models_cover_all_families(tiny_model: Callable[[str], Path]) -> None:
    assert {read_model_config(tiny_model(name)).family for name in FAMILIES} == {
        kind.removesuffix("_text") for kind in TYPES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_are_those_in_the_checkpoint(family: str, tiny_model: Callable[[str], Path]) -> None:
    from safetensors import safe_open

    model_config = read_model_config(tiny_model(family))
    with safe_open(str(tiny_model(family) / "model.safetensors"), framework="pt") as file:
        names = set(file.keys())
    layer = "model.layers.0"
    assert (
        model_config.fused
        == (f"{layer}.self_attn.qkv_proj.weight" in names)
        == (f"{layer}.mlp.gate_up_proj.weight" in names)
    )
    assert model_config.qkv_bias == (f"{layer}.self_attn.q_proj.bias" in names)
    assert model_config.o_bias == (f"{layer}.self_attn.o_proj.bias" in names)
    assert model_config.mlp_bias == (f"{layer}.mlp.up_proj.bias" in names)
    assert model_config.qk_norm == (f"{layer}.self_attn.q_norm.weight" in names)
    assert model_config.tie_embeddings == ("lm_head.weight" not in names)
    assert model_config.dtype == torch.float32


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
        ("gemma2", {"sliding_window": 7}, (7, None, 7, None)),
        ("gemma2", {"sliding_window": 7, "layer_types": ["full_attention"] * 4}, (None,) * 4),
        ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 2}, (7, None, 7, None)),
        ("phi3", {"sliding_window": 7}, (7,) * 4),
        ("mixtral", {"sliding_window": 7}, (7,) * 4),
        ("qwen3_moe", {"sliding_window": 7}, (None,) * 4),
        ("qwen3_moe", {"sliding_window": 7, "use_sliding_window": True}, (7,) * 4),
        ("smollm3", {"sliding_window": 7}, (None,) * 4),
        ("smollm3", {"sliding_window": 7, "use_sliding_window": True}, (None, None, None, 7)),
    ],
)
def test_windows_by_layer(
    model_type: str, fields: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    assert read_model_config(write(tmp_path, model_type, **fields)).windows == windows


def test_null_softcap_is_none(tmp_path: Path) -> None:
    model_config = read_model_config(
        write(tmp_path, "gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    )
    assert model_config.attention_cap is None
    assert model_config.logit_cap is None


def test_layers_without_rotation(tmp_path: Path) -> None:
    model_config = read_model_config(write(tmp_path, "smollm3", no_rope_layers=[1, 0, 0, 1]))
    assert [rope is not None for rope in model_config.ropes] == [True, False, False, True]


def test_layers_with_experts(tmp_path: Path) -> None:
    experts = read_model_config(
        write(tmp_path, "qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3], num_experts=9)
    ).experts
    assert experts is not None
    assert experts.layers == (False, True, False, False)
    assert experts.count == 9


def test_gemma3_ropes_by_their_old_names(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    fields = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling, "sliding_window_pattern": 2}
    near, far = read_model_config(write(tmp_path, "gemma3_text", **fields)).ropes[:2]
    assert near is not None
    assert far is not None
    assert (near.kind, near.theta) == ("default", 2e4)
    assert (far.kind, far.theta, far.factor) == ("linear", 5e5, 8.0)


def test_dtype_by_its_old_and_new_name(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, torch_dtype="bfloat16")).dtype == torch.bfloat16
    assert read_model_config(write(tmp_path, dtype="float16", torch_dtype="bfloat16")).dtype == torch.float16
    assert read_model_config(write(tmp_path)).dtype == torch.float32


def test_model_type_stands_in_for_absent_architectures(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, "qwen3", architectures=None)).family == "qwen3"


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
        read_model_config(write(tmp_path, **fields))


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping.*Llama"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("mistral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"logits_scaling": 8}, "logits_scaling"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma2", {"sliding_window": None}, "layer_types"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier"),
        ("granite", {"num_experts": 4}, "num_experts"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("qwen3_moe", {"num_experts": 4}, "num_experts_per_tok"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
    ],
)
def test_unserved_field_is_named(model_type: str, fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        read_model_config(write(tmp_path, model_type, **fields))


def test_inert_values_are_accepted(tmp_path: Path) -> None:
    inert = {"embedding_multiplier": 1.0, "use_qk_norm": False, "num_local_experts": 0, "clip_qkv": None}
    assert read_model_config(write(tmp_path, **inert, layer_types=["full_attention"] * 4)).family == "llama"


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("qwen2", ["sliding_attention"] * 4),
        ("qwen2", ["full_attention"] * 3),
        ("qwen2", ["linear_attention"] * 4),
        ("mistral", ["full_attention"] * 4),
    ],
)
def test_impossible_layer_types_are_refused(model_type: str, kinds: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        read_model_config(write(tmp_path, model_type, layer_types=kinds))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"])
def test_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is .* a model directory"):
        read_model_config(tmp_path)
