"""The plain RMSNorm with what it is added to, to be compiled from norm.cpp. Legend: T tokens, H hidden size."""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.program import Argument, Draw, Program, source

HIDDEN = (48, 7, 96, 41)
"""Whole vectors, and others."""


def add_norm(dtype: torch.dtype) -> Program:
    """(x [T, H], residual [T, H], weight [H], normed [T, H], total [T, H], T, H, eps): writes total, which is residual
    + x, and its norm: both rounded where torch rounds.
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        draw, hidden = Draw(dtype), HIDDEN[size % len(HIDDEN)]
        x, residual, normed, total = (draw(size, hidden) for _ in range(4))
        return x, residual, draw(hidden), normed, total, size, hidden, 1e-5

    return Program(source("norm.cpp"), _add_norm, arguments)


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
    wide = total_TH.float()
    even = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    torch.mul(weight_H, even.to(total_TH.dtype), out=normed_TH)
