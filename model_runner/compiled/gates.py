"""Gates of MLPs to be compiled. Legend: T tokens, I inner size."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES


class SiluMul(nn.Module):
    """silu(gate) * up."""

    def forward(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TJ.chunk(2, dim=-1)
        return silu(gate) * up


def silu_mul(function: Function) -> Program:
    """`sizes` (inner size,): [gate_up [T, 2 I]] -> [[T, I]]."""
    (inner,) = function.sizes

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        return (Draw(DTYPES[function.dtype])(size, 2 * inner),)

    return Program(SiluMul(), arguments, ({0: "T"},))
