"""AdaLoRA (2303.10512): a singular value decomposition with pruned values. B E A, divided by the rank it began with.

    A = lora_A [k, I]      B = scaling / (ranknum + 1e-5) * (lora_B * lora_E^T)^T      k <= init_r values were kept

PEFT's scaling is lora_alpha itself; `ranknum`, where a file has it, is the rank that training began with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model_runner.lora.formats.base import Format, Module, Shape, missing

EPSILON = 1e-5


class AdaLora(Format):
    """Two matrices and the values between them."""

    name = "AdaLoRA"
    note = "A and B, the singular values that were kept folded into B"
    parts = frozenset({"lora_A", "lora_B", "lora_E", "ranknum"})

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """A [k, I], B [O, k], E [k, 1]; ranknum [1] or [] if there is one."""
        kept = self.rank(module, found)
        shapes = {"lora_A": [kept, module.in_features], "lora_B": [module.out_features, kept], "lora_E": [kept, 1]}
        if "ranknum" in found:
            shapes["ranknum"] = found["ranknum"] if found["ranknum"] in ([], [1]) else [1]
        return shapes

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """k: by the pattern of kept values, or all."""
        if "lora_A" not in found:
            raise missing(module, "lora_A", found)
        return module.target.rank

    def factors(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """E goes into B, as the scaling does."""
        began = float(tensors["ranknum"]) if "ranknum" in tensors else float(module.target.began)
        scaling = module.target.scaling / (began + EPSILON)
        return tensors["lora_A"], (tensors["lora_B"] * tensors["lora_E"].view(1, -1) * scaling).t()
