"""Mistral, and Mixtral, whose MLP is a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from model_runner.config.config_json import ConfigJson
from model_runner.config.fields import check_activation, read_plain, uniform_windows
from model_runner.config.model_config import Experts, ModelConfig

POSITIONS = 4096 * 32


def mistral(config: ConfigJson) -> ModelConfig:
    """Reads the config of MistralForCausalLM."""
    check_activation(config, "hidden_act", "silu", "silu")
    model = read_plain(config, "mistral", max_length=POSITIONS, kv_heads=8)
    return replace(model, windows=uniform_windows(config, model.num_layers, 4096))


def mixtral(config: ConfigJson) -> ModelConfig:
    """Reads the config of MixtralForCausalLM."""
    check_activation(config, "hidden_act", "silu", "silu")
    model = read_plain(config, "mixtral", max_length=POSITIONS, kv_heads=8, eps=1e-5, theta=1e6)
    count, chosen = config.integer("num_local_experts", 8), config.integer("num_experts_per_tok", 2)
    if chosen > count:
        raise config.wrong("num_experts_per_tok", f"there are {count} experts")
    return replace(
        model,
        windows=uniform_windows(config, model.num_layers, None),
        experts=Experts(
            layers=(True,) * model.num_layers,
            count=count,
            per_token=chosen,
            width=model.intermediate_size,
            renormalize=True,
            block="block_sparse_moe",
            names=("w1", "w3", "w2"),
        ),
        decoder_class="model_runner.model.decoders.moe:Moe",
    )
