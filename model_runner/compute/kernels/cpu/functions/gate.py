"""The SiLU gate of an MLP: the spec and reference of gate.cpp. Legend: T tokens, I inner size."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from model_runner.compute.kernels.cpu.functions.spec import Argument, KernelSpec, RandomTensors, source

INNER = (160, 40, 2100, 13)
"""The values of I that the kernel is checked with: multiples of the vector width and others, with one task for a row
and with several.
"""


def silu_mul(dtype: torch.dtype) -> KernelSpec:
    """Returns the spec of a kernel that writes silu(gate) * up to out, with silu(gate) rounded as torch rounds it.

    The kernel's arguments are (gate and up [T, 2 I], out [T, I], T, I).
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        random, inner = RandomTensors(dtype), INNER[size % len(INNER)]
        return 9 * random(size, 2 * inner), random(size, inner), size, inner

    return KernelSpec(source("gate.cpp"), _silu_mul, arguments)


def _silu_mul(gate_up_TJ: torch.Tensor, out_TI: torch.Tensor, tokens: int, inner: int) -> None:
    gate, up = gate_up_TJ.chunk(2, dim=-1)
    torch.mul(silu(gate), up, out=out_TI)
