"""LoHa (2108.06098): the elementwise product of two low-rank matrices, exactly one matrix of rank r * r.

(W1a W1b) had (W2a W2b)       W1a, W2a [O, r]     W1b, W2b [r, I]
unit (i, j)                   A = W1b[i] * W2b[j]           B = scaling * W1a[:, i] * W2a[:, j]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model_runner.lora.formats.base import Format, Module, Shape


class LoHa(Format):
    """Four matrices. The Tucker form (hada_t1) is for convolutions, which a decoder has not."""

    name = "LoHa"
    note = "A and B of rank r * r"
    parts = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """[O, r] and [r, I], twice."""
        rank = module.target.rank
        out, into = [module.out_features, rank], [rank, module.in_features]
        return {"hada_w1_a": out, "hada_w1_b": into, "hada_w2_a": out, "hada_w2_b": into}

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """r * r."""
        return module.target.rank**2

    def factors(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The row-wise Khatri-Rao products."""
        a = tensors["hada_w1_b"][:, None] * tensors["hada_w2_b"][None]
        b = tensors["hada_w1_a"].t()[:, None] * tensors["hada_w2_a"].t()[None]
        return a.flatten(0, 1), b.flatten(0, 1) * module.target.scaling
