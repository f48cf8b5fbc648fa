"""RMSNorm (1910.07467): float32 inside, the model's dtype outside. Knows nothing of where it stands."""

from __future__ import annotations

import torch


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape whose last dimension is the weight's."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
