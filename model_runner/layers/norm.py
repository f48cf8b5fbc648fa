"""RMSNorm (1910.07467): float32 inside, the model's dtype outside.

    plain   weight * cast(x / rms)        Llama and most
    wide    cast(weight * x / rms)        OLMo 2
    gemma   cast((1 + weight) * x / rms)  Gemma

Knows nothing of where it stands.
"""

from __future__ import annotations

import torch

from model_runner.arch import Arch
from model_runner.layers.weights import Weights


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape whose last dimension is the weight's."""
        return self.weight * self._even(x).to(x.dtype)

    def _even(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class WideRMSNorm(RMSNorm):
    """The same, weighted before it is cast."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight.float() * self._even(x)).to(x.dtype)


class GemmaRMSNorm(RMSNorm):
    """The same, weighted by 1 + weight before it is cast."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ((1.0 + self.weight.float()) * self._even(x)).to(x.dtype)


NORMS = {"plain": RMSNorm, "wide": WideRMSNorm, "gemma": GemmaRMSNorm}


def read_norm(arch: Arch, weights: Weights, module: str, size: int) -> RMSNorm:
    """The model's kind of norm, its weight [size] from the checkpoint's `module`."""
    return NORMS[arch.norm](weights.tensor(f"{module}.weight", size), arch.norm_eps)
