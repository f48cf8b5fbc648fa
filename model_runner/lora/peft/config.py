"""adapter_config.json of a PEFT adapter: every field of each format's config by name, as used, harmless or refused.

Field names and meanings as of PEFT 0.21. A setting that would change the answer and that we cannot honour is refused
by its name and value; a key that nobody knows is refused unless it is empty. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import AdapterError
from model_runner.lora.files.regular_file import read_bounded
from model_runner.lora.normal_form import MAX_RANK

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20

REFUSED: dict[str, str] = {
    "alora_invocation_string": "an invocation as text; its tokens are served",
    "megatron_config": "Megatron layers",
    "layer_replication": "replicated layers",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA (it changes the base weights)",
    "monteclora_config": "MonteCLoRA",
    "long_lora_max_len": "long-context LoRA, which vLLM has withdrawn",
    "tensorizer_config_dict": "weights stored by tensorizer",
}
"""Options that change what an adapter computes and that are not served. Empty or false is fine."""

COMMON = frozenset({
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
})  # fmt: skip
"""Options that every format uses."""

PROVENANCE = frozenset({"auto_mapping", "peft_version", "revision", "inference_mode"})
LORA_TRAINING = frozenset({
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    "runtime_config",
})  # fmt: skip
"""Options about training or how to start; what they would change is decided by another field or by the tensors.

