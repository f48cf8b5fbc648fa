"""The base class of objects that call CPU kernels: attention, small operations and LoRA backends.

Does not name any kernel.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.config import ModelConfig


class KernelUser:
    """An object that may call CPU kernels. Calls none unless a subclass overrides both methods."""

    def wanted_kernels(self, config: ModelConfig, dtype: torch.dtype) -> list[KernelKey]:
        """Returns the keys of the kernels that this object would call for a model of `config` and `dtype`."""
        return []

    def use_kernels(self, kernels: KernelSet) -> None:
        """Makes the object look kernels up in `kernels` from now on. They need not be built yet."""
