"""adapter_config.json of a PEFT LoRA: every field of LoraConfig by name, as used, harmless or refused.

Field names and meanings as of PEFT 0.21. A setting that would change the answer and that we cannot honour is refused
by its name and value; a key that nobody knows is refused unless it is empty. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import AdapterError
from model_runner.lora.adapter import MAX_RANK
from model_runner.lora.formats.regular_file import read_bounded

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20

REFUSED: dict[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "biases on lora_B",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "modules_to_save": "whole modules beside the LoRA",
    "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "activated LoRA",
    "alora_invocation_string": "activated LoRA",
    "target_parameters": "LoRA on parameters",
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
"""Options that change what the adapter computes and that are not served yet. Empty or false is fine."""

HARMLESS = frozenset({
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
})  # fmt: skip
"""Options about training, provenance or how to start; what they would change is decided by another field."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that change the base weights: the saved A and B fit another base than ours."""


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that say what an adapter computes. Defaults are PEFT's."""

    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: bool | str = True

    def scaling(self, alpha: float, rank: int) -> float:
        """What B A is multiplied with: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def scale_bytes(self) -> bytes:
        """The fields that change the delta and are not in the tensors, for the revision. Pattern order counts."""
        patterns = [list((pattern or {}).items()) for pattern in (self.rank_pattern, self.alpha_pattern)]
        return msgspec.json.encode(["peft-lora", self.r, self.lora_alpha, self.use_rslora, *patterns])


def read_config(root: Path) -> PeftConfig:
    """The config of the adapter in `root`, checked. Raises AdapterError naming the file or the option."""
    try:
        fields = msgspec.json.decode(read_bounded(root / CONFIG_NAME, MAX_CONFIG_BYTES), type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error
    return parse_config(fields)


def parse_config(fields: dict[str, Any]) -> PeftConfig:
    """The same from the decoded JSON object."""
    _refuse_type(fields)
    _refuse_options(fields)
    known = {name: value for name, value in fields.items() if name in PeftConfig.__struct_fields__}
    try:
        config = msgspec.convert(known, PeftConfig)
    except msgspec.ValidationError as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error
    _check_meaning(config)
    _check_numbers(config)
    _check_targets(config)
    return config


def _refuse_type(fields: dict[str, Any]) -> None:
    """First of all, because another type has other options."""
    if fields.get("peft_type", "LORA") != "LORA":
        raise _unsupported("peft_type", fields["peft_type"], "only LORA")


def _refuse_options(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name in REFUSED and value:
            raise _unsupported(name, value, REFUSED[name])
        known = name in REFUSED or name in HARMLESS or name in PeftConfig.__struct_fields__
        if not known and value:
            raise AdapterError(f"{CONFIG_NAME}: unknown option {name}={_show(value)}")


def _check_meaning(config: PeftConfig) -> None:
    if config.task_type not in (None, "CAUSAL_LM"):
        raise _unsupported("task_type", config.task_type, "only CAUSAL_LM")
    if config.bias != "none":
        raise _unsupported("bias", config.bias, "biases")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        raise AdapterError(
            f"{CONFIG_NAME}: init_lora_weights={_show(init)} changed the base weights in training; save the adapter "
            "with path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )


def _check_numbers(config: PeftConfig) -> None:
    ranks = {"r": config.r}
    ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in (config.rank_pattern or {}).items()}
    for where, rank in ranks.items():
        if not 1 <= rank <= MAX_RANK:
            raise AdapterError(f"{CONFIG_NAME}: {where}={rank} is not a rank from 1 to {MAX_RANK}")
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for where, alpha in alphas.items():
        if not 0 < alpha < math.inf:
            raise AdapterError(f"{CONFIG_NAME}: {where}={alpha:g} is not a finite number above 0")


def _check_targets(config: PeftConfig) -> None:
    if not config.target_modules:
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
