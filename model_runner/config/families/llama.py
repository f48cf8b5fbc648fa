"""Llama 2 and 3.x, models of the same architecture (SmolLM 1 and 2), and two close variants: Granite and SmolLM3."""

from __future__ import annotations

from dataclasses import replace

from model_runner.config.config_json import ConfigJson
from model_runner.config.fields import Windows, check_activation, read_plain, windows_by_type
from model_runner.config.model_config import ModelConfig


def llama(config: ConfigJson) -> ModelConfig:
    """Reads the config of LlamaForCausalLM."""
    config.seen.add("sliding_window")  # exports of other families have it; a Llama has no sliding window
    return _biased(config, read_plain(config, "llama", max_length=2048))


def granite(config: ConfigJson) -> ModelConfig:
    """Reads the config of GraniteForCausalLM: a Llama with four multipliers."""
    return replace(
        _biased(config, read_plain(config, "granite", max_length=2048)),
        scale=config.number("attention_multiplier", 1.0),
        embed_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logit_scale=1.0 / config.number("logits_scaling", 1.0),
        decoder_class="model_runner.model.decoders.granite:Granite",
    )


def smollm3(config: ConfigJson) -> ModelConfig:
    """Reads the config of SmolLM3ForCausalLM: every fourth layer has no rope."""
    model = read_plain(config, "smollm3", max_length=32768, kv_heads=4, tie=True, theta=2000000.0)
    has_rope = _layers_with_rope(config, model.num_layers)
    return replace(
        _biased(config, model),
        ropes=tuple(rope if has else None for rope, has in zip(model.ropes, has_rope, strict=True)),
        windows=_smollm3_windows(config, has_rope),
    )


def _biased(config: ConfigJson, model: ModelConfig) -> ModelConfig:
    check_activation(config, "hidden_act", "silu", "silu")
    attention = config.flag("attention_bias", False)
    return replace(model, qkv_bias=attention, o_bias=attention, mlp_bias=config.flag("mlp_bias", False))


def _layers_with_rope(config: ConfigJson, layers: int) -> list[bool]:
    """Returns for each layer whether it has a rope."""
    interval = config.integer("no_rope_layer_interval", 4)
    given = config.integers("no_rope_layers")
    if not given:
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(given) < layers or not set(given) <= {0, 1}:
        raise config.wrong("no_rope_layers", f"must hold 0 or 1 for each of {layers} layers")
    return [flag == 1 for flag in given[:layers]]


def _smollm3_windows(config: ConfigJson, has_rope: list[bool]) -> Windows:
    window = config.integer("sliding_window", 0, least=0) or None
    window = window if config.flag("use_sliding_window", False) else None
    slides = [window is not None and not has for has in has_rope]
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return windows_by_type(config, config.texts("layer_types") or kinds, len(has_rope), window)
