"""RMSNorm (1910.07467) as a layer: a weight and the model's kind of norm. The arithmetic is the ops'.

Knows nothing of where it stands. Legend: T tokens, H hidden size.
"""

from __future__ import annotations

import torch

from model_runner.arch import Arch
from model_runner.layers.weights import Weights
from model_runner.ops.base import NormKind, Ops


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float, kind: NormKind, ops: Ops) -> None:
        self.weight = weight
        self.eps = eps
        self.kind = kind
        self._ops = ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H], or heads [T, N, D] with a weight [D]."""
        return self._ops.norm(x, self.weight, self.eps, self.kind)

    def add(self, x_TH: torch.Tensor, added_TH: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of x + added, x + added) in one pass; None adds nothing."""
        if added_TH is None:
            return self(x_TH), x_TH
        return self._ops.add_norm(added_TH, x_TH, self.weight, self.eps, self.kind)


def read_norm(arch: Arch, weights: Weights, module: str, size: int) -> RMSNorm:
    """The model's kind of norm, its weight [size] from the checkpoint's `module`."""
    return RMSNorm(weights.tensor(f"{module}.weight", size), arch.norm_eps, arch.norm, weights.ops)
