"""The residual addition and the plain RMSNorm of its result: the spec and reference of norm.cpp.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import Argument, KernelSpec, RandomTensors, source

HIDDEN = (48, 7, 96, 41)
"""The values of H that the kernel is checked with: multiples of the vector width and others."""


def add_norm(dtype: torch.dtype) -> KernelSpec:
    """Returns the spec of a kernel that writes residual + x to total and its norm to normed, rounded as torch rounds.

    The kernel's arguments are (x [T, H], residual [T, H], weight [H], normed [T, H], total [T, H], T, H, eps).
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        random, hidden = RandomTensors(dtype), HIDDEN[size % len(HIDDEN)]
        x, residual, normed, total = (random(size, hidden) for _ in range(4))
        return x, residual, random(hidden), normed, total, size, hidden, 1e-5

    return KernelSpec(source("norm.cpp"), _add_norm, arguments)


def _add_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    normed_TH: torch.Tensor,
    total_TH: torch.Tensor,
    tokens: int,
    hidden: int,
    eps: float,
) -> None:
    torch.add(residual_TH, x_TH, out=total_TH)
    total_float_TH = total_TH.float()
    scaled_TH = total_float_TH * torch.rsqrt(total_float_TH.pow(2).mean(-1, keepdim=True) + eps)
    torch.mul(weight_H, scaled_TH.to(total_TH.dtype), out=normed_TH)
