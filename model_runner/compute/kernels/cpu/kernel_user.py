"""The base class of what calls CPU kernels: attention, small operations and LoRA backends. Knows no kernel by name."""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.config import ModelConfig


class KernelUser:
    """Uses no CPU kernel unless a subclass says otherwise."""

    def wanted_kernels(self, config: ModelConfig, dtype: torch.dtype) -> list[KernelKey]:
        """The kernels that this object would call for this model."""
        return []

    def use_kernels(self, kernels: KernelSet) -> None:
        """Looks kernels up in `kernels` from now on; it may still be building them."""
