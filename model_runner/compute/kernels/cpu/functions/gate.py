"""Gates of MLPs, to be compiled from gate.cpp. Legend: T tokens, I inner size."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from model_runner.compute.kernels.cpu.functions.program import Argument, Draw, Program, source

INNER = (160, 40, 2100, 13)
"""Whole vectors, and others; more than one thread takes at once."""


def silu_mul(dtype: torch.dtype) -> Program:
    """(gate and up [T, 2 I], out [T, I], T, I): writes silu(gate) * up, silu(gate) rounded as torch rounds it."""

    def arguments(size: int) -> tuple[Argument, ...]:
        draw, inner = Draw(dtype), INNER[size % len(INNER)]
        return 9 * draw(size, 2 * inner), draw(size, inner), size, inner

    return Program(source("gate.cpp"), _silu_mul, arguments)


def _silu_mul(gate_up_TJ: torch.Tensor, out_TI: torch.Tensor, tokens: int, inner: int) -> None:
    gate, up = gate_up_TJ.chunk(2, dim=-1)
    torch.mul(silu(gate), up, out=out_TI)
