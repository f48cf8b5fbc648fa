"""The table of families that are served, by the name in config.json, and the checks that apply to all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from model_runner.config.config_json import ConfigJson, read_config_json
from model_runner.config.families.gemma import gemma2, gemma3
from model_runner.config.families.llama import granite, llama, smollm3
from model_runner.config.families.mistral import mistral, mixtral
from model_runner.config.families.olmo import olmo2
from model_runner.config.families.phi import phi3
from model_runner.config.families.qwen import qwen2, qwen3, qwen3_moe
from model_runner.config.model_config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A model family. `title` and `note` are shown in tables and errors; `read` translates its config.json."""

    title: str
    model_type: str
    read: Callable[[ConfigJson], ModelConfig]
    note: str = ""


FAMILIES = {
    "LlamaForCausalLM": Family(
        "Llama 2, 3, 3.1, 3.2, 3.3", "llama", llama, "and what is built like it: SmolLM, SmolLM2, TinyLlama"
    ),
    "MistralForCausalLM": Family("Mistral", "mistral", mistral, "sliding windows"),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", "qwen2", qwen2),
    "Qwen3ForCausalLM": Family("Qwen3", "qwen3", qwen3),
    "Gemma2ForCausalLM": Family("Gemma 2", "gemma2", gemma2, "soft caps, alternating windows"),
    "Gemma3ForCausalLM": Family("Gemma 3", "gemma3_text", gemma3, "text models"),
    "Phi3ForCausalLM": Family(
        "Phi-3, Phi-3.5, Phi-4", "phi3", phi3, "adapters on qkv_proj and gate_up_proj; LongRoPE by --context-length"
    ),
    "GraniteForCausalLM": Family("Granite 3", "granite", granite),
    "SmolLM3ForCausalLM": Family("SmolLM3", "smollm3", smollm3, "layers without positions"),
    "Olmo2ForCausalLM": Family("OLMo 2", "olmo2", olmo2),
    "MixtralForCausalLM": Family(
        "Mixtral", "mixtral", mixtral, "experts and router too, one by one or by `target_parameters`"
    ),
    "Qwen3MoeForCausalLM": Family(
        "Qwen3 MoE", "qwen3_moe", qwen3_moe, "experts and router too, one by one or by `target_parameters`"
    ),
}

FOREIGN: dict[str, tuple[object, ...]] = {
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "lm_head_bias": (False,),
    "no_rope_layers": ([],),
    "rope_local_base_freq": (),
    "partial_rotary_factor": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    "use_sliding_window": (False,),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
}
"""Fields that may change what a model computes, each with the values that change nothing. Where a family does not read
a field, any other value of the field is refused: otherwise the model would be computed wrongly."""


def read_model_config(path: Path) -> ModelConfig:
    """Reads the config of the model directory `path`. Raises a ConfigError that names what cannot be served."""
    config = read_config_json(path)
    family = _find_family(config)
    _refuse_quantized(config)
    model = family.read(config)
    _refuse_foreign(config, family)
    return model


def _find_family(config: ConfigJson) -> Family:
    """Finds the family by `architectures`, or, in a config without it, by `model_type`."""
    names = config.texts("architectures")
    if not names:
        model_type = config.text("model_type", "")
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type] or [model_type]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    served = ", ".join(FAMILIES)
    raise ConfigError(f"{config.where}: the architecture {names[0] or '(none)'} is not served. Served are: {served}")


def _refuse_quantized(config: ConfigJson) -> None:
    if config.fields.get("quantization_config") is not None:
        method = config.inner("quantization_config").text("quant_method", "unknown method")
        raise ConfigError(
            f"{config.where}: quantization_config ({method}): quantized checkpoints are not served yet; "
            "use the unquantized weights of this model"
        )


def _refuse_foreign(config: ConfigJson, family: Family) -> None:
    for key, inert in FOREIGN.items():
        value = config.fields.get(key)
        if value is not None and key not in config.seen and value not in inert:
            raise config.wrong(key, f"changes what the model computes, and is not served for {family.title}")
    kinds = config.fields.get("layer_types")
    if kinds and "layer_types" not in config.seen and any(kind != "full_attention" for kind in kinds):
        raise config.wrong("layer_types", f"only full_attention is served for {family.title}")
