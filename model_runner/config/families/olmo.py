"""OLMo 2: norms after attention and MLP, and q and k normed over all heads at once."""

from __future__ import annotations

from dataclasses import replace

from model_runner.config.config_json import ConfigJson
from model_runner.config.fields import check_activation, read_plain
from model_runner.config.model_config import ModelConfig


def olmo2(config: ConfigJson) -> ModelConfig:
    """Reads the config of Olmo2ForCausalLM."""
    check_activation(config, "hidden_act", "silu", "silu")
    bias = config.flag("attention_bias", False)
    return replace(
        read_plain(config, "olmo2", max_length=2048, eps=1e-5),
        qkv_bias=bias,
        o_bias=bias,
        norm="wide",
        qk_norm=True,
        decoder_class="model_runner.model.decoders.olmo:Olmo2",
    )
