"""LoRA (2106.09685) and everything that is saved as such: rsLoRA, LoRA+, converted PiSSA, OLoRA and CorDA.

linear      A = lora_A [r, I]             B = scaling * lora_B^T            lora_B [O, r]
embedding   A = lora_embedding_A [r, V]   B = scaling * lora_embedding_B^T  lora_embedding_B [H, r]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model_runner.lora.formats.base import Format, Module, Shape


class Lora(Format):
    """Two matrices."""

    name = "LoRA"
    note = (
        "A and B; also what PiSSA, OLoRA, CorDA and LoRA-GA are saved as with"
        " `path_initial_model_for_weight_conversion`"
    )
    parts = frozenset({"lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"})

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """A [r, I], B [O, r]."""
        a, b = _names(module)
        rank = module.target.rank
        return {a: [rank, module.in_features], b: [module.out_features, rank]}

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """r."""
        return module.target.rank

    def factors(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scaling goes into B."""
        a, b = _names(module)
        return tensors[a], (tensors[b] * module.target.scaling).t()


def _names(module: Module) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if module.embeds else ("lora_A.weight", "lora_B.weight")
