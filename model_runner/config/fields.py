"""Reads the config.json fields that all families share into a ModelConfig, in which each family replaces what differs.

Does not depend on any family's module.
"""

from __future__ import annotations

import torch

from model_runner.config.config_json import ConfigJson
from model_runner.config.model_config import ModelConfig
from model_runner.config.rope import Rope, extended_length, read_rope

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float32}
KINDS = ("full_attention", "sliding_attention")

Windows = tuple[int | None, ...]


def read_plain(
    config: ConfigJson,
    family: str,
    *,
    max_length: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps: float = 1e-6,
    tie: bool = False,
    rope: Rope | None = None,
    theta: float = 10000.0,
) -> ModelConfig:
    """Reads the ModelConfig of a Llama without biases and windows; the keyword arguments are the family's defaults.

    `kv_heads` None: as many as query heads; `head_dim` None: hidden_size / heads; `rope` None: read with base `theta`.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    layers, positions = config.integer("num_hidden_layers"), config.integer("max_position_embeddings", max_length)
    own = heads if "num_key_value_heads" in config else kv_heads or heads  # null means as many as query heads
    groups = config.integer("num_key_value_heads", own)
    size = config.integer("head_dim", head_dim or hidden // heads)
    rope = rope or read_rope(config, positions, theta=theta)
    if heads % groups:
        raise config.wrong("num_key_value_heads", f"must divide num_attention_heads={heads}")
    check_rope(config, rope, size)
    return ModelConfig(
        family=family,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=size,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_length=extended_length(rope, positions),
        tie_embeddings=config.flag("tie_word_embeddings", tie),
        windows=(None,) * layers,
        ropes=(rope,) * layers,
        norm_eps=config.number("rms_norm_eps", eps),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        dtype=_dtype(config),
        scale=size**-0.5,
    )


def check_rope(config: ConfigJson, rope: Rope, head_dim: int) -> None:
    """Raises ConfigError if the rope does not fit the head size."""
    rotary_dim = rope.rotary_dim(head_dim)
    if rotary_dim < 2 or rotary_dim % 2:
        raise config.wrong(
            "head_dim", f"{rotary_dim} dimensions of a head are rotated; rotary embeddings need an even number"
        )
    if rope.kind == "longrope" and len(rope.short_divisors) != rotary_dim // 2:
        given, pairs = len(rope.short_divisors), rotary_dim // 2
        raise config.wrong("head_dim", f"short_factor has {given} numbers, and {pairs} pairs of dimensions are rotated")


def uniform_windows(config: ConfigJson, layers: int, default: int | None) -> Windows:
    """Returns `sliding_window` as the window of every layer; null: no window."""
    window = None
    if "sliding_window" not in config:
        window = default
    elif config.fields["sliding_window"] is not None:
        window = config.integer("sliding_window")
    kind = KINDS[window is not None]
    if any(item != kind for item in config.texts("layer_types")):
        raise config.wrong("layer_types", f"a model of this family has {kind} in every layer")
    return (window,) * layers


def windows_by_type(config: ConfigJson, kinds: list[str], layers: int, window: int | None) -> Windows:
    """Returns the windows by layer: `window` in the layers that `kinds` calls `sliding_attention`, None elsewhere."""
    if len(kinds) != layers:
        raise config.wrong("layer_types", f"must name {layers} layers")
    for kind in kinds:
        if kind not in KINDS:
            raise config.wrong("layer_types", f"{kind} is not served ({', '.join(KINDS)})")
        if kind == "sliding_attention" and window is None:
            raise config.wrong("layer_types", "sliding_attention needs a sliding_window that is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_activation(config: ConfigJson, key: str, served: str, default: str) -> None:
    """Raises ConfigError if field `key` is not `served`, the family's activation."""
    names = (served, "swish") if served == "silu" else (served,)
    if config.text(key, default) not in names:
        raise config.wrong(key, f"only {served} is served for this family")


def _dtype(config: ConfigJson) -> torch.dtype:
    """Reads the field `dtype`, or `torch_dtype` in older files."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = config.text(key, "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise config.wrong(key, f"not one of {', '.join(DTYPES)}")
    return DTYPES[name]
