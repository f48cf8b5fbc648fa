"""Phi-3 and Phi-4: fused checkpoint tensors, partial rotation of each head, and LongRoPE."""

from __future__ import annotations

from dataclasses import replace

from model_runner.config.config_json import ConfigJson
from model_runner.config.fields import check_activation, read_plain, uniform_windows
from model_runner.config.model_config import ModelConfig
from model_runner.config.rope import read_rope

POSITIONS = 4096
ROPES = {"su": "longrope", "yarn": "longrope"}
"""The names that the first config files of this family use for LongRoPE."""


def phi3(config: ConfigJson) -> ModelConfig:
    """Reads the config of Phi3ForCausalLM (Phi-3 and Phi-4)."""
    check_activation(config, "hidden_act", "silu", "silu")
    rope = read_rope(
        config,
        config.integer("max_position_embeddings", POSITIONS),
        partial=True,
        original=config.integer("original_max_position_embeddings", POSITIONS),
        aliases=ROPES,
    )
    if rope.kind not in ("default", "longrope"):
        raise config.wrong("rope_scaling", f"rope type {rope.kind} is not served for this family")
    model = read_plain(config, "phi3", max_length=POSITIONS, eps=1e-5, rope=rope)
    return replace(model, windows=uniform_windows(config, model.num_layers, None), fused=True)
