"""AdaLoRA (2303.10512): a singular value decomposition with pruned values, divided by the initial rank.

    A = lora_A [k, I]      B = scaling / (ranknum + 1e-5) * (lora_B * lora_E^T)^T      k <= init_r values were kept

PEFT's scaling is lora_alpha itself; `ranknum`, where a file has it, is the rank that training began with. rank_pattern
says by module which of the values were kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from model_runner.lora.formats.base import PeftFormat, RankPattern, wrong_pattern
from model_runner.lora.formats.lora import LORA_TRAINING, check_initialisation
from model_runner.lora.target_module import Change, Module, Shape, Term, missing
from model_runner.lora.variants.biases import Biases
from model_runner.lora.variants.saved_modules import SavedModules
from model_runner.lora.variants.trained_tokens import TrainedTokens

EPSILON = 1e-5


class AdaLora(PeftFormat, frozen=True, kw_only=True):
    """Two matrices and the singular values between them. PEFT trains it without rsLoRA even if `use_rslora` is set."""

    peft_type: ClassVar = "ADALORA"
    name: ClassVar = "AdaLoRA"
    note: ClassVar = "A and B, the singular values that were kept folded into B"
    becomes: ClassVar = frozenset[Term]({"A", "B"})
    parts: ClassVar = frozenset({"lora_A", "lora_B", "lora_E", "ranknum"})
    variants: ClassVar = (Biases, SavedModules, TrainedTokens)
    harmless: ClassVar = (
        LORA_TRAINING
        | {"r", "use_rslora", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
        | {"total_step", "ensure_weight_tying"}
    )
    rank_option: ClassVar = "init_r"
    alpha_option: ClassVar = "lora_alpha"

    init_r: int = 12
    lora_alpha: float = 8
    init_lora_weights: bool | str = True

    def check(self) -> None:
        """Raises AdapterError for an initialisation that changed the base weights."""
        check_initialisation(self.init_lora_weights)

    def scaling(self, alpha: float, rank: int) -> float:
        """Returns alpha; `change` divides it by the initial rank."""
        return alpha

    def pattern_ranks(self, pattern: RankPattern) -> Mapping[str, int]:
        """Returns no ranks, because all modules begin with init_r."""
        return {}

    def final_ranks(self, pattern: RankPattern) -> Mapping[str, int]:
        """Returns how many singular values each module kept. Raises AdapterError for anything else in the pattern."""
        ranks: dict[str, int] = {}
        for key, kept in pattern.items():
            if not isinstance(kept, list):
                raise wrong_pattern(key, kept)
            ranks[_module_of(key)] = sum(kept)
        return ranks

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the shapes: A [k, I], B [O, k], E [k, 1], and ranknum [1] or [] if the module has it."""
        kept = self.rank(module, found)
        shapes = {"lora_A": [kept, module.in_features], "lora_B": [module.out_features, kept], "lora_E": [kept, 1]}
        if "ranknum" in found:
            shapes["ranknum"] = found["ranknum"] if found["ranknum"] in ([], [1]) else [1]
        return shapes

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """Returns k, the number of singular values kept. Raises AdapterError if lora_A is missing."""
        if "lora_A" not in found:
            raise missing(module, "lora_A", found)
        return module.target.rank

    def change(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> Change:
        """Returns A, and B with the singular values and the scaling folded in."""
        initial = float(tensors["ranknum"]) if "ranknum" in tensors else float(module.target.initial_rank)
        scaling = module.target.scaling / (initial + EPSILON)
        return Change(tensors["lora_A"], (tensors["lora_B"] * tensors["lora_E"].view(1, -1) * scaling).t())


def _module_of(key: str) -> str:
    """Returns the module of a pattern's key, which ends in lora_E, optionally followed by the adapter's name."""
    return key.rpartition(".lora_E")[0] or key
