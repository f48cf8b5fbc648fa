"""Norms to be compiled, with what they are added to. Legend: T tokens, H hidden size."""

from __future__ import annotations

import torch
from torch import nn

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES


class AddNorm(nn.Module):
    """The plain RMSNorm of residual + x, and residual + x."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual_TH + x_TH
        wide = total.float()
        even = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight_H * even.to(total.dtype), total


def add_norm(function: Function) -> Program:
    """`sizes` (hidden size,), `numbers` (eps,): [x [T, H], residual [T, H], weight [H]] -> [normed, total]."""
    (hidden,), (eps,) = function.sizes, function.numbers

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        draw = Draw(DTYPES[function.dtype])
        return draw(size, hidden), draw(size, hidden), draw(hidden)

    return Program(AddNorm(eps), arguments, ({0: "T"}, {0: "T"}, None))
