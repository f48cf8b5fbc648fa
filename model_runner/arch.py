"""What a model is, as numbers: the translation of each family's config.json into one Arch.

A family is a translation, not a fork: the decoder reads an Arch and never a config.json. Where a field is absent, the
family's own default (as transformers has it) applies. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ConfigError
from model_runner.config_json import ConfigJson, read_config_json
from model_runner.rope import Rope, read_rope, rope_reach

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float32}


@dataclass(frozen=True)
class Arch:
    """One decoder-only model.

    windows     per layer: how many positions a token sees, itself included; None = all before it
    max_length  positions the model was made for, with its rope scaling
    dtype       of the weights in the checkpoint (what `--dtype auto` means)
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    rope: Rope
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class _Family:
    """What makes a family itself: its defaults and how it reads biases and windows."""

    name: str
    model_type: str
    biases: Callable[[ConfigJson], tuple[bool, bool, bool]]  # qkv, o, mlp
    windows: Callable[[ConfigJson, int], tuple[int | None, ...]]
    max_length: int
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / heads
    qk_norm: bool = False


def _full(config: ConfigJson, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _mistral_windows(config: ConfigJson, layers: int) -> tuple[int | None, ...]:
    """One window for all layers; absent means 4096, null means none."""
    given = config.fields.get("sliding_window", 4096)
    window = None if given is None else config.integer("sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    if any(item != kind for item in config.texts("layer_types")):
        raise config.wrong("layer_types", f"a Mistral model has {kind} in every layer")
    return (window,) * layers


def _qwen_windows(config: ConfigJson, layers: int) -> tuple[int | None, ...]:
    """`layer_types` says which layers slide; without it those from `max_window_layers` on, if sliding is used."""
    null = "sliding_window" in config and config.fields["sliding_window"] is None
    sliding = config.flag("use_sliding_window", False) and not null
    window = config.integer("sliding_window", 4096) if sliding else None
    kinds = config.texts("layer_types")
    if not kinds:
        first = config.integer("max_window_layers", 28, least=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if len(kinds) != layers:
        raise config.wrong("layer_types", f"must name {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.wrong("layer_types", f"{kind} is not served (full_attention, sliding_attention)")
        if kind == "sliding_attention" and window is None:
            raise config.wrong("layer_types", "sliding_attention needs use_sliding_window and sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _llama_biases(config: ConfigJson) -> tuple[bool, bool, bool]:
    attention = config.flag("attention_bias", False)
    return attention, attention, config.flag("mlp_bias", False)


def _qwen3_biases(config: ConfigJson) -> tuple[bool, bool, bool]:
    attention = config.flag("attention_bias", False)
    return attention, attention, False


FAMILIES = {
    "LlamaForCausalLM": _Family("llama", "llama", _llama_biases, _full, max_length=2048),
    "MistralForCausalLM": _Family(
        "mistral", "mistral", lambda _: (False, False, False), _mistral_windows, max_length=4096 * 32, kv_heads=8
    ),
    "Qwen2ForCausalLM": _Family(
        "qwen2", "qwen2", lambda _: (True, False, False), _qwen_windows, max_length=32768, kv_heads=32
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3", "qwen3", _qwen3_biases, _qwen_windows, max_length=32768, kv_heads=32, head_dim=128, qk_norm=True
    ),
}


def read_arch(path: Path) -> Arch:
    """The Arch of the model directory `path`. Raises ConfigError naming what cannot be served."""
    config = read_config_json(path)
    family = _family(config)
    _refuse(config)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    layers = config.integer("num_hidden_layers")
    kv_heads = config.integer(
        "num_key_value_heads", heads if "num_key_value_heads" in config else family.kv_heads or heads
    )
    head_dim = config.integer("head_dim", family.head_dim or hidden // heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if head_dim % 2:
        raise config.wrong("head_dim", f"the head size is {head_dim}; rotary embeddings need an even one")
    positions = config.integer("max_position_embeddings", family.max_length)
    rope = read_rope(config, positions)
    qkv_bias, o_bias, mlp_bias = family.biases(config)
    return Arch(
        family=family.name,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_length=rope_reach(rope, positions),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        windows=family.windows(config, layers),
        rope=rope,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qk_norm=family.qk_norm,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        dtype=_dtype(config),
    )


def _family(config: ConfigJson) -> _Family:
    """By `architectures`; a config without it by `model_type`."""
    names = config.texts("architectures")
    if not names:
        model_type = config.text("model_type", "")
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type] or [model_type]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    served = ", ".join(FAMILIES)
    raise ConfigError(f"{config.where}: the architecture {names[0] or '(none)'} is not served. Served are: {served}")


def _refuse(config: ConfigJson) -> None:
    """Fields that would change the computation in a way that is not built."""
    if config.fields.get("quantization_config") is not None:
        method = config.inner("quantization_config").text("quant_method", "unknown method")
        raise ConfigError(
            f"{config.where}: quantization_config ({method}): quantized checkpoints are not served yet; "
            "use the unquantized weights of this model"
        )
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        raise config.wrong("hidden_act", "only silu is served")


def _dtype(config: ConfigJson) -> torch.dtype:
    """`dtype`, or `torch_dtype` as older files call it."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = config.text(key, "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise config.wrong(key, f"not one of {', '.join(DTYPES)}")
    return DTYPES[name]