fan_in_fan_out is about Conv1D layers, which no served family has; PEFT puts it off on a linear.
"""
LYCORIS_TRAINING = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})


class Kind(msgspec.Struct, frozen=True):
    """One `peft_type`: the options that it uses, beside the common ones, and those that are harmless."""

    uses: frozenset[str]
    harmless: frozenset[str]
    rank: str = "r"
    alpha: str = "alpha"


KINDS = {
    "LORA": Kind(
        frozenset({"r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias", "init_lora_weights"})
        | {"ensure_weight_tying", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"},
        LORA_TRAINING,
        alpha="lora_alpha",
    ),
    "ADALORA": Kind(
        frozenset({"init_r", "lora_alpha", "bias", "init_lora_weights", "trainable_token_indices"}),
        LORA_TRAINING
        | {"r", "use_rslora", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
        | {"total_step", "ensure_weight_tying"},
        rank="init_r",
        alpha="lora_alpha",
    ),
    "LOHA": Kind(frozenset({"r", "alpha"}), LYCORIS_TRAINING),
    "LOKR": Kind(
        frozenset({"r", "alpha"}), LYCORIS_TRAINING | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
    ),
}
"""The formats by the name that PEFT gives them. AdaLoRA trains without rsLoRA even where the option is set."""

VARIANTS = {
    "rsLoRA": "`use_rslora`: the scaling is alpha / sqrt(r)",
    "DoRA": "`use_dora`: A, B and a gain for every output column",
    "biases": '`lora_bias`, `bias="all"`, `bias="lora_only"`: a bias for every output column',
    "embedding and head": "`embed_tokens` and `lm_head` among the targets, tied or not",
    "whole embedding and head": "the same in `modules_to_save`, or saved for another reason: a matrix of its own",
    "norms": "`norm`, `input_layernorm` and the like in `modules_to_save`: weights of its own, of all norms or of some",
    "added tokens": "a vocabulary larger or smaller than the base's, and `trainable_token_indices`: embedding and head"
    " become whole matrices with everything in them",
    "activated": "`alora_invocation_tokens`: it acts from the last invocation in the prompt on; what is before is the"
    " base's, with its KV pages. For LoRA, rsLoRA and `lora_bias` on linears, and not in a mix",
}
"""What the options of a format add to it, for people."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that change the base weights: the saved A and B fit another base than ours."""


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that say what an adapter computes. Defaults are PEFT's; `r` and `alpha` are the kind's own.

    A rank pattern of AdaLoRA says which of the values were kept.
    """

    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: int = 8
    alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    rank_pattern: dict[str, int | list[bool]] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None
    init_lora_weights: bool | str = True

    def scaling(self, alpha: float, rank: int) -> float:
        """What B A is multiplied with: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.

        AdaLoRA's is alpha; what it is divided by is part of the format.
        """
        if self.peft_type == "ADALORA":
            return alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def scale_bytes(self) -> bytes:
        """The fields that change the delta and are not in the tensors, for the revision. Pattern order counts."""
        patterns = [list((pattern or {}).items()) for pattern in (self.rank_pattern, self.alpha_pattern)]
        kind = "-".join(["peft", self.peft_type.lower(), *["dora"] * self.use_dora])
        tokens = [self.trainable_token_indices] if self.trainable_token_indices else []
        invocation = [["alora", self.alora_invocation_tokens]] if self.alora_invocation_tokens else []
        return msgspec.json.encode([kind, self.r, self.alpha, self.use_rslora, *patterns, *tokens, *invocation])


def read_config(root: Path) -> PeftConfig:
    """The config of the adapter in `root`, checked. Raises AdapterError naming the file or the option."""
    try:
        fields = msgspec.json.decode(read_bounded(root / CONFIG_NAME, MAX_CONFIG_BYTES), type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error
    return parse_config(fields)


def parse_config(fields: dict[str, Any]) -> PeftConfig:
    """The same from the decoded JSON object."""
    kind = _kind(fields)
    _refuse_options(fields, kind)
    renamed = {kind.rank: "r", kind.alpha: "alpha"}
    used = {renamed.get(name, name): value for name, value in fields.items() if name in kind.uses or name in COMMON}
    defaults = {"r": 12} if kind.rank == "init_r" else {}
    try:
        config = msgspec.convert(defaults | used, PeftConfig)
    except msgspec.ValidationError as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error
    _check_meaning(config)
    _check_numbers(config, kind)
    _check_targets(config)
    return config


def _kind(fields: dict[str, Any]) -> Kind:
    """First of all, because each type has its own options."""
    name = fields.get("peft_type", "LORA")
    if not isinstance(name, str) or name not in KINDS:
        raise _unsupported("peft_type", name, f"only {', '.join(KINDS)}")
    return KINDS[name]


def _refuse_options(fields: dict[str, Any], kind: Kind) -> None:
    for name, value in fields.items():
        if not value:
            continue
        if name in REFUSED:
            raise _unsupported(name, value, REFUSED[name])
        if name not in kind.uses | kind.harmless | COMMON | PROVENANCE:
            known = any(name in other.uses for other in KINDS.values())
            reason = "is no option of this peft_type" if known else "is unknown"
            raise AdapterError(f"{CONFIG_NAME}: option {name}={_show(value)} {reason}")


def _check_meaning(config: PeftConfig) -> None:
    if config.task_type not in (None, "CAUSAL_LM"):
        raise _unsupported("task_type", config.task_type, "only CAUSAL_LM")
    if config.bias not in ("none", "all", "lora_only"):
        raise _unsupported("bias", config.bias, "only none, all and lora_only")
    if config.use_dora and config.lora_bias:
        raise _unsupported("lora_bias", config.lora_bias, "not together with use_dora")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        raise AdapterError(
            f"{CONFIG_NAME}: init_lora_weights={_show(init)} changed the base weights in training; save the adapter "
            "with path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )


def _check_numbers(config: PeftConfig, kind: Kind) -> None:
    ranks = {kind.rank: config.r}
    adaptive = config.peft_type == "ADALORA"
    for key, rank in (config.rank_pattern or {}).items():
        if isinstance(rank, list) is not adaptive:
            raise AdapterError(f"{CONFIG_NAME}: rank_pattern[{key!r}]={_show(rank)} is not of this peft_type")
        if not isinstance(rank, list):
            ranks[f"rank_pattern[{key!r}]"] = rank
    for where, rank in ranks.items():
        if not 1 <= rank <= MAX_RANK:
            raise AdapterError(f"{CONFIG_NAME}: {where}={rank} is not a rank from 1 to {MAX_RANK}")
    alphas = {kind.alpha: config.alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for where, alpha in alphas.items():
        if not 0 < alpha < math.inf:
            raise AdapterError(f"{CONFIG_NAME}: {where}={alpha:g} is not a finite number above 0")


def _check_targets(config: PeftConfig) -> None:
    if not config.target_modules and not config.target_parameters:
        raise AdapterError(f"{CONFIG_NAME}: target_modules={_show(config.target_modules)} names no module")
    layered = config.layers_to_transform is not None or bool(config.layers_pattern)
    if layered and isinstance(config.target_modules, str):
        raise AdapterError(
            f"{CONFIG_NAME}: layers_to_transform and layers_pattern need a list of target_modules, "
            f"not {_show(config.target_modules)}"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise AdapterError(f"{CONFIG_NAME}: layers_pattern={_show(config.layers_pattern)} without layers_to_transform")


def _unsupported(name: str, value: object, what: str) -> AdapterError:
    return AdapterError(f"{CONFIG_NAME}: {name}={_show(value)} is not supported yet ({what})")


def _show(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
