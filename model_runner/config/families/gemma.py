"""Gemma 2 and Gemma 3 (text): norms before and after, scaled embeddings, windows that alternate, capped scores."""

from __future__ import annotations

from dataclasses import replace

from model_runner.config.config_json import ConfigJson
from model_runner.config.fields import Windows, activation, check_rope, plain, typed_windows
from model_runner.config.model_config import ModelConfig
from model_runner.config.rope import Rope, parse_rope

POSITIONS = {"gemma2": 8192, "gemma3": 131072}
LOCAL_THETA, GLOBAL_THETA = 10000.0, 1000000.0


def gemma2(config: ConfigJson) -> ModelConfig:
    """Gemma2ForCausalLM: every other layer slides."""
    model = plain(config, "gemma2", max_length=POSITIONS["gemma2"], kv_heads=4, head_dim=256, tie=True)
    return replace(
        _gemma(config, model),
        windows=_windows(config, model.num_layers, pattern=2),
        attention_cap=config.nullable("attn_logit_softcapping", 50.0),
        logit_cap=config.nullable("final_logit_softcapping", 30.0),
    )


def gemma3(config: ConfigJson) -> ModelConfig:
    """Gemma3ForCausalLM: five of six layers slide, and these turn faster; q and k are normed."""
    positions = config.integer("max_position_embeddings", POSITIONS["gemma3"])
    far, near = _ropes(config, positions)
    model = plain(config, "gemma3", max_length=positions, kv_heads=4, head_dim=256, tie=True, rope=far)
    check_rope(config, near, model.head_dim)
    pattern = "_sliding_window_pattern" if "_sliding_window_pattern" in config else "sliding_window_pattern"
    windows = _windows(config, model.num_layers, pattern=config.integer(pattern, 6))
    return replace(
        _gemma(config, model),
        windows=windows,
        ropes=tuple(far if window is None else near for window in windows),
        logit_cap=config.nullable("final_logit_softcapping", None),
        qk_norm=True,
    )


def _gemma(config: ConfigJson, model: ModelConfig) -> ModelConfig:
    activation(config, "hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    config.seen.add("hidden_act")  # older files say it twice, and hidden_activation is what counts
    bias = config.flag("attention_bias", False)
    return replace(
        model,
        qkv_bias=bias,
        o_bias=bias,
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        norm="gemma",
        activation="gelu_tanh",
        embed_scale=model.hidden_size**0.5,
        decoder_class="model_runner.model.families.gemma:Gemma",
    )


def _windows(config: ConfigJson, layers: int, *, pattern: int) -> Windows:
    """Without `layer_types` every `pattern`-th layer sees everything."""
    kinds = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    null = "sliding_window" in config and config.fields["sliding_window"] is None
    window = None if null else config.integer("sliding_window", 4096)
    return typed_windows(config, config.texts("layer_types") or kinds, layers, window)


def _ropes(config: ConfigJson, positions: int) -> tuple[Rope, Rope]:
    """Of the layers that see everything and of those that slide: nested (transformers 5), or in fields of their own."""
    far, near = config.number("rope_theta", GLOBAL_THETA), config.number("rope_local_base_freq", LOCAL_THETA)
    given = config.inner("rope_parameters")
    scaling = config.inner("rope_scaling")
    foreign = sorted(key for key in given.fields if key not in ("full_attention", "sliding_attention"))
    if foreign or (given.fields and scaling.fields):
        raise config.wrong("rope_parameters", "must hold full_attention and sliding_attention, beside no rope_scaling")
    return (
        parse_rope(scaling if scaling.fields else given.inner("full_attention"), positions, theta=far),
        parse_rope(given.inner("sliding_attention"), positions, theta=near),
    )
