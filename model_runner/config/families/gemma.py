"""Gemma 2 and Gemma 3 (text): norms before and after attention and MLP, scaled embeddings, windows, softcaps."""

from __future__ import annotations

from dataclasses import replace

from model_runner.config.config_json import ConfigJson
from model_runner.config.fields import Windows, check_activation, check_rope, read_plain, windows_by_type
from model_runner.config.model_config import ModelConfig
from model_runner.config.rope import Rope, parse_rope

POSITIONS = {"gemma2": 8192, "gemma3": 131072}
LOCAL_THETA, GLOBAL_THETA = 10000.0, 1000000.0


def gemma2(config: ConfigJson) -> ModelConfig:
    """Reads the config of Gemma2ForCausalLM: every other layer has a sliding window."""
    model = read_plain(config, "gemma2", max_length=POSITIONS["gemma2"], kv_heads=4, head_dim=256, tie=True)
    return replace(
        _gemma(config, model),
        windows=_windows(config, model.num_layers, pattern=2),
        attention_cap=config.nullable("attn_logit_softcapping", 50.0),
        logit_cap=config.nullable("final_logit_softcapping", 30.0),
    )


def gemma3(config: ConfigJson) -> ModelConfig:
    """Reads the config of the text model of Gemma 3 (Gemma3ForCausalLM).

    Five of six layers have a sliding window and a separate rope; q and k are normed.
    """
    positions = config.integer("max_position_embeddings", POSITIONS["gemma3"])
    global_rope, local_rope = _ropes(config, positions)
    model = read_plain(config, "gemma3", max_length=positions, kv_heads=4, head_dim=256, tie=True, rope=global_rope)
    check_rope(config, local_rope, model.head_dim)
    pattern = "_sliding_window_pattern" if "_sliding_window_pattern" in config else "sliding_window_pattern"
    windows = _windows(config, model.num_layers, pattern=config.integer(pattern, 6))
    return replace(
        _gemma(config, model),
        windows=windows,
        ropes=tuple(global_rope if window is None else local_rope for window in windows),
        logit_cap=config.nullable("final_logit_softcapping", None),
        qk_norm=True,
    )


def _gemma(config: ConfigJson, model: ModelConfig) -> ModelConfig:
    check_activation(config, "hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    config.seen.add("hidden_act")  # ignored: older files have it too, but hidden_activation counts
    bias = config.flag("attention_bias", False)
    return replace(
        model,
        qkv_bias=bias,
        o_bias=bias,
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        norm="gemma",
        activation="gelu_tanh",
        embed_scale=model.hidden_size**0.5,
        decoder_class="model_runner.model.decoders.gemma:Gemma",
    )


def _windows(config: ConfigJson, layers: int, *, pattern: int) -> Windows:
    """Reads the windows from `layer_types`; without it, every `pattern`-th layer has full attention."""
    kinds = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    null = "sliding_window" in config and config.fields["sliding_window"] is None
    window = None if null else config.integer("sliding_window", 4096)
    return windows_by_type(config, config.texts("layer_types") or kinds, layers, window)


def _ropes(config: ConfigJson, positions: int) -> tuple[Rope, Rope]:
    """Reads the ropes of the layers with full attention and with windows, in this order.

    They are nested objects (transformers 5) or separate fields.
    """
    global_theta, local_theta = (
        config.number("rope_theta", GLOBAL_THETA),
        config.number("rope_local_base_freq", LOCAL_THETA),
    )
    given = config.inner("rope_parameters")
    scaling = config.inner("rope_scaling")
    foreign = sorted(key for key in given.fields if key not in ("full_attention", "sliding_attention"))
    if foreign or (given.fields and scaling.fields):
        raise config.wrong("rope_parameters", "must hold full_attention and sliding_attention, beside no rope_scaling")
    return (
        parse_rope(scaling if scaling.fields else given.inner("full_attention"), positions, theta=global_theta),
        parse_rope(given.inner("sliding_attention"), positions, theta=local_theta),
    )
