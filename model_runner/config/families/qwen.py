"""Qwen2, Qwen2.5 and Qwen3, and Qwen3 with experts."""

from __future__ import annotations

from dataclasses import replace

from model_runner.config.config_json import ConfigJson
from model_runner.config.fields import Windows, check_activation, read_plain, windows_by_type
from model_runner.config.model_config import Experts, ModelConfig


def qwen2(config: ConfigJson) -> ModelConfig:
    """Reads the config of Qwen2ForCausalLM."""
    check_activation(config, "hidden_act", "silu", "silu")
    model = read_plain(config, "qwen2", max_length=32768, kv_heads=32)
    return replace(model, qkv_bias=True, windows=_windows(config, model.num_layers))


def qwen3(config: ConfigJson) -> ModelConfig:
    """Reads the config of Qwen3ForCausalLM: q and k are normed."""
    model = _normed(config, read_plain(config, "qwen3", max_length=32768, kv_heads=32, head_dim=128))
    return replace(model, windows=_windows(config, model.num_layers))


def qwen3_moe(config: ConfigJson) -> ModelConfig:
    """Reads the config of Qwen3MoeForCausalLM.

    Every `decoder_sparse_step`-th layer has experts, except the `mlp_only_layers`.
    """
    model = _normed(config, read_plain(config, "qwen3_moe", max_length=32768, kv_heads=4))
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    return replace(
        model,
        windows=(window,) * model.num_layers,
        experts=_experts(config, model.num_layers),
        decoder_class="model_runner.model.decoders.moe:Moe",
    )


def _normed(config: ConfigJson, model: ModelConfig) -> ModelConfig:
    check_activation(config, "hidden_act", "silu", "silu")
    bias = config.flag("attention_bias", False)
    return replace(model, qk_norm=True, qkv_bias=bias, o_bias=bias)


def _experts(config: ConfigJson, layers: int) -> Experts:
    step, dense = config.integer("decoder_sparse_step", 1), config.integers("mlp_only_layers")
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    count, chosen = config.integer(key, 128), config.integer("num_experts_per_tok", 8)
    if chosen > count:
        raise config.wrong("num_experts_per_tok", f"there are {count} experts")
    return Experts(
        layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers)),
        count=count,
        per_token=chosen,
        width=config.integer("moe_intermediate_size", 768),
        renormalize=config.flag("norm_topk_prob", False),
        block="mlp",
        names=("gate_proj", "up_proj", "down_proj"),
    )


def _windows(config: ConfigJson, layers: int) -> Windows:
    """Reads the windows: `layer_types` lists the layers with a window; without it, layers from `max_window_layers` on
    have one.
    """
    null = "sliding_window" in config and config.fields["sliding_window"] is None
    sliding = config.flag("use_sliding_window", False) and not null
    window = config.integer("sliding_window", 4096) if sliding else None
    kinds = config.texts("layer_types")
    if kinds:
        return windows_by_type(config, kinds, layers, window)
    first = config.integer("max_window_layers", 28, least=0)
    return tuple(window if layer >= first else None for layer in range(layers))
