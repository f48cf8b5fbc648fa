"""LoHa (2108.06098): the elementwise product of two low-rank matrices, which equals one matrix of rank r * r.

(W1a W1b) had (W2a W2b)       W1a, W2a [O, r]     W1b, W2b [r, I]
unit (i, j)                   A = W1b[i] * W2b[j]           B = scaling * W1a[:, i] * W2a[:, j]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from model_runner.lora.formats.base import PeftFormat
from model_runner.lora.target_module import Change, Module, Shape, Term
from model_runner.lora.variants.saved_modules import SavedModules

LYCORIS_TRAINING = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})


class LoHa(PeftFormat, frozen=True, kw_only=True):
    """LoHa's four matrices. The Tucker form (hada_t1, hada_t2) is for convolutions, which a decoder does not have."""

    peft_type: ClassVar = "LOHA"
    name: ClassVar = "LoHa"
    note: ClassVar = "A and B of rank r * r"
    becomes: ClassVar = frozenset[Term]({"A", "B"})
    parts: ClassVar = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    unread_parts: ClassVar = frozenset({"hada_t1", "hada_t2"})
    variants: ClassVar = (SavedModules,)
    harmless: ClassVar = LYCORIS_TRAINING

    r: int = 8
    alpha: float = 8

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the shapes: [O, r] and [r, I] for each of the two factors."""
        rank = module.target.rank
        out, into = [module.out_features, rank], [rank, module.in_features]
        return {"hada_w1_a": out, "hada_w1_b": into, "hada_w2_a": out, "hada_w2_b": into}

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """Returns r * r."""
        return module.target.rank**2

    def change(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> Change:
        """Returns A and B as row-wise Khatri-Rao products of the four matrices."""
        a = tensors["hada_w1_b"][:, None] * tensors["hada_w2_b"][None]
        b = tensors["hada_w1_a"].t()[:, None] * tensors["hada_w2_a"].t()[None]
        return Change(a.flatten(0, 1), b.flatten(0, 1) * module.target.scaling)
