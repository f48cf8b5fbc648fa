"""Who calls compiled functions. Knows none of them."""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.program import Function
from model_runner.compute.kernels.cpu.kernels import Kernels
from model_runner.config import Arch


class Caller:
    """Calls none, as whoever has kernels of its own."""

    def functions(self, arch: Arch, dtype: torch.dtype) -> list[Function]:
        """Those it would call for this model."""
        return []

    def use(self, kernels: Kernels) -> None:
        """Where they are to be found, once they are compiled."""
