"""LoRA (2106.09685) and the methods that are saved as LoRA: rsLoRA, LoRA+, converted PiSSA, OLoRA and CorDA.

linear      A = lora_A [r, I]             B = scaling * lora_B^T            lora_B [O, r]
embedding   A = lora_embedding_A [r, V]   B = scaling * lora_embedding_B^T  lora_embedding_B [H, r]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from engine.errors import AdapterError
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.files.advice import MERGE
from model_runner.lora.files.quoted import quoted_value
from model_runner.lora.formats.base import PeftFormat
from model_runner.lora.target_module import Change, Module, Shape, Term
from model_runner.lora.variants.alora import ActivatedLora
from model_runner.lora.variants.biases import LoraBiases
from model_runner.lora.variants.dora import Dora
from model_runner.lora.variants.embedding_and_head import EmbeddingAndHead
from model_runner.lora.variants.rslora import RsLora
from model_runner.lora.variants.saved_modules import SavedModules
from model_runner.lora.variants.target_parameters import TargetParameters
from model_runner.lora.variants.trained_tokens import TrainedTokens

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
"""Options about training.

fan_in_fan_out is about Conv1D layers, which no served family has; PEFT switches it off on a linear.
"""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that change the base weights: the saved A and B do not fit the served base."""


class Lora(PeftFormat, frozen=True, kw_only=True):
    """The two matrices A and B of LoRA."""

    peft_type: ClassVar = "LORA"
    name: ClassVar = "LoRA"
    note: ClassVar = (
        "A and B; also what PiSSA, OLoRA, CorDA and LoRA-GA are saved as with"
        " `path_initial_model_for_weight_conversion`"
    )
    becomes: ClassVar = frozenset[Term]({"A", "B"})
    parts: ClassVar = frozenset({"lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"})
    refused_parts: ClassVar = {"lora_diag": "KaSA"}
    variants: ClassVar = (
        RsLora,
        Dora,
        LoraBiases,
        EmbeddingAndHead,
        SavedModules,
        TrainedTokens,
        TargetParameters,
        ActivatedLora,
    )
    harmless: ClassVar = LORA_TRAINING
    refused: ClassVar = {
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
    alpha_option: ClassVar = "lora_alpha"

    r: int = 8
    lora_alpha: float = 8
    init_lora_weights: bool | str = True

    def check(self) -> None:
        """Raises AdapterError for an initialisation that changed the base weights."""
        check_initialisation(self.init_lora_weights)

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the shapes: A [r, I], B [O, r]."""
        a, b = _part_names(module)
        rank = module.target.rank
        return {a: [rank, module.in_features], b: [module.out_features, rank]}

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """Returns r."""
        return module.target.rank

    def change(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> Change:
        """Returns A, and B with the scaling folded in."""
        a, b = _part_names(module)
        return Change(tensors[a], (tensors[b] * module.target.scaling).t())


def check_initialisation(init_lora_weights: bool | str) -> None:
    """Raises AdapterError for an initialisation that changed the base weights in training."""
    if isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(BASE_CHANGING):
        raise AdapterError(
            f"{CONFIG_NAME}: init_lora_weights={quoted_value(init_lora_weights)} changed the base weights in training;"
            f" save the adapter with path_initial_model_for_weight_conversion, which turns it into a plain LoRA,"
            f" or {MERGE}"
        )


def _part_names(module: Module) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if module.embeds else ("lora_A.weight", "lora_B.weight")
